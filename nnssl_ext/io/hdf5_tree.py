"""A tree `SUBJECT/SESSION/image.hdf5` -> cases."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from nnssl_ext.core.errors import ImageError
from nnssl_ext.io import hdf5
from nnssl_ext.io.case import Case, join_name
from nnssl_ext.io.table import UNKNOWN
from nnssl_ext.io.tree import scan_tree

MODALITY = ("modality", "Modality")  # attributes of the dataset, its groups or the file


def read_hdf5_tree(folder: Path, cache: Path | None = None, processes: int = 1) -> list[Case]:
    """A case per file: the first folder is the subject, the second the session, the attribute `modality` the modality.

    Args:
        folder, cache, processes: as for `scan_tree`.

    Raises:
        UserError: h5py is not installed.
    """
    hdf5.require_h5py()
    cases, unnamed = [], 0
    for place, files in scan_tree(folder, scan, "hdf5 1", cache, processes).items():
        for name, modality in files:
            *folders, file = (Path(place) / name).parts
            subject, session = folders[0] if folders else Path(file).stem, folders[1] if len(folders) > 1 else "1"
            unnamed += not modality
            cases.append(Case(join_name(*folders, Path(file).stem), subject, session, (folder / place / name,), (modality or UNKNOWN,)))
    if unnamed:
        print(f"{folder.name}: {unnamed} of {len(cases)} HDF5 files have no attribute 'modality' and count as '{UNKNOWN}' (normalised by z-score)")
    return cases


def scan(folder: Path) -> list[tuple[str, str]]:
    """Names and modalities ("" without one) of the HDF5 files of a folder; defects are found when the files are read."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(hdf5.ENDINGS) and not entry.name.startswith("."))
    found = defaultdict(str)
    for name in names:
        try:
            value = hdf5.attribute(folder / name, "", MODALITY)
            found[name] = value.decode() if isinstance(value, bytes) else str(value or "")
        except (ImageError, OSError, UnicodeDecodeError):
            pass
    return [(name, found[name]) for name in names]
