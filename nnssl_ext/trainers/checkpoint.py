"""Checkpoints: what they hold, written atomically, read with ``weights_only=True``."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nnssl_ext.core.adaptation import AdaptationPlan
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path
from nnssl_ext.core.plan import ConfigPlan
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.trainers.model_folder import locate, read_model

FORMAT_VERSION = 1
_MARK = b"nnssl sha256 "
_COMMENT_BYTES = len(_MARK) + 64
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


def save_checkpoint(path: Path | str, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint: whole or not at all, the former file stays until the new one is on the disk.

    The file is an ordinary one of PyTorch; the comment of its zip archive holds the SHA-256 of all that precedes it.

    Args:
        path: the file.
        content: tensors and plain types.
        previous: keeps the former file under this name.

    Raises:
        DiskError: the disk is full, read-only or failing; the former file stays.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        _write({"format_version": FORMAT_VERSION, **content}, temporary)
        with open(temporary, "rb+") as file:
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", _COMMENT_BYTES))
            file.seek(0)
            digest = _sha256(file, file.seek(0, os.SEEK_END))
            file.write(_MARK + digest.encode())
        if previous is not None and path.exists():
            with atomic_path(previous) as link:
                link.unlink()
                try:
                    os.link(path, link)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, link)


def _write(content: dict[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides it behind one of its own
            raise error.__context__ from None
        raise


def load_checkpoint(path: Path | str, foreign: bool = False) -> dict[str, Any]:
    """Read a checkpoint on the CPU; only tensors and plain types are accepted.

    Args:
        path: the file; or the folder of a shared model, or its name on the Hugging Face Hub, `hf://owner/name[@revision]`.
        foreign: accept also one of nnssl, which has no format version.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint or of another format version.
    """
    path = locate(path)
    content = read_model(path) if path.is_dir() else _load(path)
    if not isinstance(content, dict) or "network_weights" not in content:
        raise UserError("not a pretraining checkpoint (it has no 'network_weights')", path, "give a checkpoint that nnssl_train wrote")
    version = content.get("format_version")
    if version != FORMAT_VERSION and not (foreign and version is None):
        raise UserError(f"checkpoint format version {version}, this version reads {FORMAT_VERSION}", path, "use the version of nnssl_ext that wrote it")
    return content


def _load(path: Path) -> Any:
    if path.is_file():
        _check_hash(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError("checkpoint not found", path, "give the path of a checkpoint_*.pth, or hf://owner/name for a model of the Hugging Face Hub") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"the checkpoint can't be read: {reason}", path, "use another checkpoint of the same folder") from None


def load_latest(folder: Path) -> dict[str, Any]:
    """checkpoint_latest.pth of a run, or checkpoint_previous.pth where that one is damaged.

    Raises:
        UserError: neither can be read.
    """
    latest, previous = folder / "checkpoint_latest.pth", folder / "checkpoint_previous.pth"
    if not latest.exists():
        return load_checkpoint(previous if previous.exists() else latest)
    try:
        return load_checkpoint(latest)
    except UserError as error:
        if not previous.exists():
            raise
        content = load_checkpoint(previous)
        print(f"warning: {error.what}; continuing from {previous.name}, step {content['step']}")
        return content


def _check_hash(path: Path) -> None:
    """Compare the file with the hash in its comment; a file without any comment (of another program) passes."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT_BYTES))
        comment = file.read()
        if comment.startswith(_MARK):
            sound = _sha256(file, size - _COMMENT_BYTES) == comment[len(_MARK) :].decode("ascii", "replace")
        else:
            sound = comment[-22:-18] == b"PK\x05\x06" and comment.endswith(b"\0\0")
    if not sound:
        raise UserError("the checkpoint can't be read: it is damaged", path, "use another checkpoint of the same folder")


def _sha256(file: BinaryIO, count: int) -> str:
    """Of the first `count` bytes; leaves the position behind them."""
    digest = hashlib.sha256()
    file.seek(0)
    while count > 0 and (block := file.read(min(count, 1 << 20))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()
