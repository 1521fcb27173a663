"""Checkpoints: what they hold, written atomically, read with ``weights_only=True``."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nnssl_ext.core.adaptation import AdaptationPlan
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path
from nnssl_ext.core.plan import ConfigPlan
from nnssl_ext.nn.backbones.base import Backbone

FORMAT_VERSION = 1
PRIMUS_PRESETS = {(396, 12, 6): "PrimusS", (792, 12, 12): "PrimusB", (864, 16, 12): "PrimusM", (1056, 24, 16): "PrimusL"}


def adaptation_plan(backbone: Backbone, config: ConfigPlan, configuration: str) -> AdaptationPlan:
    """How to rebuild and feed `backbone` downstream (presets of Primus by their name, everything else by its arguments)."""
    name, kwargs = backbone.class_name.rsplit(".", 1)[-1], backbone.kwargs
    preset = PRIMUS_PRESETS.get((kwargs.get("embed_dim", 0), kwargs.get("eva_depth", 0), kwargs.get("eva_numheads", 0))) if name == "Primus" else None
    if preset is not None and tuple(kwargs["patch_embed_size"]) == (8, 8, 8):
        return AdaptationPlan(preset, None, None, configuration, config.spacing, config.patch_size, backbone.channels, backbone.adaptation())
    return AdaptationPlan(name, kwargs, backbone.imports, configuration, config.spacing, config.patch_size, backbone.channels, backbone.adaptation())


def on_cpu(content: Any, seen: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """`content` with every tensor on the CPU; tensors that share memory (U-Nets alias theirs) are copied once."""
    seen = {} if seen is None else seen
    if isinstance(content, torch.Tensor):
        key = (content.device, content.data_ptr(), content.dtype, tuple(content.shape), content.stride())
        if key not in seen:
            seen[key] = content.detach().cpu()
        return seen[key]
    if isinstance(content, dict):
        return {name: on_cpu(value, seen) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(on_cpu(value, seen) for value in content)
    return content


def save_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """Write a checkpoint: whole or not at all, the former file stays until the new one is on the disk."""
    with atomic_path(path) as temporary:
        torch.save({"format_version": FORMAT_VERSION, **content}, temporary)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint on the CPU; only tensors and plain types are accepted.

    Raises:
        UserError: the file is missing, unreadable, not a checkpoint or of another format version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError("checkpoint not found", path, "give the path of a checkpoint_*.pth") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"the checkpoint can't be read: {reason}", path, "use another checkpoint of the same folder") from None
    if not isinstance(content, dict) or "network_weights" not in content:
        raise UserError("not a pretraining checkpoint (it has no 'network_weights')", path, "give a checkpoint that nnssl_train wrote")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"checkpoint format version {version}, this version reads {FORMAT_VERSION}", path, "use the version of nnssl_ext that wrote it")
    return content
