"""Volumes from files: every axis order, unit and defect is settled here.

Arrays are float32 in axis order (z, y, x); geometry is kept as `Geometry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nnssl_ext.core.errors import ImageError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.io import dicom, dicom_files, hdf5, itk, nifti
from nnssl_ext.io.case import Case, split_selector

TOLERANCE_MM = 1e-2  # by which origins of the channels of a case may differ

KINDS: dict[str, str] = {
    "ambiguous": "An HDF5 file holds several 3D datasets and none is named.",
    "colour": "The image has several values per voxel.",
    "compression": "The pixel data are compressed in a way that can't be decoded.",
    "constant": "All voxels have the same value.",
    "damaged": "Header or content contradict the file format.",
    "dimensions": "The image is not 3D.",
    "duplicate": "Several slices of a DICOM series lie at one place.",
    "empty": "The file has no content.",
    "format": "The file is of no known image format, or not of the one that its name says.",
    "gantry": "The slices of a DICOM series are not stacked along their normal (gantry tilt).",
    "gap": "Slices of a DICOM series are missing or unevenly spaced.",
    "memory": "The image doesn't fit into this machine's memory.",
    "mismatch": "The channels of a case lie on different grids.",
    "missing": "The file, or a file or series that it refers to, doesn't exist.",
    "mixed": "A folder holds several DICOM series and none is named.",
    "multiframe": "The frames of a multi-frame DICOM file have no position or can't be rescaled.",
    "nonfinite": "Voxels are NaN or infinite.",
    "notimage": "The DICOM object is a segmentation, a structure, a report or the like.",
    "permission": "The file may not be read.",
    "pixels": "A DICOM file holds no pixel data.",
    "position": "Position or orientation is missing or malformed.",
    "shear": "The axes are not at right angles.",
    "spacing": "The spacing is missing, zero, negative or no number.",
    "truncated": "The file ends too early.",
    "unreadable": "The system could not read the file.",
    "varying": "The slices of a DICOM series differ in size, orientation, pixel spacing or place in the plane.",
    # only warnings; the image is read
    "copies": "A DICOM series holds files twice; the second ones are not used.",
    "forms": "The two positions in a NIfTI header (qform and sform) contradict each other; the one that SimpleITK prefers is used.",
    "inverted": "Low numbers of a DICOM image are bright (MONOCHROME1); they are not inverted.",
    "irregular": "The distances of the slices of a DICOM series vary a little; their mean is used.",
    "nospacing": "An HDF5 file names no spacing; 1 mm is assumed.",
    "slope": "The slices of a DICOM series are rescaled differently; each one is rescaled as it says.",
    "strays": "The folder of a DICOM series also holds files that can't be read.",
}
"""All kinds of `ImageError` and of warnings, each with one sentence."""

WARNINGS = frozenset(("copies", "forms", "inverted", "irregular", "nospacing", "slope", "strays"))


def read_volume(path: Path, constant: bool = False) -> tuple[np.ndarray, Geometry]:
    """Read an image as float32 (z, y, x).

    Args:
        path: file (NIfTI, NRRD, MetaImage, HDF5, DICOM), folder of a DICOM series, `folder#SERIES_UID` or `file.h5#dataset`.
        constant: whether all voxels may be equal, as in an empty mask.

    Raises:
        ImageError: its `kind` is one of `KINDS`.
    """
    with _typed(path):
        form, file, selector = _format(path)
        geometry = form.read_geometry(file, selector)
        _check_memory(geometry, path)
        array: np.ndarray = form.read_voxels(file, selector, geometry)
    wrong = array.size - int(np.isfinite(array).sum())
    if wrong:
        raise ImageError("nonfinite", f"the image holds {wrong} voxels that are NaN or infinite", path, "repair the image or leave the case out")
    if not constant and array.min() == array.max():
        raise ImageError("constant", f"the image is constant ({array.flat[0]:g} everywhere)", path, "leave the case out")
    return array, geometry


def read_header(path: Path) -> Geometry:
    """Geometry of an image without reading its voxels.

    Raises:
        ImageError: what can be seen without the voxels.
    """
    with _typed(path):
        form, file, selector = _format(path)
        geometry: Geometry = form.read_geometry(file, selector)
        return geometry


def files_of(path: Path) -> list[Path]:
    """All files that an image path stands for; the path itself where nothing exists."""
    try:
        form, file, selector = _format(path)
        found: list[Path] = form.files_of(file, selector)
        return found
    except (ImageError, OSError):
        return [split_selector(path)[0]]


def stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change (ns) of every file that image paths stand for; zeros for a missing one."""
    found = [(file, file.stat() if file.is_file() else None) for path in paths for file in files_of(path)]
    return [[str(file), stat.st_size if stat else 0, stat.st_mtime_ns if stat else 0] for file, stat in found]


def warnings_of(path: Path) -> list[tuple[str, str]]:
    """Peculiarities, as kind (one of `WARNINGS`) and sentence, of an image that can be read; no voxel is read.

    Raises:
        ImageError: as `read_header`.
    """
    with _typed(path):
        form, file, selector = _format(path)
        found: list[tuple[str, str]] = form.warnings_of(file, selector)
        return found


def read_case(case: Case) -> tuple[np.ndarray, Geometry]:
    """All channels of a case as float32 (C, z, y, x).

    Raises:
        ImageError: what `read_volume` raises; channels of unequal shape, spacing, origin or direction.
    """
    volumes = [read_volume(path) for path in case.images]
    first = volumes[0][1]
    for (_, other), path in zip(volumes[1:], case.images[1:]):
        for name in ("shape", "spacing", "origin", "direction"):
            a, b = getattr(first, name), getattr(other, name)
            if not np.allclose(a, b, rtol=0, atol=0 if name == "shape" else TOLERANCE_MM):
                what = f"channels of case {case.identifier} differ in {name}: {itk.short(a)} and {itk.short(b)}"
                raise ImageError("mismatch", what, path, "resample them to one grid")
    return (volumes[0][0][None] if len(volumes) == 1 else np.stack([array for array, _ in volumes])), first


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """What the system says as an `ImageError`."""
    try:
        yield
    except PermissionError as error:
        raise ImageError("permission", "the image may not be read", error.filename or path, "change the permissions of the file and its folders") from None
    except FileNotFoundError as error:
        raise ImageError("missing", "a file of the image is gone", error.filename or path, "restore it or take the case out of the index") from None
    except MemoryError:
        raise ImageError("memory", "the image doesn't fit into memory", path, "check its header; leave the case out") from None
    except OSError as error:
        raise ImageError("unreadable", f"the image can't be read: {error.strerror or error}", path, "check the disk") from None


def _format(path: Path) -> tuple[Any, Path, str]:
    """The module that reads an image, and its file or folder and selector.

    Each has `read_geometry(file, selector)`, `read_voxels(file, selector, geometry)`, `files_of(file, selector)` and `warnings_of(file, selector)`.
    """
    file, selector = split_selector(path)
    if file.is_dir():
        return dicom, file, selector
    _check_exists(file)
    if file.name.lower().endswith(hdf5.ENDINGS):
        return hdf5, file, selector
    return (dicom if not file.name.lower().endswith(nifti.ENDINGS) and dicom_files.is_dicom(file) else itk), file, selector


def _check_exists(file: Path) -> None:
    try:
        size = file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        what = "image file not found" if not file.is_symlink() else "broken link"
        raise ImageError("missing", what, file, "restore the file or take the case out of the index") from None
    if size == 0:
        raise ImageError("empty", "the image file is empty", file, "copy or download the file again")


def _check_memory(geometry: Geometry, path: Path) -> None:
    needed, present = 4.0 * np.prod(geometry.shape, dtype=float), psutil.virtual_memory().total
    if needed > present:
        what = f"the image doesn't fit into memory: {itk.short_size(geometry.shape[::-1])} voxels, {needed / 2**30:,.0f} GiB"
        raise ImageError("memory", what, path, "check its header; leave the case out")
