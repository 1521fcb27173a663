"""Volumes from files: every axis order, unit and defect is settled here.

Arrays are float32 in axis order (z, y, x); geometry is kept as `Geometry`.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.io.index import Case

TOLERANCE_MM = 1e-2  # by which origins of the channels of a case may differ
_WHOLE = "copy or download the file again"
_NIFTI = (".nii", ".nii.gz")
_NIFTI_ERRORS = (EOFError, OSError, ValueError, zlib.error, nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError)

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it is checked here and becomes a UserError


def read_volume(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read an image (NIfTI, NRRD, MHA, ...) as float32 (z, y, x).

    Raises:
        UserError: missing, truncated or unreadable file; not 3D; several components; NaN or infinity; constant.
    """
    geometry = read_header(path)
    if path.name.endswith(_NIFTI):
        _check_nifti_voxels(path)
    try:
        array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat32))
    except MemoryError:
        raise UserError(f"the image ({_size(geometry.shape[::-1])} voxels) doesn't fit into memory", path, "check its header; leave the case out") from None
    except RuntimeError as error:
        raise UserError(f"the image can't be read: {_reason(error)}", path, _WHOLE) from None
    _check_finite(array, path)
    if array.min() == array.max():
        raise UserError(f"the image is constant ({array.flat[0]:g} everywhere)", path, "leave the case out")
    return array, geometry


def read_header(path: Path) -> Geometry:
    """Geometry of an image without reading its voxels.

    Raises:
        UserError: missing or unreadable file; not 3D; several components; spacing or size that is not positive.
    """
    if not path.is_file():
        raise UserError("image file not found" if not path.is_symlink() else "broken link", path, "restore the file or take the case out of the index")
    if path.stat().st_size == 0:
        raise UserError("the image file is empty", path, _WHOLE)
    stored = _nifti_spacing(path) if path.name.endswith(_NIFTI) else ()
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"the image's header can't be read: {_reason(error)}", path, _WHOLE) from None
    size, spacing = reader.GetSize(), reader.GetSpacing()
    if reader.GetNumberOfComponents() != 1:
        raise UserError(f"the image has {reader.GetNumberOfComponents()} values per voxel (colour or vector), one is needed", path, "split it into channels")
    if len(size) != 3:
        raise UserError(f"the image is {len(size)}D ({_size(size)}), 3D is needed", path, "split a series into volumes, leave out 2D images")
    if sum(n > 1 for n in size) < 3:
        raise UserError(f"the image is 2D ({_size(size)} voxels), 3D is needed", path, "leave the case out")
    if not all(np.isfinite(s) and s > 0 for s in (*spacing, *stored)):
        raise UserError(f"the spacing {_short(stored or spacing)} is not positive", path, "repair the header")
    return Geometry(size[::-1], spacing[::-1], reader.GetOrigin(), reader.GetDirection())


def read_case(case: Case) -> tuple[np.ndarray, Geometry]:
    """All channels of a case as float32 (C, z, y, x).

    Raises:
        UserError: what `read_volume` raises; channels of unequal shape, spacing, origin or direction.
    """
    volumes = [read_volume(path) for path in case.images]
    first = volumes[0][1]
    for (_, other), path in zip(volumes[1:], case.images[1:]):
        for name in ("shape", "spacing", "origin", "direction"):
            a, b = getattr(first, name), getattr(other, name)
            if not np.allclose(a, b, rtol=0, atol=0 if name == "shape" else TOLERANCE_MM):
                raise UserError(f"channels of case {case.identifier} differ in {name}: {_short(a)} and {_short(b)}", path, "resample them to one grid")
    return np.stack([array for array, _ in volumes]), first


def _nifti_spacing(path: Path) -> tuple[float, ...]:
    """Spacing (x, y, z) as the header has it, in the header's unit; SimpleITK replaces zero and NaN by 1."""
    return tuple(float(mm) for mm in _nifti_header(_nifti_bytes(path, 540), path)["pixdim"][1:4])


def _check_nifti_voxels(path: Path) -> None:
    """What SimpleITK hides: it fills the rest of a cut .nii.gz with zeros and replaces NaN and infinity by 0."""
    content = _nifti_bytes(path)
    header = _nifti_header(content, path)
    try:
        kind, first, count = header.get_data_dtype(), int(header["vox_offset"]), math.prod(int(n) for n in header.get_data_shape())
    except _NIFTI_ERRORS as error:
        raise UserError(f"the image's header is damaged: {_reason(error)}", path, _WHOLE) from None
    if len(content) < first + count * kind.itemsize:
        raise UserError(f"the image is truncated: {len(content)} of {first + count * kind.itemsize} bytes", path, _WHOLE)
    if kind.kind == "f":
        _check_finite(np.frombuffer(content, kind, count, first), path)


def _nifti_bytes(path: Path, count: int = -1) -> bytes:
    """The first `count` bytes, or all of them, decompressed."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read(count)
    except gzip.BadGzipFile:
        raise UserError("the file's name ends in .gz, but it isn't compressed", path, "rename it or copy it again") from None
    except _NIFTI_ERRORS as error:
        raise UserError(f"the image is truncated or damaged: {_reason(error)}", path, _WHOLE) from None


def _nifti_header(content: bytes, path: Path) -> Any:
    """The header of NIfTI 1 or 2, nothing in it corrected."""
    kind = nibabel.Nifti2Header if 540 in (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")) else nibabel.Nifti1Header
    try:
        return kind(content[: 540 if kind is nibabel.Nifti2Header else 348], check=False)
    except _NIFTI_ERRORS as error:
        raise UserError(f"the image's header can't be read: {_reason(error)}", path, _WHOLE) from None


def _check_finite(values: np.ndarray, path: Path) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"the image holds {int((~np.isfinite(values)).sum())} voxels that are NaN or infinite", path, "repair the image or leave the case out")


def _reason(error: Exception) -> str:
    if "Unable to determine ImageIO reader" in str(error):
        return "it is of no known image format"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith("Reason: ")]
    return re.sub(r"^ITK ERROR: (\w+\(0x[0-9a-f]+\): )?", "", lines[-1])[:120] if lines else type(error).__name__


def _size(size: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in size)


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"
