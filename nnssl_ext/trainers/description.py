"""run.json: what a run is, enough to repeat it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnssl_ext.trainers.config import as_plain

if TYPE_CHECKING:
    from nnssl_ext.trainers.base import SSLTrainer

PACKAGES = ("nnssl_ext", "torch", "timm", "dynamic_network_architectures", "numpy", "nnunetv2")


def describe(trainer: SSLTrainer) -> dict[str, Any]:
    """Method, data, plan, settings and versions of an initialised trainer, in JSON types."""
    overrides = changed(trainer.config)
    run = {
        "trainer": type(trainer).__name__,
        "family": trainer.family,
        "configuration": trainer.configuration,
        "dataset": trainer.plan.dataset_name,
        "plans": trainer.plan.plans_name,
        "name": trainer.folder.parent.name,
        "data_hash": trainer.store.data_hash(),
        "fingerprint_sha256": trainer.plan.fingerprint_sha256,
        "patch_size": list(trainer.config_plan.patch_size),
        "spacing": None if trainer.config_plan.spacing is None else list(trainer.config_plan.spacing),
        "cases": {"train": len(trainer.train_cases), "validation": len(trainer.val_cases)},
        "config": as_plain(trainer.config),
        "overrides": overrides,
        "recipe": dataclasses.asdict(trainer.recipe),
        "derived": dataclasses.asdict(trainer.settings) if trainer.settings else {},
        "batch_size": trainer.batch_size,
        "processes": trainer.ranks,
        "device": trainer.device.type,
        "init": trainer.init.identity if trainer.init else None,
        "probe": getattr(trainer.probe, "dataset", None),
        "total_steps": trainer.total_steps,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "versions": {"python": platform.python_version()} | {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    return run | {"command": command(run, default_family=trainer.default_family)}


def changed(config: Any) -> dict[str, Any]:
    """The hyper-parameters that differ from their defaults, in JSON types."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in as_plain(config).items() if getattr(config, name) != defaults[name]}


def command(run: Mapping[str, Any], default_family: str) -> str:
    """The command line that starts this run; with --c it continues it."""
    number = re.fullmatch(r"Dataset0*(\d+)_.+", run["dataset"])
    words = ["nnssl_train", number[1] if number else run["dataset"], run["configuration"], "-tr", run["trainer"]]
    words += ["-p", run["plans"]] if run["plans"] != "nnsslPlans" else []
    words += ["-b", run["family"]] if run["family"] != default_family else []
    words += ["-init", run["init"]["file"]] if run.get("init") else []
    words += ["-num_gpus", str(run["processes"])] if run["processes"] > 1 else []
    words += ["-probe", run["probe"]] if run.get("probe") else []
    words += ["-device", "cpu"] if run["device"] == "cpu" else []
    words += ["-o", *(f"{key}={_text(value)}" for key, value in run["overrides"].items())] if run["overrides"] else []
    return shlex.join(words)


def _text(value: Any) -> str:
    """A value as `-o` reads it."""
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)
