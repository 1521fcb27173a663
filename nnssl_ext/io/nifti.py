"""NIfTI voxels and what SimpleITK hides of a header: it fills a cut file with zeros, replaces NaN by 0 and a spacing of zero by 1."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnssl_ext.core.errors import ImageError

ENDINGS = (".nii", ".nii.gz")
_WHOLE = "copy or download the file again"
_ERRORS = (EOFError, OSError, ValueError, zlib.error, nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError)


def spacing(path: Path) -> tuple[float, ...]:
    """Spacing (x, y, z) as the header has it, in the header's unit."""
    return tuple(float(v) for v in _header(_bytes(path, 540), path)["pixdim"][1:4])


def has_magic(path: Path) -> bool:
    """Whether a file begins like NIfTI."""
    return bytes(_header(_bytes(path, 540), path)["magic"])[:2] in (b"n+", b"ni")


def forms_differ(path: Path) -> bool:
    """Whether the header's two statements about the position (qform and sform) are both valid and contradict each other by more than 0.1 mm."""
    header = _header(_bytes(path, 540), path)
    if header["qform_code"] <= 0 or header["sform_code"] <= 0:
        return False
    try:
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*(n - 1 for n in header.get_data_shape()[:3]), 1]
        return bool(np.abs(corners @ (header.get_qform() - header.get_sform()).T).max() > 0.1)
    except _ERRORS:
        return False


def read_voxels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Voxels of a `.nii` or `.nii.gz` as float32, scaled as the header says.

    Args:
        path: the file.
        shape: what the geometry says, (z, y, x).

    Raises:
        ImageError: truncated or damaged file.
    """
    content = _bytes(path)
    header = _header(content, path)
    try:
        kind, first, count = header.get_data_dtype(), int(header["vox_offset"]), math.prod(int(n) for n in header.get_data_shape())
        slope, intercept = header.get_slope_inter()
    except _ERRORS as error:
        raise ImageError("damaged", f"the image's header is damaged: {_reason(error)}", path, _WHOLE) from None
    if len(content) < first + count * kind.itemsize:
        raise ImageError("truncated", f"the image is truncated: {len(content)} of {first + count * kind.itemsize} bytes", path, _WHOLE)
    if count != math.prod(shape) or kind.kind not in "iuf":
        raise ImageError("format", f"the voxels are of type {kind}, numbers are needed", path, "convert the image")
    stored = np.frombuffer(content, kind, count, first).reshape(shape)
    if slope is None or (slope, intercept) == (1, 0):
        return stored.astype(np.float32)
    array = np.empty(shape, np.float32)
    for here, there in zip(array, stored):  # slice by slice: float64 of the whole would need twice the memory
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is a verdict of its own
            here[:] = there * np.float64(slope) + intercept
    return array


def _bytes(path: Path, count: int = -1) -> bytes:
    """The first `count` bytes, or all of them, decompressed."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read(count)
    except PermissionError:
        raise
    except gzip.BadGzipFile:
        raise ImageError("format", "the file's name ends in .gz, but it isn't compressed", path, "rename it or copy it again") from None
    except _ERRORS as error:
        truncated = isinstance(error, EOFError)
        raise ImageError("truncated" if truncated else "damaged", f"the image is truncated or damaged: {_reason(error)}", path, _WHOLE) from None


def _header(content: bytes, path: Path) -> Any:
    """The header of NIfTI 1 or 2, nothing in it corrected."""
    kind = nibabel.Nifti2Header if 540 in (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")) else nibabel.Nifti1Header
    try:
        return kind(content[: 540 if kind is nibabel.Nifti2Header else 348], check=False)
    except _ERRORS as error:
        raise ImageError("damaged", f"the image's header can't be read: {_reason(error)}", path, _WHOLE) from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
