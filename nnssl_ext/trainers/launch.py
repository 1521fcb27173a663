"""From the words of a command line to a running trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.paths import PREPROCESSED, RAW, dataset_name, preprocessed_folder, results_folder
from nnssl_ext.core.plan import Plan
from nnssl_ext.core.registry import find_class
from nnssl_ext.nn import distributed
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.config import folder_suffix, parse_overrides
from nnssl_ext.trainers.initial import Initial
from nnssl_ext.trainers.replay import replay
from nnssl_ext.trainers.signals import Stopped

ProbeMaker = Callable[[Plan, str], Callable[[], Callable[[Backbone, torch.device], dict[str, float]]]]  # from plan and configuration: what prepares it


@dataclass(frozen=True)
class Run:
    """What to train; see `nnssl_train --help`."""

    dataset: str
    configuration: str
    trainer: str
    plans: str = "nnsslPlans"
    family: str | None = None
    overrides: tuple[str, ...] = ()
    device: str | None = None
    resume: bool = False
    validate_only: bool = False
    replay: int | None = None
    init: str | None = None


def device_of(run: Run) -> str:
    """ "cuda" where there is a card, unless the run says otherwise.

    Raises:
        UserError: it wants a card, and there is none.
    """
    device = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA card is available", "option -device", "use -device cpu, or check the driver with nvidia-smi")
    return device


def make_trainer(run: Run) -> SSLTrainer:
    """The trainer that `run` describes; nothing is written or trained yet.

    Raises:
        UserError: unknown dataset, plans, configuration, trainer, backbone family or hyper-parameter; no preprocessed cases;
            no checkpoint to start from.
    """
    device = device_of(run)
    name = dataset_name(run.dataset, (PREPROCESSED, RAW))
    file = preprocessed_folder(name) / f"{run.plans}.json"
    if not file.is_file():
        raise UserError(f"dataset {name} has no plans '{run.plans}'", file, f"nnssl_plan_and_preprocess -d {run.dataset}")
    plan = Plan.load(file)
    cls = find_class(run.trainer, SSLTrainer, "nnssl_ext.trainers")
    config = cls.Config(**parse_overrides(cls.Config, run.overrides))
    family = run.family or cls.default_family
    plan.configuration(run.configuration).network(family)
    store = CaseStore(preprocessed_folder(name) / plan.configuration(run.configuration).data_identifier)
    init = Initial.open(run.init, begun=run.resume or run.validate_only or run.replay is not None) if run.init else None
    suffix = "_".join(filter(None, [folder_suffix(config, family, cls.default_family), init.tag if init else ""]))
    parts = [run.trainer, run.plans, run.configuration, suffix]
    folder = results_folder(name) / "__".join(filter(None, parts)) / "fold_all"
    trainer = cls(plan, run.configuration, config, store, folder, family=family, device=device)
    trainer.init = init
    return trainer


def start(run: Run, processes: int, command: Sequence[str], probe: ProbeMaker | None = None) -> int:
    """Train (or validate) in this process, or run `command` in several that form one group.

    Args:
        run: what to train.
        processes: in the group.
        command: this very program.
        probe: checks at once that it can be made; see `SSLTrainer.probe`.

    Returns:
        the exit code.
    """
    if processes == 1 or "RANK" in os.environ:
        distributed.end_with_launcher()
        with distributed.group(device_of(run)):
            return _work(run, probe)
    trainer = make_trainer(run)  # every mistake shows before processes are started
    if probe is not None:
        probe(trainer.plan, trainer.configuration)
    if trainer.device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"{processes} cards wanted, {torch.cuda.device_count()} found", "option -num_gpus")
    return distributed.launch(command, processes)


def _work(run: Run, probe: ProbeMaker | None = None) -> int:
    trainer = make_trainer(run)
    if trainer.rank == 0:
        print(f"results: {trainer.folder}")
    if run.replay is not None:
        return 0 if replay(trainer, run.replay) else 1
    if run.validate_only:
        trainer.initialize()
        trainer.load(load_checkpoint(trainer.folder / "checkpoint_best.pth"), trainer.folder)
        print("  ".join(f"{name} {value:.6f}" for name, value in trainer.validate().items()) or "no validation cases (fewer than three subjects)")
        return 0
    if probe is not None and trainer.rank == 0:
        trainer.probe = probe(trainer.plan, trainer.configuration)()
    try:
        trainer.fit(resume=run.resume)
    except Stopped as stopped:
        if trainer.rank == 0:
            print(stopped)
        return stopped.exit_code
    if trainer.rank == 0:
        print(f"done: {trainer.folder / 'checkpoint_final.pth'}")
    return 0
