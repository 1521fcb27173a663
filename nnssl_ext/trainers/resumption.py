"""From a trainer to the content of a checkpoint and back, so that a run continues as if it had never stopped."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn import parallel
from nnssl_ext.trainers.checkpoint import adaptation_plan, load_latest, on_cpu
from nnssl_ext.trainers.config import as_plain, speed_only
from nnssl_ext.trainers.initial import Initial

if TYPE_CHECKING:
    from nnssl_ext.trainers.base import SSLTrainer

VERSIONS = ("nnssl_ext", "torch", "timm", "dynamic_network_architectures")


def content_of(trainer: SSLTrainer) -> dict[str, Any]:
    """Content of a checkpoint; plain types and tensors, no patient metadata."""
    name, decoder = type(trainer).__name__, trainer.trains_decoder and trainer.transfers_decoder and "decoder" in trainer.backbone.supports
    tensors = {"weights": trainer.transferred().network_weights(), "model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    tensors = on_cpu(parallel.whole(tensors))
    return {
        "trainer_name": name,
        "family": trainer.family,
        "configuration": trainer.configuration,
        "transfer": "encoder+decoder" if decoder else "encoder",
        "network_weights": tensors["weights"],
        "nnssl_adaptation_plan": adaptation_plan(trainer.backbone, trainer.config_plan, trainer.configuration).as_dict(),
        "citations": [{"type": "Pretraining method", "name": name, "apa_citations": [trainer.citation]}] if trainer.citation else [],
        "ssl_state": tensors["model"],
        "optimizer_state": tensors["optimizer"],
        "scaler_state": trainer.update.scaler.state_dict(),
        "guard_state": trainer.guard.state(),
        "health_state": on_cpu(trainer.health.state_dict()),
        "init": trainer.init.identity if trainer.init else None,
        "step": trainer.next_step,
        "sums": dict(trainer.sums),
        "best": trainer.best,
        "config": as_plain(trainer.config),
        "plan": trainer.plan.as_dict(),
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "data_hash": trainer.store.data_hash(),
    }


def begin(trainer: SSLTrainer, resume: bool) -> None:
    """Continue an initialised trainer from checkpoint_latest, or see that it begins in a new folder, from the weights of an earlier run where it has them.

    Raises:
        UserError: there is nothing to continue, or something to continue; weights that don't fit.
    """
    if resume:
        trainer.load(load_latest(trainer.folder), trainer.folder)
    elif (trainer.folder / "checkpoint_latest.pth").exists():
        raise UserError("the results folder already holds a run", trainer.folder, "continue it with --c, or move the folder away")
    elif trainer.init is not None:
        trainer.init.fill(trainer)


def restore(trainer: SSLTrainer, content: dict[str, Any], path: Path) -> None:
    """Take model, optimiser and position from the content of a checkpoint of this very run.

    Raises:
        UserError: it is one of another method, configuration or hyper-parameters.
    """
    config = as_plain(trainer.config)
    other = [key for key, value in config.items() if content["config"].get(key, value) != value and key not in speed_only(trainer.config)]
    if (content["trainer_name"], content["family"], content["configuration"]) != (type(trainer).__name__, trainer.family, trainer.configuration) or other:
        differs = ", ".join(other) or "trainer, backbone or configuration"
        raise UserError(f"the checkpoint is of another run (differs in: {differs})", path, "repeat the options of that run")
    if content["data_hash"] != trainer.store.data_hash() and trainer.rank == 0:
        print("warning: the preprocessed data changed since this checkpoint; the run will differ from an uninterrupted one")
    parallel.load(trainer.model, trainer.optimizer, content["ssl_state"], content["optimizer_state"])
    trainer.update.scaler.load_state_dict(content["scaler_state"])
    trainer.guard.load(content["guard_state"])
    trainer.health.load_state_dict(content["health_state"])
    trainer.init = Initial(content["init"]) if content.get("init") else None
    trainer.next_step, trainer.sums, trainer.best = content["step"], dict(content["sums"]), content["best"]
