"""The hand-off as a whole: plan and weights for a dataset, then nnU-Net's own console programs as child processes."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.core.paths import dataset_name, root
from nnssl_ext.finetuning.export import TRAINER_FOLDER, ExportReport, export_nnunet, find_trainer, with_our_trainers
from nnssl_ext.finetuning.plans import PlanOptions, dataset_number, is_preprocessed, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.finetuning.subsets import nested_subset, training_cases
from nnssl_ext.finetuning.trainers import LabelSubset

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
Command = tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """Where nnU-Net runs.

    Args:
        device: "cpu" or "cuda".
        num_gpus: for training.
        processes: worker processes of fingerprint, preprocessing and prediction.
    """

    device: str = "cuda"
    num_gpus: int = 1
    processes: int = 1


@dataclass(frozen=True)
class Handoff:
    """What was written for nnU-Net.

    Args:
        dataset: `DatasetXXX_NAME`.
        plans: the plans file.
        weights: the file for `-pretrained_weights`; None: train from scratch.
        configuration: name of nnU-Net's configuration.
        trainer: name of nnU-Net's trainer class.
        report: what became of each tensor.
    """

    dataset: str
    plans: Path
    weights: Path | None
    configuration: str
    trainer: str
    report: ExportReport

    def preprocess(self, machine: Machine) -> Command:
        number, workers = str(dataset_number(self.dataset)), str(machine.processes)
        return ("nnUNetv2_preprocess", "-d", number, "-plans_name", self.plans.stem, "-c", self.configuration, "-np", workers)

    def train(self, machine: Machine, fold: str) -> Command:
        gpus = ("-num_gpus", str(machine.num_gpus)) if machine.num_gpus > 1 else ()
        model = (self.dataset, self.configuration, fold, *self._model)
        weights = () if self.weights is None else ("-pretrained_weights", str(self.weights))
        return ("nnUNetv2_train", *model, "-device", machine.device, *gpus, *weights)

    def predict(self, machine: Machine, fold: str, images: Path, out: Path) -> Command:
        workers = ("-npp", str(machine.processes), "-nps", str(machine.processes))
        where = ("-d", self.dataset, "-c", self.configuration, "-f", fold, "-device", machine.device)
        return ("nnUNetv2_predict", "-i", str(images), "-o", str(out), *where, *self._model, *workers)

    @property
    def results(self) -> Path:
        """nnU-Net's folder of the trained model."""
        return root("nnUNet_results") / self.dataset / f"{self.trainer}__{self.plans.stem}__{self.configuration}"

    @property
    def _model(self) -> Command:
        return ("-tr", self.trainer, "-p", self.plans.stem)


def downstream_dataset(identifier: str) -> str:
    """`DatasetXXX_NAME` of a downstream dataset in `$nnUNet_raw`.

    Raises:
        UserError: a folder variable of nnU-Net is not set, or the dataset is unknown.
    """
    for variable in FOLDERS:
        root(variable)
    return dataset_name(identifier, ("nnUNet_raw",))


def hand_off(pretrained: Pretrained, dataset: str, options: PlanOptions, trainer: str, out: Path | None = None, processes: int = 1, fold: str = "0") -> Handoff:
    """Write plan and weights of a checkpoint for a downstream dataset.

    Args:
        pretrained: the checkpoint.
        dataset: `DatasetXXX_NAME` in `$nnUNet_raw`.
        options: of the plan.
        trainer: name of nnU-Net's trainer class that will take the weights.
        out: folder of the weights; default: beside the plan.
        processes: workers for nnU-Net's fingerprint, where that is missing.
        fold: that is to be trained; it must have the labelled cases that `options` want.
    """
    found = find_trainer(trainer)  # a wrong name ends here, before anything is computed or written
    _check_dataset_json(root("nnUNet_raw") / dataset / "dataset.json")
    if options.cases is not None:
        _check_cases(found, dataset, fold, options.cases)
    if not (root("nnUNet_preprocessed") / dataset / "dataset_fingerprint.json").is_file():
        run(("nnUNetv2_extract_fingerprint", "-d", str(dataset_number(dataset)), "-np", str(processes)), Machine(processes=processes))
    plans = write_plans(pretrained, dataset, options)
    weights = (out or plans.parent) / f"{plans.stem}__{trainer}.pth"
    report = export_nnunet(pretrained, plans, options.configuration, weights, trainer)
    return Handoff(dataset, plans, weights.absolute(), options.configuration, trainer, report)


def next_commands(handoff: Handoff, machine: Machine, fold: str = "0") -> str:
    """The commands that fine-tune, as lines for a shell."""
    lines = []
    if handoff.trainer.startswith("nnssl"):
        lines.append(f'export nnUNet_extTrainer="${{nnUNet_extTrainer:+$nnUNet_extTrainer{os.pathsep}}}"{shlex.quote(str(TRAINER_FOLDER))}')
    if not is_preprocessed(handoff.plans, handoff.configuration):
        lines.append(shlex.join(handoff.preprocess(machine)))
    lines.append(shlex.join(handoff.train(machine, fold)))
    return "\n".join(lines)


def finetune(handoff: Handoff, machine: Machine, fold: str = "0", resume: bool = False) -> None:
    """Preprocess (unless done), train, and, where the dataset has them, predict and evaluate the test images.

    Args:
        handoff: plan and weights.
        machine: where to run.
        fold: "0" to "4", or "all".
        resume: continue a training that was stopped.

    Raises:
        UserError: one of nnU-Net's programs failed.
    """
    if not is_preprocessed(handoff.plans, handoff.configuration):
        run(handoff.preprocess(machine), machine)
    run((*replace(handoff, weights=None).train(machine, fold), "--c") if resume else handoff.train(machine, fold), machine)
    raw = root("nnUNet_raw") / handoff.dataset
    images, labels, out = raw / "imagesTs", raw / "labelsTs", handoff.results / f"imagesTs_fold_{fold}"
    if not images.is_dir() or not any(images.iterdir()):
        print(f"the dataset has no test images; results: {handoff.results / f'fold_{fold}'}")
        return
    run(handoff.predict(machine, fold, images, out), machine)
    if labels.is_dir() and any(labels.iterdir()):
        files = ("-djfile", str(handoff.results / "dataset.json"), "-pfile", str(handoff.results / "plans.json"))
        run(("nnUNetv2_evaluate_folder", str(labels), str(out), *files, "-o", str(out / "summary.json"), "-np", str(machine.processes), "--chill"), machine)
    print(f"predictions: {out}")


def run(command: Sequence[str], machine: Machine) -> None:
    """Run one of nnU-Net's console programs of this Python environment, with our trainers findable; its output passes through.

    Raises:
        UserError: the program is missing, or it did not end well.
    """
    text = shlex.join(command)
    print(f"$ {text}", flush=True)
    code = subprocess.run([_program(command[0]), *command[1:]], env=environment(machine), check=False).returncode
    if code:
        how = f"was stopped by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"{command[0]} {how}", text, "see its messages above, mend the cause and run the same command again")


def environment(machine: Machine) -> dict[str, str]:
    """Environment variables of nnU-Net's programs; what the user has set wins, `nnUNet_extTrainer` is extended."""
    defaults = {"nnUNet_def_n_proc": str(machine.processes)}
    if machine.device == "cpu":
        defaults["nnUNet_n_proc_DA"] = "0"  # augmentation in the training process: workers would take the same cores
    return {**defaults, **os.environ, "nnUNet_extTrainer": with_our_trainers(os.environ.get("nnUNet_extTrainer"))}


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise UserError(f"the program {name} is not installed", sys.executable, "pip install nnunetv2")
    return found


def _check_cases(trainer: type, dataset: str, fold: str, wanted: int | float) -> None:
    if not issubclass(trainer, LabelSubset):
        raise UserError(f"{trainer.__name__} trains on all labelled cases", "options -n and -ratio", "take a trainer of ours (-tr nnsslResEncTrainer, ...)")
    cases = training_cases(dataset, fold)
    print(f"labelled cases for training: {len(nested_subset(cases, wanted))} of {len(cases)} of fold {fold}")


def _check_dataset_json(file: Path) -> None:
    content = read_json(file)
    missing = [key for key in ("labels", "numTraining", "file_ending") if key not in content]
    if missing or not ("channel_names" in content or "modality" in content):
        lacks = ", ".join(missing) or "channel_names"
        raise UserError(f"not a dataset.json of nnU-Net v2: it lacks {lacks}", file, "see nnU-Net's documentation of the dataset format")
