"""Images that SimpleITK reads: NRRD, MetaImage and others as a whole, of NIfTI the header."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK

from nnssl_ext.core.errors import ImageError, UserError
from nnssl_ext.core.files import atomic_path
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.io import nifti
from nnssl_ext.io.quiet import quiet

_WHOLE = "copy or download the file again"
_DATA_FILE = re.compile(rb"^(?:ElementDataFile *= *|data ?file: *)(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
_PACKED = re.compile(rb"CompressedData *= *True|encoding: *(gz|bz)", re.IGNORECASE)
_PAIRS = {".hdr": ".img", ".img": ".hdr"}

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it is checked here and becomes an ImageError


def write_image(path: Path, image: SimpleITK.Image, what: str) -> None:
    """Write a compressed NIfTI file atomically; SimpleITK chooses the format by the suffix, so it writes in a folder of its own.

    Args:
        what: the content, for the error.

    Raises:
        UserError: the disk is full or not writable.
    """
    with atomic_path(path) as temporary, tempfile.TemporaryDirectory(prefix=".writing_", dir=path.parent) as folder:
        whole = Path(folder) / "volume.nii.gz"
        try:
            SimpleITK.WriteImage(image, str(whole), useCompression=True, compressionLevel=1)
        except RuntimeError as error:
            raise UserError(f"could not write {what}", path, "check the free space and the permissions of the disk") from error
        os.replace(whole, temporary)


def read_voxels(path: Path, selector: str, geometry: Geometry) -> np.ndarray:
    """Voxels as float32 (z, y, x).

    Args:
        path: the file.
        selector: not used.
        geometry: what `read_geometry` gave.

    Raises:
        ImageError: truncated or damaged file.
    """
    if path.name.endswith(nifti.ENDINGS):
        return nifti.read_voxels(path, geometry.shape)
    try:
        with quiet():
            image = SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat32)
    except RuntimeError as error:
        _check_length(path, geometry)
        raise ImageError(_kind(path), f"the image can't be read: {_reason(error)}", path, _WHOLE) from None
    array: np.ndarray = SimpleITK.GetArrayFromImage(image)
    return array


def read_geometry(path: Path, selector: str) -> Geometry:
    """Geometry without reading voxels.

    Raises:
        ImageError: unreadable header; not 3D; several components; spacing that is not positive; direction that is not orthonormal.
    """
    stored = nifti.spacing(path) if path.name.endswith(nifti.ENDINGS) else ()
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        kind = "shear" if "orthonormal" in str(error) else "spacing" if "spacing" in str(error).lower() else _kind(path, "Unable to determine" in str(error))
        raise ImageError(kind, f"the image's header can't be read: {_reason(error)}", path, _WHOLE) from None
    size, spacing = reader.GetSize(), reader.GetSpacing()
    if reader.GetNumberOfComponents() != 1:
        what = f"the image has {reader.GetNumberOfComponents()} values per voxel (colour or vector), one is needed"
        raise ImageError("colour", what, path, "split it into channels")
    if len(size) != 3:
        raise ImageError(
            "dimensions", f"the image is {len(size)}D ({short_size(size)}), 3D is needed", path, "split a series into volumes, leave out 2D images"
        )
    if sum(n > 1 for n in size) < 3:
        raise ImageError("dimensions", f"the image is 2D ({short_size(size)} voxels), 3D is needed", path, "leave the case out")
    if not all(math.isfinite(s) and s > 0 for s in (*spacing, *stored)):
        raise ImageError("spacing", f"the spacing {short(stored or spacing)} is not positive", path, "repair the header")
    return Geometry(size[::-1], spacing[::-1], reader.GetOrigin(), reader.GetDirection())


def files_of(path: Path, selector: str) -> list[Path]:
    """The file and, where voxels lie in a file of their own, that one."""
    if path.suffix.lower() in _PAIRS:
        return [path, path.with_suffix(_PAIRS[path.suffix.lower()])]
    if path.suffix.lower() not in (".mhd", ".nhdr", ".nrrd", ".mha") or not path.is_file():
        return [path]
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    head = start.partition(b"\n\n")[0] if path.suffix.lower() in (".nhdr", ".nrrd") else start  # what follows the head are voxels
    found = _DATA_FILE.search(head)
    name = found[1].decode("utf-8", "replace") if found else "LOCAL"
    return [path] if name.split()[0] in ("LOCAL", "LIST") or "%" in name else [path, path.parent / name]


def warnings_of(path: Path, selector: str) -> list[tuple[str, str]]:
    """Peculiarities of a NIfTI header."""
    read_geometry(path, selector)
    if path.name.endswith(nifti.ENDINGS) and nifti.forms_differ(path):
        return [("forms", "the header's qform and sform give different positions")]
    return []


def short_size(size: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in size)


def short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


def _kind(path: Path, unknown: bool = False) -> str:
    """Why SimpleITK failed: a file that it needs is missing, it doesn't know the format, or it found the content damaged."""
    if not all(file.exists() for file in files_of(path, "")):
        return "missing"
    return "format" if unknown and not (path.name.endswith(nifti.ENDINGS) and nifti.has_magic(path)) else "damaged"


def _check_length(path: Path, geometry: Geometry) -> None:
    """Whether files without compression are too short for their voxels."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    with quiet():
        reader.ReadImageInformation()
    needed = math.prod(geometry.shape) * SimpleITK.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    voxels = files_of(path, "")[-1]
    present = voxels.stat().st_size if voxels.exists() else needed
    with open(path, "rb") as file:
        packed = _PACKED.search(file.read(1 << 12))
    if not packed and present < needed:
        raise ImageError("truncated", f"the image is truncated: {present} bytes, its voxels need {needed}", voxels, _WHOLE)


def _reason(error: Exception) -> str:
    if "Unable to determine ImageIO reader" in str(error):
        return "it is of no known image format"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith("Reason: ")]
    return re.sub(r"^ITK ERROR: (\w+\(0x[0-9a-f]+\): )?", "", lines[-1])[:120] if lines else type(error).__name__
