"""Preprocessed cases on disk: compressed arrays and one JSON file each, readable box by box."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json, sha256_file, sha256_json, write_json
from nnssl_ext.core.geometry import Box, Geometry, box_slices
from nnssl_ext.preprocessing.arrays import compress, open_array, write
from nnssl_ext.preprocessing.clusters import FOLDER as CLUSTERS
from nnssl_ext.preprocessing.clusters import ClusterLabels
from nnssl_ext.preprocessing.store_index import SCHEMA_VERSION, load_index

STORAGES = ("float32", "float16", "uint16")
BODY_CELL = 8  # stored voxels along the edge of a cell of the coarse body mask
_OPEN_FILES = 64
_DAMAGED = "delete it and its .json, then nnssl_preprocess again; nnssl_verify --store checks the others"


def write_case(
    folder: Path,
    identifier: str,
    array: np.ndarray,
    info: dict[str, Any],
    patch_size: Sequence[int],
    storage: str = "float32",
    masks: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a case; its JSON file comes last and marks it as whole.

    Args:
        folder: folder of the configuration.
        identifier: name of the case.
        array: (C, z, y, x) float32.
        info: what else to keep; hashes and the form of storage are added.
        patch_size: voxels of a training patch, (z, y, x); chunks have its size, blocks a quarter of its edges, so that a
            patch anywhere touches less than twice its own voxels.
        storage: see `encode`.
        masks: bool (z, y, x) by name, kept in a second file.
    """
    values, form = encode(array, storage)
    content = compress(values, patch_size)
    form |= {"bytes": len(content)}
    write(folder / f"{identifier}.b2nd", content)
    info = {"schema_version": SCHEMA_VERSION, **info, "storage": form, "sha256": hashlib.sha256(content).hexdigest(), "masks": sorted(masks or {})}
    if masks:
        packed = compress(np.stack([masks[name] for name in sorted(masks)]).astype(np.uint8), patch_size)
        write(folder / f"{identifier}.masks.b2nd", packed)
        info["masks_sha256"] = hashlib.sha256(packed).hexdigest()
    write_json(folder / f"{identifier}.json", info)


def encode(array: np.ndarray, storage: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Values as they are stored, and how to read them: value * scale + offset, at most max_error from the original, by channel.

    Args:
        array: (C, z, y, x) float32.
        storage: "float32" (exact), "float16" (half a unit of the 11th significant bit), "uint16" (65,536 equal steps over
            the channel's range).

    Raises:
        UserError: float16 can't hold the values.
    """
    channels, axes = len(array), (1, 2, 3)
    low, high = array.min(axes).astype(np.float64), array.max(axes).astype(np.float64)
    largest = np.maximum(abs(low), abs(high))
    scale, offset, error = np.ones(channels), np.zeros(channels), np.zeros(channels)
    values = array.astype(np.float32, copy=False)
    if storage == "float16":
        if largest.max() > np.finfo(np.float16).max:
            raise UserError(f"float16 can't hold values up to {largest.max():g}", "option -storage", "use uint16 or float32")
        values, error = array.astype(np.float16), np.maximum(largest * 2.0**-11, 2.0**-25)
    elif storage == "uint16":
        scale, offset = np.maximum((high - low) / 65535, 1e-30).astype(np.float32).astype(np.float64), low
        values = np.empty(array.shape, np.uint16)
        for channel, source, step, start in zip(values, array, scale, offset):
            channel[:] = np.rint((source - np.float32(start)) / np.float32(step)).clip(0, 65535)
        error = 0.51 * scale + largest * 2.0**-22  # half a step, and float32 arithmetic
    return values, {"dtype": storage, "scale": scale.tolist(), "offset": offset.tolist(), "max_error": error.tolist()}


def pack_body(body: np.ndarray, shape: Sequence[int]) -> dict[str, Any]:
    """A body mask as cells of the stored grid, for a case's JSON file.

    Args:
        body: bool (z, y, x), on the grid before resampling.
        shape: voxels of the stored grid.

    Returns:
        a cell counts as body where half of the eight voxels at the centres of its octants do.
    """
    hits = np.zeros([-(-n // BODY_CELL) for n in shape], np.uint8)
    for corner in np.ndindex(2, 2, 2):
        index = []
        for cells, old, new, side in zip(hits.shape, body.shape, shape, corner):
            stored = np.minimum((np.arange(cells) + 0.25 + 0.5 * side) * BODY_CELL, new)
            index.append((stored * old / new).astype(int).clip(0, old - 1))
        hits += body[np.ix_(*index)]
    return {"shape": list(hits.shape), "bits": base64.b64encode(np.packbits(hits >= 4).tobytes()).decode()}


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
        index = load_index(self.folder) if self.folder.is_dir() else None
        if index is None or not len(index.identifiers):
            dataset, configuration = self.folder.parent.name, self.folder.name.partition("_")[2]
            fix = f"nnssl_preprocess -d {dataset.removeprefix('Dataset').partition('_')[0]} -c {configuration}"
            raise UserError("there are no preprocessed cases", self.folder, fix)
        self._index = index
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index.identifiers)

    def __getstate__(self) -> dict[str, Any]:  # open files stay with their process
        return {**self.__dict__, "_open": OrderedDict()}

    @cached_property
    def identifiers(self) -> list[str]:
        names: list[str] = self._index.identifiers.tolist()
        return names

    def shape(self, case: int) -> tuple[int, ...]:
        """Voxels (z, y, x)."""
        return tuple(self._index.shapes[case].tolist())

    def subject(self, case: int) -> str:
        return str(self._index.subjects[case])

    def fill(self, case: int) -> list[float]:
        """Normalised value of the background, by channel."""
        values: list[float] = self._index.fill[case].tolist()
        return values

    def info(self, case: int) -> dict[str, Any]:
        """What was written with the case: geometries, boxes, normalisation, storage, masks, hashes; read from its JSON file."""
        content: dict[str, Any] = read_json(self.folder / f"{self._index.identifiers[case]}.json")
        return content

    def body(self, case: int) -> np.ndarray:
        """Where the body is, coarsely: bool, a cell for every `BODY_CELL` stored voxels along each axis, (ceil(z / 8), ...)."""
        packed = self.info(case)["body"]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), np.uint8), count=math.prod(packed["shape"]))
        return bits.reshape(packed["shape"]).astype(bool)

    def geometry(self, case: int) -> Geometry:
        """Of the stored array."""
        return Geometry.from_dict(self.info(case)["stored"])

    def read(self, case: int, box: Box | None = None) -> np.ndarray:
        """Voxels of a box inside the case (all of it without one), (C, z, y, x) float32; only blocks in the box are decompressed.

        Raises:
            UserError: the file is missing or damaged.
        """
        crop = self._read(self._file(case), case, box)
        if crop.dtype == np.float32:
            return crop
        crop = crop.astype(np.float32)
        scale, offset = self._index.scale[case], self._index.offset[case]
        if (scale != 1).any() or offset.any():
            crop *= scale[:, None, None, None]
            crop += offset[:, None, None, None]
        return crop

    def read_mask(self, case: int, name: str, box: Box | None = None) -> np.ndarray:
        """A mask that came with the case ("anatomy_mask", "anonymization_mask") in a box, bool (z, y, x).

        Raises:
            UserError: the case has no such mask, or its file is missing or damaged.
        """
        names = self.info(case)["masks"]
        if name not in names:
            raise UserError(f"the case has no mask '{name}' (it has: {', '.join(names) or 'none'})", self._file(case), "add it to the dataset's index")
        file = self.folder / f"{self._index.identifiers[case]}.masks.b2nd"
        return self._read(file, case, box, slice(names.index(name), names.index(name) + 1))[0].astype(bool)

    def clusters(self) -> ClusterLabels:
        """The clusters that the cases' voxels were assigned to.

        Raises:
            UserError: there are none, or not of every case.
        """
        return ClusterLabels(self.folder / CLUSTERS, self.identifiers, self._index.shapes, self._index.sha256)

    def verify(self, case: int) -> None:
        """Compare the case's files with their recorded hashes.

        Raises:
            UserError: they differ, or a file is missing.
        """
        info, file = self.info(case), self._file(case)
        files = {file: info["sha256"]} | ({file.with_suffix(".masks.b2nd"): info["masks_sha256"]} if info["masks"] else {})
        for path, sha256 in files.items():
            if not path.is_file() or sha256_file(path) != sha256:
                what = "a stored case is damaged: its hash differs from the recorded one" if path.is_file() else "a file of a stored case is missing"
                raise UserError(what, path, _DAMAGED)

    def data_hash(self) -> str:
        """One hash for all cases."""
        return self._data_hash

    @cached_property
    def _data_hash(self) -> str:
        return sha256_json([list(pair) for pair in zip(self.identifiers, self._index.sha256.astype(str).tolist())])

    def _file(self, case: int) -> Path:
        return self.folder / f"{self._index.identifiers[case]}.b2nd"

    def _read(self, file: Path, case: int, box: Box | None, channels: slice = slice(None)) -> np.ndarray:
        if box is None:
            box = tuple((0, n) for n in self.shape(case))
        if not all(0 <= low <= high <= n for (low, high), n in zip(box, self.shape(case))):
            raise ValueError(f"box {box} reaches beyond the case's {self.shape(case)} voxels")
        try:
            crop: np.ndarray = self._array(file, case)[(channels,) + box_slices(box)[1:]]
            return crop
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"a stored case can't be read: {error}", file, _DAMAGED) from None

    def _array(self, file: Path, case: int) -> Any:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        array = open_array(file)
        if array.shape[1:] != self.shape(case) or (file == self._file(case) and file.stat().st_size != self._index.sizes[case]):
            raise ValueError("it isn't the file that was written (another size or shape)")
        self._open[file] = array
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return array
