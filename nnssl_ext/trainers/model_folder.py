"""A model to be shared: a folder with the weights as safetensors and what the checkpoint says as JSON, here or on the Hugging Face Hub.

Nothing in it is unpickled, and no name of a file is taken from its content.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, read_json, sha256_file, write_json

FORMAT, FORMAT_VERSION = "nnssl_ext model", 1
ABOUT, MODEL, PRETRAINING = "config.json", "model.safetensors", "pretraining.safetensors"
_WEIGHTS = {"network_weights": MODEL, "ssl_state": PRETRAINING}  # files by the fields of a checkpoint
_DESCRIBED = ("format_version", "trainer_name", "family", "configuration", "transfer", "nnssl_adaptation_plan", "citations")
_KEPT = (*_DESCRIBED, "config", "plan", "versions", "data_hash", "step", "init")
_REPOSITORY = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")  # `Path` makes one slash of two
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_FILE = {
    "type": "object",
    "properties": {"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "aliases": _TEXTS},
    "required": ["sha256", "aliases"],
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "format": {"const": FORMAT},
        "format_version": {"const": FORMAT_VERSION},
        "checkpoint": {"type": "object"},
        "weights": {"type": "object", "propertyNames": {"enum": list(_WEIGHTS.values())}, "required": [MODEL], "additionalProperties": _FILE},
    },
    "required": ["format", "format_version", "checkpoint", "weights"],
}


def repository(given: Path | str) -> tuple[str, str | None] | None:
    """Name and revision (or None) of `hf://owner/name[@revision]`; None for everything else.

    Raises:
        UserError: it begins like one and is none.
    """
    text = str(given)
    if not text.startswith("hf:"):
        return None
    match = _REPOSITORY.fullmatch(text)
    if match is None or ".." in text:
        raise UserError("not the name of a model on the Hugging Face Hub", text, "write hf://owner/name or hf://owner/name@revision")
    return match[1], match[2]


def locate(given: Path | str) -> Path:
    """Where a checkpoint lies: a file, or the folder of a shared model, which is downloaded into huggingface_hub's cache where its name begins with hf://.

    Raises:
        UserError: it can't be downloaded.
    """
    found = repository(given)
    if found is None:
        return Path(given)
    name, revision = found
    api = hub()
    try:
        return Path(api.snapshot_download(name, revision=revision, allow_patterns=[ABOUT, *_WEIGHTS.values()]))
    except (OSError, ValueError, api.errors.HfHubHTTPError, *transport()) as error:
        raise refused(error, f"hf://{name}", "download") from None


def refused(error: Exception, where: str, what: str) -> UserError:
    """What went wrong between this machine and the Hub, in one sentence."""
    reasons = {
        "RepositoryNotFoundError": ("there is no such model, or it is private", "check the name; for a private one: hf auth login"),
        "GatedRepoError": ("its owner grants access on request", "ask for access on its page, then: hf auth login"),
        "RevisionNotFoundError": ("it has no such revision", "give a branch, tag or commit that its page lists"),
        "LocalEntryNotFoundError": ("the Hub can't be reached, and the model is not in the cache", "connect once, or give a folder"),
        "LocalTokenNotFoundError": ("you are not logged in", "hf auth login"),
        "OfflineModeIsEnabled": ("HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE"),
    }
    for cls in type(error).__mro__:
        if cls.__name__ in reasons:
            reason, fix = reasons[cls.__name__]
            break
    else:
        reason, fix = " ".join(str(error).split())[:160] or type(error).__name__, "check the connection and the name; for a private one: hf auth login"
    return UserError(f"could not {what} the model: {reason}", where, fix)


def hub() -> Any:
    """The package huggingface_hub, which takes seconds to import and is needed for hf:// alone.

    Raises:
        UserError: it is not installed.
    """
    try:
        importlib.import_module("huggingface_hub.errors")
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError("hf:// needs the package huggingface_hub", "", "pip install huggingface_hub") from None


def transport() -> tuple[type[Exception], ...]:
    """The errors of the connection itself; those of `requests`, in earlier versions of huggingface_hub, are `OSError`s."""
    try:
        return (importlib.import_module("httpx").HTTPError,)
    except ImportError:
        return ()


def about_model(folder: Path) -> dict[str, Any]:
    """The checked content of a shared model's config.json.

    Raises:
        UserError: the folder holds no model, or one of another version.
    """
    if not (folder / ABOUT).is_file():
        raise UserError(f"the folder holds no shared model (it has no {ABOUT})", folder, "give a checkpoint_*.pth, or a folder that nnssl_export --hub wrote")
    content = read_json(folder / ABOUT)
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_SCHEMA).iter_errors(content))
    if error is not None:
        field = "/".join(map(str, error.absolute_path)) or "top level"
        raise UserError(f"not a shared model of nnssl_ext: {field}: {error.message[:160]}", folder / ABOUT, "give a folder that nnssl_export --hub wrote")
    return dict(content)


def model_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a checkpoint's file, of a shared model that of its weights."""
    return sha256_file(path / MODEL if path.is_dir() else path)


def read_model(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint that a folder shares: tensors (aliases share memory as in the checkpoint) and plain types.

    Raises:
        UserError: no shared model, or files that are missing or not those that config.json speaks of.
    """
    about = about_model(folder)
    content = dict(about["checkpoint"])
    for field, name in _WEIGHTS.items():
        if name in about["weights"]:
            content[field] = _read(folder / name, **about["weights"][name])
    return content


def _read(file: Path, sha256: str, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"the model lacks {file.name}", file.parent, "download or export it again")
    if sha256_file(file) != sha256:
        raise UserError("the weights are not those that config.json speaks of (SHA-256 differs)", file, "download or export them again")
    try:
        tensors: dict[str, Tensor] = load_file(file)
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"the weights can't be read: {str(error)[:120]}", file, "download or export them again") from None


def write_model(folder: Path, content: Mapping[str, Any], files: Mapping[str, bytes], heads: bool = False) -> None:
    """Share a checkpoint as a folder; a new one is in place only when it is whole, in an earlier one config.json comes last.

    Args:
        folder: new, empty, or an earlier model of this function.
        content: of the checkpoint.
        files: what else belongs into it, such as a model card.
        heads: also the whole model of the pretraining.

    Raises:
        UserError: the folder holds something else.
        DiskError: the disk is full, read-only or failing.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir() or folder.is_dir() and any(folder.iterdir()):
        _check_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        weights = {name: _write(temporary / name, content[field]) for field, name in _WEIGHTS.items() if field in content and (heads or name == MODEL)}
        for name, data in files.items():
            with atomic_path(temporary / name) as path:
                path.write_bytes(data)
        kept = {key: content[key] for key in _KEPT if key in content}
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "nnssl_ext": __version__}
        write_json(temporary / ABOUT, header | {"weights": weights, "checkpoint": json.loads(json.dumps(kept))})
        if not folder.exists() or not any(folder.iterdir()):
            temporary.chmod(0o755)
            os.replace(temporary, folder)
            return
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == ABOUT, path.name)):
            os.replace(path, folder / path.name)
        for name in set(_WEIGHTS.values()) - weights.keys():
            (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_ours(folder: Path) -> None:
    try:
        about_model(folder)
    except UserError as error:
        raise UserError(f"the folder holds something else, which stays: {error.what}", folder, "give a new folder") from None


def _write(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the tensors, those of several names once; what config.json says of the file."""
    names: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, value in tensors.items():
        first = names.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name, name)
        if first != name:
            aliases[name] = first
    with atomic_path(file) as path:
        save_file({name: tensors[name].detach().cpu().clone().contiguous() for name in names.values()}, path, metadata={"format": "pt"})
    return {"sha256": sha256_file(file), "aliases": aliases}
