"""Shares a checkpoint: a folder with safetensors, model card and JSON, or a model of the Hugging Face Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.finetuning.model_card import UNKNOWN, model_card
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.model_folder import ABOUT, PRETRAINING, about_model, hub, refused, repository, transport, write_model

CURVES, VIEWS = "progress.png", "views.png"
_LARGEST = 2_000_000  # bytes of a picture


def share(checkpoint: Path | str, target: str, licence: str = UNKNOWN, heads: bool = False, pictures: bool = False) -> str:
    """Write a checkpoint as a folder, or upload it.

    Args:
        checkpoint: what `load_checkpoint` takes.
        target: folder, or hf://owner/name: there a new model is private until its owner publishes it.
        licence: for the card.
        heads: also the whole model of the pretraining, for `-init` with the same method.
        pictures: also the run's last picture, which shows training images; the curves are always taken along.

    Returns:
        the folder, or the address of the model.

    Raises:
        UserError: not a checkpoint; the target holds something else; the Hub refuses.
    """
    pretrained = Pretrained.load(checkpoint)
    content = load_checkpoint(pretrained.path)
    found = repository(target)
    name = found and found[0]
    run = _run(pretrained.path.parent, content)
    files = _pictures(pretrained.path.parent, pictures) if run else {}
    card = model_card(pretrained, content, run, _records(pretrained.path.parent) if run else [], licence, name, files)
    files["README.md"] = card.encode()
    if found is None:
        write_model(Path(target), content, files, heads)
        for former in {CURVES, VIEWS} - files.keys():
            (Path(target) / former).unlink(missing_ok=True)
        return target
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(folder, content, files, heads)
        return _upload(folder, *found)


def _run(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """run.json beside a checkpoint; empty where it is missing or speaks of another run."""
    file = folder / "run.json"
    run = read_json(file) if file.is_file() else {}
    same = run.get("trainer") == content["trainer_name"] and run.get("data_hash") == content.get("data_hash")
    return dict(run) if same else {}


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()] if file.is_file() else []


def _pictures(folder: Path, views: bool) -> dict[str, bytes]:
    """Small pictures of a run by the names that they get."""
    wanted = {CURVES: folder / CURVES}
    drawn = sorted((folder / "pictures").glob("epoch_*.png"))
    if views and drawn:
        wanted[VIEWS] = drawn[-1]
    return {name: file.read_bytes() for name, file in wanted.items() if file.is_file() and file.stat().st_size <= _LARGEST}


def _upload(folder: Path, name: str, revision: str | None) -> str:
    package, where = hub(), f"hf://{name}"
    api = package.HfApi()
    try:
        address = str(api.create_repo(name, private=True, exist_ok=True, repo_type="model"))
        if api.file_exists(name, ABOUT, revision=revision):
            _check_ours(Path(api.hf_hub_download(name, ABOUT, revision=revision)), where)
        former = [CURVES, VIEWS, PRETRAINING]  # of an earlier upload; what is uploaded now stays
        api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message="Model of nnssl_ext", repo_type="model", delete_patterns=former)
    except (OSError, ValueError, package.errors.HfHubHTTPError, *transport()) as error:
        raise refused(error, where, "upload") from None
    return address


def _check_ours(config: Path, where: str) -> None:
    try:
        about_model(config.parent)
    except UserError:
        raise UserError("the model on the Hub is not one of nnssl_ext; it stays as it is", where, "give another name") from None
