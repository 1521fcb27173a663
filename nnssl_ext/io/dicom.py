"""A DICOM series to one volume: the grid is computed from the position of every plane, defects are named.

Libraries stack the slices that are there and take the distance of the first two for all; a missing slice goes unnoticed.
Source: DICOM PS3.3, C.7.6.2 (image plane) and C.7.6.16 (multi-frame functional groups).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import SimpleITK

from nnssl_ext.core.errors import ImageError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.io.dicom_files import DEFLATED, NATIVE, Header, Plane, read_file, read_folder
from nnssl_ext.io.quiet import quiet

FEW_SLICES = 3  # a series with fewer is no volume
_ALIKE = 1e-3  # by which direction cosines, and relatively spacings, of the planes of a volume may differ
_TILT = 5e-3  # sine of the angle between the stack and the normal of its planes from which on it is a tilt (0.3 degrees)
_UNEVEN = 0.1  # by which a distance between planes may differ from the median, relatively
_ROUNDED_MM = 0.1  # or in mm, as positions are often rounded
_WHOLE = "copy or download the series again"


class Series(NamedTuple):
    """The planes of a volume, in the order of its z axis."""

    planes: list[tuple[Header, Plane]]
    geometry: Geometry
    unevenness: float  # largest difference of a distance between planes from their median, relatively
    copies: int  # files that repeat another one
    strays: int  # DICOM files of the folder that can't be read


def read_geometry(path: Path, uid: str) -> Geometry:
    """Geometry of a series.

    Args:
        path: folder or file.
        uid: SeriesInstanceUID; "" where the folder holds a single one.

    Raises:
        ImageError: several series, no image, colour, missing or truncated pixel data, no position or spacing, planes that differ, lie unevenly or
            twice at one place, tilted stack.
    """
    return load(path, uid).geometry


def read_voxels(path: Path, uid: str, geometry: Geometry) -> np.ndarray:
    """Values, rescaled as the files say: float32 (z, y, x).

    Raises:
        ImageError: as `read_geometry`; unknown compression, damaged file.
    """
    series = load(path, uid)
    places: dict[Path, list[tuple[int, Plane]]] = {}
    headers = {header.file: header for header, _ in series.planes}
    for place, (header, plane) in enumerate(series.planes):
        places.setdefault(header.file, []).append((place, plane))
    array = np.empty(geometry.shape, np.float32)
    for file, planes in places.items():
        frames, rescaled = _pixels(headers[file])
        for place, plane in planes:
            with np.errstate(over="ignore", invalid="ignore"):  # infinity is a verdict of its own
                array[place] = frames[plane.frame] if rescaled else frames[plane.frame] * np.float64(plane.slope) + plane.intercept
    return array


def files_of(path: Path, uid: str) -> list[Path]:
    """The files of a series; without `uid`, all files of the folder."""
    if not path.is_dir():
        return [path]
    return sorted(header.file for header in _below(path)[0] if header.series == uid) if uid else sorted(file for file in path.iterdir() if file.is_file())


def warnings_of(path: Path, uid: str) -> list[tuple[str, str]]:
    """Peculiarities of a series that is read all the same."""
    series = load(path, uid)
    found = []
    if series.unevenness > 0.01:
        found.append(("irregular", f"the distances of the slices vary by up to {series.unevenness:.0%}"))
    if len({(plane.slope, plane.intercept) for _, plane in series.planes}) > 1:
        found.append(("slope", "the slices are rescaled differently"))
    if any(header.is_inverted for header, _ in series.planes):
        found.append(("inverted", "low numbers are bright (MONOCHROME1)"))
    if series.copies:
        found.append(("copies", f"{series.copies} files repeat another one"))
    if series.strays:
        found.append(("strays", f"{series.strays} DICOM files of the folder can't be read"))
    return found


def load(path: Path, uid: str) -> Series:
    """The planes of a series in order, and all verdicts that need no pixels."""
    headers, broken = _choose(path, uid)
    for header in headers:
        _check_file(header)
    copies = len(headers)
    headers = list({(header.instance or header.file, header.planes[0].position): header for header in reversed(headers)}.values())[::-1]
    copies -= len(headers)
    return Series(*_stack([(header, plane) for header in headers for plane in header.planes], path), copies, len(broken))


def _choose(path: Path, uid: str) -> tuple[list[Header], list[ImageError]]:
    """The headers of the one series that is meant."""
    headers, broken = (_below(path) if uid else _headers(path)) if path.is_dir() else ([read_file(path)], [])
    if uid:
        chosen = [header for header in headers if header.series == uid]
        if not chosen:
            raise ImageError("missing", f"the folder has no DICOM series {uid}", path, "restore the files or take the case out of the index")
        if not any(header.is_image for header in chosen):
            raise _no_image(chosen[0])
        return chosen, broken
    if broken:
        raise broken[0]
    if not headers:
        raise ImageError("format", "the folder holds no DICOM file", path, "name an image file or a folder of DICOM slices")
    images = [header for header in headers if header.is_image]
    if not images:
        raise _no_image(headers[0])
    series = Counter(header.series for header in images)
    if len(series) > 1:
        first = min(series)
        raise ImageError("mixed", f"the folder holds {len(series)} DICOM series", path, f"name one of them as FOLDER#UID, such as {path.name}#{first}")
    return images, broken


def _no_image(header: Header) -> ImageError:
    return ImageError("notimage", f"the DICOM object is no image (modality {header.modality or 'unknown'})", header.file, "take the case out of the index")


def _below(folder: Path) -> tuple[list[Header], list[ImageError]]:
    """The headers of a folder and its subfolders, over which some archives spread a series."""
    headers, broken = [], []
    for place, folders, _ in os.walk(folder):
        folders.sort()
        found = _headers(Path(place))
        headers += found[0]
        broken += found[1]
    return headers, broken


def _headers(folder: Path) -> tuple[list[Header], list[ImageError]]:
    with os.scandir(folder) as entries:
        stats = {entry.name: entry.stat(follow_symlinks=False) for entry in entries if not entry.is_dir()}
    return _remembered(folder, tuple((name, stats[name].st_size, stats[name].st_mtime_ns) for name in sorted(stats)))


@lru_cache(maxsize=2)
def _remembered(folder: Path, _: tuple[tuple[str, int, int], ...]) -> tuple[list[Header], list[ImageError]]:
    """Several series of a folder are read one after the other; headers of unchanged files are read once."""
    return read_folder(folder)


def _check_file(header: Header) -> None:
    if header.samples != 1:
        raise ImageError("colour", "the DICOM image is in colour, one value per voxel is needed", header.file, "leave the case out")
    if header.shape is None or header.pixels is None or header.pixels[1] == 0:
        raise ImageError("pixels", "the DICOM file holds no pixel data", header.file, _WHOLE)
    start, length = header.pixels
    size = header.file.stat().st_size
    if size < start + max(length, 0):
        raise ImageError("truncated", f"the DICOM file is truncated: {size} of {start + length} bytes", header.file, _WHOLE)
    if header.syntax and header.syntax != DEFLATED and (header.syntax in NATIVE) != (length >= 0):
        what = f"the transfer syntax ({pydicom.uid.UID(header.syntax).name}) contradicts the pixel data"
        raise ImageError("compression", what, header.file, _WHOLE)
    if header.syntax in NATIVE and 0 <= length < header.bytes_needed:
        what = f"the DICOM file holds {length} bytes of pixel data, its header speaks of {header.bytes_needed}"
        raise ImageError("truncated", what, header.file, _WHOLE)


def _stack(planes: list[tuple[Header, Plane]], path: Path) -> tuple[list[tuple[Header, Plane]], Geometry, float]:
    """Order of the planes along their normal and the grid they form."""
    multiframe = planes[0][0].frames > 1
    for header, plane in planes:
        if plane.position is None or plane.orientation is None:
            what = "the frames of the multi-frame file have no position" if multiframe else "the slice has no position or orientation"
            raise ImageError("multiframe" if multiframe else "position", what, header.file, "leave the case out")
        if plane.spacing is None or not min(plane.spacing) > 0:
            what = "the DICOM image has no pixel spacing" if plane.spacing is None else f"the pixel spacing {_short(plane.spacing)} is not positive"
            raise ImageError("spacing", what, header.file, "leave the case out")
    rows, columns = planes[0][0].shape or (0, 0)
    spacing, direction = _common(planes, path)
    positions = np.array([plane.position for _, plane in planes], float)
    along = positions @ direction[:, 2]
    order = np.argsort(along, kind="stable")
    if len(planes) == 1 or rows == 1 or columns == 1:
        raise ImageError("dimensions", f"the image is 2D ({columns} x {rows} x {len(planes)} voxels), 3D is needed", path, "leave the case out")
    distance, unevenness = _distance(along[order], min(spacing), path)
    _check_tilt(positions[order], along[order], direction[:, 2], min(spacing), path)
    geometry = Geometry(
        (len(planes), rows, columns), (distance, *spacing), tuple(float(v) for v in positions[order[0]]), tuple(float(v) for v in direction.ravel())
    )
    return [planes[i] for i in order], geometry, unevenness


def _common(planes: list[tuple[Header, Plane]], path: Path) -> tuple[tuple[float, ...], np.ndarray]:
    """Spacing (rows, columns) and direction matrix that all planes share."""
    first_header, first = planes[0]
    for name, values, tolerance in (
        ("size", [header.shape for header, _ in planes], 0.0),
        ("orientation", [plane.orientation for _, plane in planes], _ALIKE),
        ("pixel spacing", [plane.spacing for _, plane in planes], _ALIKE * min(first.spacing or (1.0,))),
    ):
        numbers = np.array(values, float)
        differs = np.abs(numbers - numbers[0]).max(axis=1) > tolerance
        if differs.any():
            other = int(differs.argmax())
            what = f"the slices of the series differ in {name}: {_short(tuple(numbers[0]))} and {_short(tuple(numbers[other]))}"
            raise ImageError("varying", what, planes[other][0].file, "split the series or leave the case out")
    along_row, along_column = np.array(first.orientation, float).reshape(2, 3)
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if np.abs(np.subtract(lengths, 1)).max() > 1e-2 or abs(along_row @ along_column) > 1e-2:
        raise ImageError("shear", f"the direction cosines {_short(first.orientation or ())} are not orthonormal", first_header.file, "leave the case out")
    along_row = along_row / lengths[0]
    along_column = along_column - (along_column @ along_row) * along_row
    along_column /= np.linalg.norm(along_column)
    return first.spacing or (), np.stack([along_row, along_column, np.cross(along_row, along_column)], axis=1)


def _distance(along: np.ndarray, pixel: float, path: Path) -> tuple[float, float]:
    """Distance between neighbouring planes in mm and the largest relative difference from it.

    Args:
        along: positions along the normal, ascending, mm.
        pixel: smallest spacing in the planes, mm; planes nearer than a hundredth of it lie at one place.
        path: for messages.
    """
    steps = np.diff(along)
    same = steps < 0.01 * pixel
    if same.any():
        sizes = np.diff(np.flatnonzero(np.concatenate([[True], ~same, [True]])))  # planes at each place
        if len(set(sizes)) == 1:
            what = f"the series is 4D: {sizes[0]} images at each of {len(sizes)} places (times, echoes or copies), 3D is needed"
            raise ImageError("dimensions", what, path, "split it into one series per volume")
        raise ImageError("duplicate", f"{int(same.sum())} slices of the series lie at the place of another slice", path, "remove what is double")
    step = float(np.median(steps))
    off = np.abs(steps - step)
    allowed = max(_UNEVEN * step, min(_ROUNDED_MM, 0.4 * step)) + 1e-6
    if off.max() > allowed:
        at = int(off.argmax())
        what = f"slices are missing or unevenly spaced: the distance is {steps[at]:.4g} mm behind slice {at + 1} of {len(along)}, {step:.4g} mm elsewhere"
        raise ImageError("gap", what, path, _WHOLE)
    mean = float(along[-1] - along[0]) / (len(along) - 1)
    drift = np.abs(along - along[0] - mean * np.arange(len(along))).max()
    if drift > 0.5 * mean:
        raise ImageError("gap", f"the distance between slices changes: the series is up to {drift:.3g} mm off an even grid", path, "leave the case out")
    return mean, float(off.max() / step)


def _check_tilt(positions: np.ndarray, along: np.ndarray, normal: np.ndarray, pixel: float, path: Path) -> None:
    """The planes must lie straight above each other."""
    aside = positions - positions[0] - (along - along[0])[:, None] * normal
    tilt = np.linalg.norm(aside[-1]) / (along[-1] - along[0])
    if tilt > _TILT:
        what = f"the stack of slices is tilted by {np.degrees(np.arctan(tilt)):.1f} degrees (gantry tilt)"
        raise ImageError("gantry", what, path, "resample the series to a straight grid")
    scatter = np.linalg.norm(aside - aside[-1] * ((along - along[0]) / (along[-1] - along[0]))[:, None], axis=1)
    if scatter.max() > max(0.5 * pixel, _ROUNDED_MM):
        what = f"slice {int(scatter.argmax()) + 1} of {len(along)} is {scatter.max():.3g} mm beside the others"
        raise ImageError("varying", what, path, "leave the case out")


def _pixels(header: Header) -> tuple[np.ndarray, bool]:
    """All frames of a file (frames, y, x), and whether they are rescaled already."""
    shape = (header.frames, *(header.shape or ()))
    native = header.syntax in NATIVE or not header.syntax
    try:
        if native:
            return _native(header.file).reshape(shape), False
        if len({(plane.slope, plane.intercept) for plane in header.planes}) > 1:
            raise ImageError("multiframe", "the frames of a compressed file are rescaled differently", header.file, "decompress it")
        with quiet():
            return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(header.file), SimpleITK.sitkFloat32)).reshape(shape), True
    except (ImageError, MemoryError, PermissionError):
        raise
    except Exception as error:
        if native:
            raise ImageError("damaged", f"the pixel data can't be read: {str(error).splitlines()[0][:120]}", header.file, _WHOLE) from None
        name = pydicom.uid.UID(header.syntax).name
        raise ImageError("compression", f"the pixel data can't be decompressed ({name})", header.file, "copy it again or decompress it") from None


def _native(file: Path) -> np.ndarray:
    """Numbers as stored, all frames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = pydicom.dcmread(file, force=True)
        if "TransferSyntaxUID" not in content.file_meta:  # the file lacks its head
            implicit, _ = content.original_encoding
            content.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        array: np.ndarray = content.pixel_array
        return array


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"
