"""Preprocessed cases on disk: one compressed array and one JSON file each, readable box by box."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, read_json, sha256_file, sha256_json, write_json
from nnssl_ext.core.geometry import Box, Geometry, box_slices

SCHEMA_VERSION = 1
_OPEN_FILES = 64


def write_case(folder: Path, identifier: str, array: np.ndarray, info: dict[str, Any], patch_size: Sequence[int]) -> None:
    """Write a case; its JSON file comes last and marks it as whole.

    Args:
        folder: folder of the configuration.
        identifier: name of the case.
        array: (C, z, y, x) float32.
        info: what else to keep; the hash of the array's file is added.
        patch_size: voxels of a training patch, (z, y, x); chunks have its size, blocks a quarter of its edges.
    """
    chunks = (1, *(min(n, p) for n, p in zip(array.shape[1:], patch_size)))
    blocks = (1, *(min(n, max(8, p // 4)) for n, p in zip(chunks[1:], patch_size)))
    path = folder / f"{identifier}.b2nd"
    parameters = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, nthreads=1)  # read two to three times as fast as ZSTD
    content = blosc2.asarray(np.ascontiguousarray(array, np.float32), chunks=chunks, blocks=blocks, cparams=parameters).to_cframe()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # not by blosc2, which doesn't say that the disk is full
    write_json(folder / f"{identifier}.json", {"schema_version": SCHEMA_VERSION, **info, "sha256": hashlib.sha256(content).hexdigest()})


def is_current(folder: Path, identifier: str, settings: str, source: list[Any]) -> bool:
    """Whether a case was finished from the same source files with the same settings."""
    file = folder / f"{identifier}.json"
    if not file.is_file() or not (folder / f"{identifier}.b2nd").is_file():
        return False
    try:
        info = read_json(file)
    except UserError:
        return False
    return (info.get("schema_version"), info.get("settings_sha256"), info.get("source")) == (SCHEMA_VERSION, settings, source)


class CaseStore:
    """The finished cases of a configuration, sorted by identifier.

    Args:
        folder: folder of the preprocessed cases.

    Raises:
        UserError: the folder holds no finished case, or one of another schema version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []
        if not files:
            dataset, configuration = self.folder.parent.name, self.folder.name.partition("_")[2]
            fix = f"nnssl_preprocess -d {dataset.removeprefix('Dataset').partition('_')[0]} -c {configuration}"
            raise UserError("there are no preprocessed cases", self.folder, fix)
        self.identifiers = [file.stem for file in files]
        self._info = [read_json(file) for file in files]
        for file, info in zip(files, self._info):
            if info.get("schema_version") != SCHEMA_VERSION:
                raise UserError(
                    f"case of schema version {info.get('schema_version')}, this version reads {SCHEMA_VERSION}", file, "delete the folder and preprocess again"
                )
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.identifiers)

    def __getstate__(self) -> dict[str, Any]:  # open files stay with their process
        return {**self.__dict__, "_open": OrderedDict()}

    def shape(self, case: int) -> tuple[int, ...]:
        """Voxels (z, y, x)."""
        return tuple(self._info[case]["stored"]["shape"])

    def subject(self, case: int) -> str:
        return str(self._info[case]["subject"])

    def fill(self, case: int) -> list[float]:
        """Normalised value of the background, by channel."""
        return list(self._info[case]["fill"])

    def info(self, case: int) -> dict[str, Any]:
        """What was written with the case: geometries, boxes, normalisation, hashes."""
        return dict(self._info[case])

    def geometry(self, case: int) -> Geometry:
        """Of the stored array."""
        return Geometry.from_dict(self._info[case]["stored"])

    def read(self, case: int, box: Box | None = None) -> np.ndarray:
        """Voxels of a box inside the case (all of it without one), (C, z, y, x) float32; only blocks in the box are decompressed.

        Raises:
            UserError: the file is missing or damaged.
        """
        if box is None:
            box = tuple((0, n) for n in self.shape(case))
        if not all(0 <= low <= high <= n for (low, high), n in zip(box, self.shape(case))):
            raise ValueError(f"box {box} reaches beyond the case's {self.shape(case)} voxels")
        try:
            crop: np.ndarray = self._array(case)[box_slices(box)]
            return crop
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"a stored case can't be read: {error}", self._file(case), "delete it and its .json, then preprocess again") from None

    def verify(self, case: int) -> None:
        """Compare the file with its recorded hash.

        Raises:
            UserError: they differ.
        """
        if sha256_file(self._file(case)) != self._info[case]["sha256"]:
            raise UserError(
                "a stored case is damaged: its hash differs from the recorded one", self._file(case), "delete it and its .json, then preprocess again"
            )

    def data_hash(self) -> str:
        """One hash for all cases."""
        return sha256_json([[name, info["sha256"]] for name, info in zip(self.identifiers, self._info)])

    def _file(self, case: int) -> Path:
        return self.folder / f"{self.identifiers[case]}.b2nd"

    def _array(self, case: int) -> Any:
        if case in self._open:
            self._open.move_to_end(case)
        else:
            self._open[case] = blosc2.open(str(self._file(case)), mode="r", dparams=blosc2.DParams(nthreads=1))
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[case]
