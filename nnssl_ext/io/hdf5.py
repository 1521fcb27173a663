"""A 3D dataset of an HDF5 file, with its spacing from attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import ImageError, UserError
from nnssl_ext.core.geometry import Geometry

ENDINGS = (".h5", ".hdf5")
NAMES = ("image", "volume", "data")  # which of several datasets is the image
SPACING = ("spacing", "voxel_spacing", "voxel_size", "pixel_spacing")  # attributes of the dataset, its groups or the file; mm, (z, y, x)
_WHOLE = "copy or download the file again"


def require_h5py() -> Any:
    """The module h5py.

    Raises:
        UserError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise UserError("HDF5 files need the package h5py", "", "pip install nnssl_ext[hdf5]") from None
    return h5py


def read_geometry(path: Path, name: str) -> Geometry:
    """Geometry from the attributes: spacing (z, y, x) and, where they exist, origin (x, y, z) and direction (9), LPS.

    Args:
        path: the file.
        name: the dataset in it; "" for its only 3D one, or the one named image, volume or data.

    Raises:
        ImageError: truncated or damaged file; no 3D dataset of numbers, or several; spacing that is not positive.
    """
    with _dataset(path, name) as dataset:
        return _geometry(dataset, path)


def read_voxels(path: Path, name: str, geometry: Geometry) -> np.ndarray:
    """Voxels as float32 (z, y, x).

    Raises:
        ImageError: damaged or of unknown compression.
    """
    array = np.empty(geometry.shape, np.float32)
    with _dataset(path, name) as dataset:
        try:
            dataset.read_direct(array)
        except OSError as error:
            packed = "filter" in str(error) or "plugin" in str(error)
            what = f"the dataset {dataset.name} can't be read: {str(error)[:120]}"
            raise ImageError("compression" if packed else "damaged", what, path, _WHOLE) from None
    return array


def files_of(path: Path, name: str) -> list[Path]:
    return [path]


def warnings_of(path: Path, name: str) -> list[tuple[str, str]]:
    """Whether the spacing is missing."""
    read_geometry(path, name)
    return [] if attribute(path, name, SPACING) is not None else [("nospacing", "no attribute names the spacing; 1 mm is assumed")]


def attribute(path: Path, name: str, keys: tuple[str, ...]) -> Any:
    """The value of the first attribute found on the dataset, its groups or the file; None without one."""
    with _dataset(path, name) as dataset:
        return _attribute(dataset, keys)


@contextmanager
def _dataset(path: Path, name: str) -> Iterator[Any]:
    h5py = require_h5py()
    try:
        file = h5py.File(path, "r")
    except PermissionError:
        raise
    except OSError as error:
        kind = "truncated" if "truncated" in str(error) else "format" if "signature" in str(error) else "damaged"
        raise ImageError(kind, f"the HDF5 file can't be opened: {str(error)[:120]}", path, _WHOLE) from None
    with file:
        yield _named(file, name, path) if name else _only(file, path)


def _named(file: Any, name: str, path: Path) -> Any:
    dataset = file.get(name)
    if dataset is None or not hasattr(dataset, "shape"):
        raise ImageError("missing", f"the HDF5 file has no dataset '{name}'", path, f"it has: {', '.join(_all(file))[:200] or 'none'}")
    if not _is_volume(dataset):
        what = f"the dataset '{name}' is {dataset.ndim}D of type {dataset.dtype}, 3D of numbers is needed"
        raise ImageError("dimensions" if dataset.dtype.kind in "iufb" else "format", what, path, "name another one")
    return dataset


def _only(file: Any, path: Path) -> Any:
    names = _all(file)
    volumes = [name for name in names if _is_volume(file[name])]
    if len(volumes) > 1:
        volumes = [name for name in volumes if name.rpartition("/")[2].lower() in NAMES] or volumes
    if not volumes:
        fix = "leave the case out"
        raise ImageError("dimensions", f"the HDF5 file has no 3D dataset of numbers (it has: {', '.join(names)[:120] or 'nothing'})", path, fix)
    if len(volumes) > 1:
        fix = f"name one of them as FILE#DATASET, such as {path.name}#{volumes[0]}"
        raise ImageError("ambiguous", f"the HDF5 file has {len(volumes)} 3D datasets: {', '.join(volumes)[:120]}", path, fix)
    return file[volumes[0]]


def _all(file: Any) -> list[str]:
    """Names of all datasets, those in groups too."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


def _is_volume(dataset: Any) -> bool:
    return dataset.shape is not None and len(dataset.shape) == 3 and min(dataset.shape) > 1 and dataset.dtype.kind in "iufb"


def _geometry(dataset: Any, path: Path) -> Geometry:
    spacing = _numbers(_attribute(dataset, SPACING), "spacing", path)
    spacing = (1.0, 1.0, 1.0) if spacing is None else spacing * 3 if len(spacing) == 1 else spacing
    if len(spacing) != 3 or not all(np.isfinite(v) and v > 0 for v in spacing):
        raise ImageError("spacing", f"the spacing {spacing} is not three positive numbers", path, "repair the attribute")
    origin = _numbers(_attribute(dataset, ("origin",)), "origin", path) or (0.0, 0.0, 0.0)
    direction = _numbers(_attribute(dataset, ("direction",)), "direction", path) or tuple(float(v) for v in np.eye(3).ravel())
    if len(origin) != 3 or len(direction) != 9 or not np.isfinite([*origin, *direction]).all():
        raise ImageError("position", "the attribute origin needs 3 and direction 9 finite numbers", path, "repair or remove them")
    matrix = np.reshape(direction, (3, 3))
    if np.abs(matrix.T @ matrix - np.eye(3)).max() > 1e-3:
        raise ImageError("shear", "the attribute direction is not orthonormal", path, "resample the image to a straight grid")
    return Geometry(tuple(int(n) for n in dataset.shape), spacing, origin, direction)


def _attribute(dataset: Any, keys: tuple[str, ...]) -> Any:
    item = dataset
    while True:
        found = next((item.attrs[key] for key in keys if key in item.attrs), None)
        if found is not None or item.name == "/":
            return found
        item = item.parent


def _numbers(value: Any, name: str, path: Path) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(v) for v in np.ravel(value))
    except (TypeError, ValueError):
        raise ImageError("spacing" if name == "spacing" else "position", f"the attribute {name} holds no numbers", path, "repair the attribute") from None
