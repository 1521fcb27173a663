"""Which images belong to a dataset: nnU-Net's raw folder or nnssl's pretrain_data.json -> cases."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.core.paths import root

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
MASKS = ("anonymization_mask", "anatomy_mask")  # fields of nnssl's `associated_masks` and of `Case`
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_PREFIX = re.compile(r"\$(nnssl_raw|nnssl_preprocessed)(?=/)")


@dataclass(frozen=True)
class Case:
    """One image with all its channels.

    Args:
        identifier: unique in the dataset and fit for a file name.
        subject: whose image it is; a subject's cases stay on one side of a split.
        session: which visit.
        images: one file per channel.
        modalities: one name per channel, such as "CT" or "T1w".
        anatomy_mask: file of the body's mask, on the grid of the images; None without one.
        anonymization_mask: file of the mask of removed voxels (a cut-off face), likewise.
    """

    identifier: str
    subject: str
    session: str
    images: tuple[Path, ...]
    modalities: tuple[str, ...]
    anatomy_mask: Path | None = None
    anonymization_mask: Path | None = None


def read_index(folder: Path) -> list[Case]:
    """All cases of a raw dataset folder, sorted by identifier.

    Args:
        folder: holds `pretrain_data.json` (nnssl) or `dataset.json` with `imagesTr/CASE_0000.nii.gz` (nnU-Net).

    Raises:
        UserError: missing or empty folder, neither index present, malformed index, cases of unequal channels.
    """
    if not folder.is_dir():
        raise UserError("dataset folder not found", folder, "put the raw data there")
    if (folder / "pretrain_data.json").is_file():
        cases = _from_pretrain_data(folder / "pretrain_data.json")
    elif (folder / "dataset.json").is_file():
        cases = _from_nnunet(folder)
    else:
        raise UserError(
            "the dataset folder holds neither pretrain_data.json nor dataset.json", folder, "add one; see the folder reference in the documentation"
        )
    if not cases:
        raise UserError("the dataset holds no image", folder, "check its index and its imagesTr folder")
    _check(cases, folder)
    return sorted(cases, key=lambda case: case.identifier)


def _from_nnunet(folder: Path) -> list[Case]:
    description = read_json(folder / "dataset.json")
    names = description.get("channel_names", description.get("modality")) if isinstance(description, dict) else None
    if not isinstance(names, dict) or not names or not all(str(number).isdigit() for number in names):
        raise UserError("dataset.json names no channels by number", folder / "dataset.json", 'add "channel_names": {"0": "CT"}')
    modalities = {int(number): str(name) for number, name in names.items()}
    ending = description.get("file_ending", ".nii.gz")
    channels: dict[str, dict[int, Path]] = defaultdict(dict)
    for subfolder in ("imagesTr", "imagesUn"):
        for path in sorted((folder / subfolder).glob(f"*{ending}")):
            if path.name.startswith("."):  # what macOS and synchronisation tools leave behind
                continue
            match = _CHANNEL.fullmatch(path.name.removesuffix(ending))
            if match is None:
                raise UserError("an image's name does not end in a channel number such as _0000", path, f"rename it to CASE_0000{ending}")
            channels[match[1]][int(match[2])] = path
    wanted = sorted(modalities)
    odd = [f"{case} has {sorted(files)}" for case, files in sorted(channels.items()) if sorted(files) != wanted]
    if odd:
        raise UserError(
            f"dataset.json names the channels {wanted}, {len(odd)} of {len(channels)} cases have others: {_first(odd)}",
            folder,
            "add the missing files or take the cases out",
        )
    return [Case(case, case, "1", tuple(files[i] for i in sorted(files)), tuple(modalities[i] for i in sorted(files))) for case, files in channels.items()]


def _from_pretrain_data(file: Path) -> list[Case]:
    content = read_json(file)
    cases = []
    try:
        for dataset_id, dataset in content["datasets"].items():
            for subject_id, subject in dataset["subjects"].items():
                for session_id, session in subject["sessions"].items():
                    for image in session["images"]:
                        parts = (dataset_id, subject_id, session_id, _stem(image["name"]))
                        path = _resolve(image["image_path"], file)
                        masks = {key: _resolve(mask, file) for key, mask in (image.get("associated_masks") or {}).items() if mask and key in MASKS}
                        cases.append(Case(_identifier(parts), f"{dataset_id}/{subject_id}", str(session_id), (path,), (str(image["modality"]),), **masks))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"pretrain_data.json is malformed: {type(error).__name__} {error}", file, "compare it with the schema in the folder reference"
        ) from None
    return cases


def split_selector(path: Path) -> tuple[Path, str]:
    """File or folder and what follows '#': `folder#SERIES_UID`, `file.h5#dataset`; "" without a '#' or where the path with it exists."""
    text = str(path)
    if "#" not in text or path.exists():
        return path, ""
    cuts = [place for place, letter in enumerate(text) if letter == "#"]
    return next(((Path(text[:cut]), text[cut + 1 :]) for cut in reversed(cuts) if Path(text[:cut]).exists()), (Path(text[: cuts[-1]]), text[cuts[-1] + 1 :]))


def _resolve(text: str, file: Path) -> Path:
    """An image path with its `$nnssl_raw` prefix replaced; relative paths count from the index file."""
    match = _PREFIX.match(text)
    if match:
        return root(match[1]) / text[match.end() + 1 :]
    path = Path(os.path.expandvars(text))
    return path if path.is_absolute() else file.parent / path


def _stem(name: str) -> str:
    for ending in ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def _identifier(parts: tuple[Any, ...]) -> str:
    return "__".join(re.sub(r"[^\w.-]", "-", str(part)) for part in parts)


def _check(cases: list[Case], folder: Path) -> None:
    twice = [name for name, count in Counter(case.identifier for case in cases).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} identifiers are used twice: {_first(twice)}", folder, "give the images of a session distinct names")


def _first(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
