"""The data of a benchmark: where they lie, and everything that is made of them once: plan, preprocessed volumes, nnU-Net's preprocessing, a hash."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nnssl_ext.benchmark.embedded import CLASSES, IMAGES, PAIRS, write_embedded
from nnssl_ext.benchmark.suite import Network, Suite
from nnssl_ext.benchmark.untrained import untrained
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json, sha256_file, sha256_json, write_json
from nnssl_ext.core.paths import PREPROCESSED, RAW, dataset_name, preprocessed_folder, root
from nnssl_ext.core.plan import Plan
from nnssl_ext.finetuning.commands import FOLDERS, Machine, hand_off, run
from nnssl_ext.finetuning.export import with_our_trainers
from nnssl_ext.finetuning.plans import PlanOptions, default_configuration, labelled_cases
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.planners.fingerprint import extract_fingerprint
from nnssl_ext.planners.planner import Planner, plan_experiment
from nnssl_ext.preprocessing.parallel import Workers
from nnssl_ext.preprocessing.preprocessor import preprocess
from nnssl_ext.preprocessing.store import CaseStore

SEGMENTATION, CLASSIFICATION, REGISTRATION = "segmentation", "classification", "registration"
_PLANS = "nnsslPlans"


@dataclass(frozen=True)
class Data:
    """The data of a benchmark in a folder, as `prepare` left them.

    Args:
        out: the benchmark's folder.
    """

    out: Path

    @staticmethod
    def beside(folder: Path) -> Data:
        """Of the benchmark that a unit's folder belongs to."""
        return Data(folder.parent.parent)

    @property
    def folder(self) -> Path:
        return self.out / "data"

    @property
    def record(self) -> dict[str, Any]:
        """ "folders" (of the environment variables), "unlabelled", "datasets" (what each can judge, and its labelled cases), "digests" of all of them."""
        found: dict[str, Any] = read_json(self.folder / "data.json")
        return found

    @property
    def plan(self) -> Plan:
        """Of the pretraining."""
        return Plan.load(self.folder / "plan.json")

    def store(self, configuration: str) -> CaseStore:
        """The preprocessed unlabelled volumes."""
        record = self.record
        return CaseStore(Path(record["folders"][PREPROCESSED]) / record["unlabelled"] / self.plan.configuration(configuration).data_identifier)

    def raw(self, dataset: str) -> Path:
        """A labelled dataset."""
        return Path(self.record["folders"][FOLDERS[0]]) / dataset


@contextmanager
def folders(values: dict[str, str], alone: bool = True, **more: str) -> Iterator[None]:
    """nnssl's and nnU-Net's environment variables; `alone`: with one process for everything, and nothing compiled."""
    one_process = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"} if alone else {}
    for value in values.values():
        Path(value).mkdir(parents=True, exist_ok=True)
    trainers = {"nnUNet_extTrainer": with_our_trainers(os.environ.get("nnUNet_extTrainer"))}
    with patch.dict(os.environ, values | one_process | trainers | more):
        yield


def prepare(suite: Suite, out: Path, workers: int) -> Data:
    """Make whatever is missing: the embedded data, plan, preprocessed volumes, nnU-Net's fingerprint and preprocessing.

    Raises:
        UserError: unknown datasets, data that nobody can use; what the single steps raise.
    """
    data = Data(out)
    values = _folders(suite, data.folder)
    with folders(values):
        if suite.embedded:
            unlabelled, labelled = write_embedded(root(RAW), root(FOLDERS[0]), suite.generator, workers)
        else:
            unlabelled, labelled = dataset_name(suite.unlabelled, (RAW, PREPROCESSED)), tuple(dataset_name(one, FOLDERS[:1]) for one in suite.labelled)
        stamp = _stamps(unlabelled, labelled)
        network = suite.network and asdict(suite.network)
        wanted = {"folders": values, "unlabelled": unlabelled, "labelled": list(labelled), "network": network, "configuration": suite.configuration}
        if (data.folder / "data.json").is_file() and {**wanted, "stamp": stamp}.items() <= data.record.items():
            return data
        datasets = {name: _abilities(root(FOLDERS[0]) / name) for name in labelled}
        plan = _pretraining_plan(suite, unlabelled, workers)
        plan.save(data.folder / "plan.json")
        family = next(iter(plan.configuration(suite.configuration).networks))
        checkpoint = untrained(plan, suite.configuration, family, 0, data.folder / "untrained.pth")
        for name, found in datasets.items():
            if SEGMENTATION in found["judges"]:
                _nnunet(Pretrained.load(checkpoint), name, workers)
        store = CaseStore(preprocessed_folder(unlabelled) / plan.configuration(suite.configuration).data_identifier)
        digests = {unlabelled: store.data_hash(), **{name: sha256_json(_hashes(root(FOLDERS[0]) / name)) for name in labelled}}
        write_json(data.folder / "data.json", {**wanted, "stamp": _stamps(unlabelled, labelled), "datasets": datasets, "digests": digests})
    return data


def _folders(suite: Suite, own: Path) -> dict[str, str]:
    """Embedded data lie below the benchmark's folder, others where the user has them; what nnU-Net makes is always the benchmark's own."""
    theirs = () if suite.embedded else (RAW, PREPROCESSED, FOLDERS[0])
    return {name: str(root(name).absolute() if name in theirs else own / name) for name in (RAW, PREPROCESSED, *FOLDERS)}


def _abilities(folder: Path) -> dict[str, Any]:
    """What a labelled dataset can judge, and its labelled cases."""
    marks = {SEGMENTATION: "dataset.json", CLASSIFICATION: CLASSES, REGISTRATION: PAIRS}
    judges = [name for name, file in marks.items() if (folder / file).is_file()]
    if not judges:
        raise UserError("the labelled dataset can't judge anything", folder, f"it needs one of {', '.join(marks.values())}")
    if SEGMENTATION in judges and not all((folder / part).is_dir() and any((folder / part).iterdir()) for part in ("imagesTs", "labelsTs")):
        raise UserError("the labelled dataset has no labelled test cases", folder, "put some into imagesTs and labelsTs: they are never used for a choice")
    return {"judges": judges, "cases": len(labelled_cases(folder)) if SEGMENTATION in judges else 0}


def classification_images(folder: Path) -> Path:
    """Where the volumes of classification.csv lie."""
    return folder / IMAGES if (folder / IMAGES).is_dir() else folder / "imagesTr"


def _pretraining_plan(suite: Suite, unlabelled: str, workers: int) -> Plan:
    """The plan of the unlabelled dataset, whose volumes are then preprocessed; made where the user has none."""
    file = preprocessed_folder(unlabelled) / f"{_PLANS}.json"
    if not file.is_file():
        extract_fingerprint(unlabelled, Workers(workers))
        plan_experiment(unlabelled, plans_name=_PLANS)
    plan = Plan.load(file)
    failed = preprocess(unlabelled, plan, suite.configuration, Workers(workers))
    if failed:
        raise UserError(f"{len(failed)} unlabelled cases can't be preprocessed: {', '.join(list(failed)[:3])}", file.parent, "mend or remove them")
    return plan if suite.network is None else smaller(plan, suite.configuration, suite.network)


def smaller(plan: Plan, configuration: str, network: Network) -> Plan:
    """The plan with another patch and networks of another size, for as many families as have one."""
    config = plan.configuration(configuration)
    patch_size, spacing = (network.patch,) * 3, config.spacing or (1.0, 1.0, 1.0)
    found = {}
    for family in config.networks:
        made = Planner.families[family](spacing, patch_size, network.size, 1e3, 2)
        if made is not None:
            found[family] = made
    return replace(plan, configurations={configuration: replace(config, patch_size=patch_size, networks=found)})


def _nnunet(pretrained: Pretrained, dataset: str, workers: int) -> None:
    """nnU-Net's fingerprint and preprocessing; all plans of this benchmark share the preprocessed cases."""
    options = PlanOptions(configuration=default_configuration(pretrained))
    handoff = hand_off(pretrained, dataset, options, "nnUNetTrainer", processes=workers)
    run(handoff.preprocess(Machine("cpu", processes=workers)), Machine("cpu", processes=workers))


def _stamps(unlabelled: str, labelled: Sequence[str]) -> str:
    return sha256_json([_stamp(root(FOLDERS[0]) / name) for name in labelled] + [_stamp(preprocessed_folder(unlabelled), "*.json")])


def _stamp(folder: Path, pattern: str = "**/*") -> list[list[Any]]:
    """Names, sizes and times of files: as long as they are the same, so is the content."""
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob(pattern)) if file.is_file()]


def _hashes(folder: Path) -> list[list[str]]:
    return [[str(file.relative_to(folder)), sha256_file(file)] for file in sorted(folder.glob("**/*")) if file.is_file() and not file.name.startswith(".")]
