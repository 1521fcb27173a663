"""What a store's reader needs of every case, as columns: 100,000 cases open in a fraction of a second.

The case files are the truth; the index is a cache beside their folder. It counts only while the folder's time of change
is the recorded one: any file that was added, replaced or removed since makes it stale.
"""

from __future__ import annotations

import os
import time
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, read_json

SCHEMA_VERSION = 2
_TICK_S = 0.05  # file systems may give two changes within so much time the same stamp


@dataclass(frozen=True)
class StoreIndex:
    """One row per case, sorted by identifier.

    Args:
        identifiers: names of the cases, unicode (N,).
        subjects: whose they are, unicode (N,).
        shapes: voxels (z, y, x), int32 (N, 3).
        fill: normalised background of each channel, float32 (N, C).
        scale, offset: stored value * scale + offset is the normalised intensity, float32 (N, C).
        sizes: bytes of the array's file, int64 (N,).
        sha256: of the array's file, hexadecimal in ASCII (N,).
    """

    identifiers: np.ndarray
    subjects: np.ndarray
    shapes: np.ndarray
    fill: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    sizes: np.ndarray
    sha256: np.ndarray


def load_index(folder: Path) -> StoreIndex:
    """The index of a folder of cases: the cached one, or one made from the cases' JSON files (and cached, where that is possible).

    Raises:
        UserError: a case of another schema version, or cases of unequal numbers of channels.
    """
    cached = _cached(folder)
    if cached is not None:
        return cached
    stamp = folder.stat().st_mtime_ns
    index = _read(folder)
    while time.time_ns() - stamp < _TICK_S * 1e9:
        time.sleep(_TICK_S)
    if folder.stat().st_mtime_ns == stamp:
        _save(folder, index, stamp)
    return index


def index_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".index.npz")


def _cached(folder: Path) -> StoreIndex | None:
    try:
        with np.load(index_file(folder), allow_pickle=False) as content:
            if [int(n) for n in content["stamp"]] != [SCHEMA_VERSION, folder.stat().st_mtime_ns]:
                return None
            return StoreIndex(**{column.name: content[column.name] for column in fields(StoreIndex)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(folder: Path, index: StoreIndex, stamp: int) -> None:
    try:
        with atomic_path(index_file(folder)) as temporary, open(temporary, "wb") as file:
            np.savez(file, stamp=np.array([SCHEMA_VERSION, stamp]), **{column.name: getattr(index, column.name) for column in fields(StoreIndex)})
    except (OSError, UserError):  # a read-only folder: the next reader makes it again
        pass


def _read(folder: Path) -> StoreIndex:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".json") and not entry.name.startswith("."))
    rows = [_row(folder / name) for name in names]
    channels = {len(row[2]) for row in rows}
    if len(channels) > 1:
        odd = names[[len(row[2]) for row in rows].index(max(channels))]
        raise UserError(f"cases of {min(channels)} and {max(channels)} channels in one store", folder / odd, "delete the folder and preprocess again")
    columns: list[tuple[Any, ...]] = list(zip(*rows)) or [()] * 7
    kinds = (None, np.int32, np.float32, np.float32, np.float32, np.int64, "S64")
    identifiers = np.array([name.removesuffix(".json") for name in names])
    return StoreIndex(identifiers, *(np.array(column, kind) for column, kind in zip(columns, kinds)))


def _row(file: Path) -> tuple[Any, ...]:
    info = read_json(file)
    if info.get("schema_version") != SCHEMA_VERSION:
        fix = "delete the folder and preprocess again"
        raise UserError(f"case of schema version {info.get('schema_version')}, this version reads {SCHEMA_VERSION}", file, fix)
    storage = info["storage"]
    return str(info["subject"]), info["stored"]["shape"], info["fill"], storage["scale"], storage["offset"], storage["bytes"], info["sha256"]
