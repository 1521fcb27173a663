"""A case: the images that are preprocessed and seen together."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.core.paths import root

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
MASKS = ("anonymization_mask", "anatomy_mask")  # fields of nnssl's `associated_masks` and of `Case`
_PREFIX = re.compile(r"\$(nnssl_raw|nnssl_preprocessed)(?=/)")


@dataclass(frozen=True, slots=True)
class Case:
    """One image with all its channels.

    Args:
        identifier: unique in the dataset and fit for a file name.
        subject: whose image it is; a subject's cases stay on one side of a split.
        session: which visit.
        images: one file per channel; `folder#SERIES_UID` and `file.h5#dataset` name a part of a folder or file.
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


def split_selector(path: Path) -> tuple[Path, str]:
    """File or folder and what follows '#': `folder#SERIES_UID`, `file.h5#dataset`; "" without a '#' or where the path with it exists."""
    text = str(path)
    if "#" not in text or path.exists():
        return path, ""
    cuts = [place for place, letter in enumerate(text) if letter == "#"]
    return next(((Path(text[:cut]), text[cut + 1 :]) for cut in reversed(cuts) if Path(text[:cut]).exists()), (Path(text[: cuts[-1]]), text[cuts[-1] + 1 :]))


def resolve(text: str, file: Path) -> Path:
    """An image path with its `$nnssl_raw` prefix replaced; relative paths count from the index `file`."""
    match = _PREFIX.match(text)
    if match:
        return root(match[1]) / text[match.end() + 1 :]
    path = Path(os.path.expandvars(text))
    return path if path.is_absolute() else file.parent / path


def stem(name: str) -> str:
    """A file's name without its ending."""
    for ending in ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def join_name(*parts: object) -> str:
    """An identifier fit for a file name, of at most 180 bytes."""
    name = "__".join(re.sub(r"[^\w.-]", "-", str(part)) for part in parts).lstrip(".") or "case"
    if len(name.encode()) <= 180:
        return name
    return name.encode()[:160].decode(errors="ignore") + "-" + hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
