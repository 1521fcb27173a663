"""A BIDS tree -> cases: the 3D images of `sub-*/[ses-*/]DATATYPE/`.

Source: Brain Imaging Data Structure specification 1.10 (bids-specification.readthedocs.io).
"""

from __future__ import annotations

import os
from pathlib import Path

from nnssl_ext.io.case import Case, stem

_SAME = ("T1w", "T2w", "FLAIR", "PDw", "T2starw", "UNIT1", "angio", "inplaneT1", "inplaneT2")
MODALITIES = {suffix: suffix for suffix in _SAME} | {"ct": "CT", "CT": "CT", "pet": "PET", "PET": "PET"}
"""Suffixes that are read, with their modalities; all others (functional, diffusion, masks, segmentations, maps) are not."""
_ENDINGS = (".nii.gz", ".nii")
_PARTS = ("part-phase", "part-real", "part-imag")  # no magnitude image


def is_bids(folder: Path) -> bool:
    """Whether a folder describes itself as BIDS or holds subjects by BIDS' names."""
    return (folder / "dataset_description.json").is_file() or any(_folders(folder, "sub-"))


def read_bids(folder: Path) -> list[Case]:
    """A case for every image of `MODALITIES`; `derivatives/`, `sourcedata/` and whatever else is not below `sub-*` is ignored."""
    cases = []
    for subject in _folders(folder, "sub-"):
        visits = [(name, folder / subject / name) for name in _folders(folder / subject, "ses-")]
        for session, place in [("1", folder / subject), *visits]:
            cases += [case for kind in _folders(place) if not kind.startswith("ses-") for case in _images(place / kind, subject, session)]
    return cases


def _images(folder: Path, subject: str, session: str) -> list[Case]:
    found = []
    for name in sorted(os.listdir(folder)):
        suffix = stem(name).rpartition("_")[2]
        if not name.startswith(".") and name.endswith(_ENDINGS) and suffix in MODALITIES and not any(part in name.split("_") for part in _PARTS):
            found.append(Case(stem(name), subject, session, (folder / name,), (MODALITIES[suffix],)))
    return found


def _folders(folder: Path, start: str = "") -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.startswith(start) and not entry.name.startswith(".") and entry.is_dir())
