"""DICOM headers: what a file says about its image planes, without its pixels. Nothing of it names a patient in clear."""

from __future__ import annotations

import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from nnssl_ext.core.errors import ImageError

ENDINGS = (".dcm", ".dicom", ".ima")
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")  # transfer syntaxes without compression
DEFLATED = NATIVE[-1]
_NOT_IMAGES = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "FID", "ECG", "AU", "PLAN", "RWV", "SMR")
_MOST_FRAMES = 100_000
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DIRECTORY = "1.2.840.10008.1.3.10"
_PIXELS = ((0x7FE0, 0x0008), (0x7FE0, 0x0009), (0x7FE0, 0x0010))  # float, double and integer pixel data
_SHORT = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID StudyInstanceUID PatientID Modality ImageType SeriesDescription Rows Columns SamplesPerPixel BitsAllocated "
    "NumberOfFrames ImagePositionPatient ImageOrientationPatient PixelSpacing SpacingBetweenSlices RescaleSlope RescaleIntercept PhotometricInterpretation"
).split()
_GROUPS = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DetectorInformationSequence"]  # of multi-frame files; can be large

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # what matters is checked here and becomes an ImageError
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Plane:
    """One image plane.

    Args:
        frame: its number in its file.
        position: of its first voxel's centre, mm, LPS (x, y, z); None without one.
        orientation: direction cosines of its rows and of its columns, six numbers; None without them.
        spacing: between rows and between columns, mm; None without it.
        slope, intercept: value = slope * stored number + intercept.
    """

    frame: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float


@dataclass(frozen=True)
class Header:
    """What a DICOM file says of itself.

    Args:
        file: the file.
        series, study, instance, patient: its identifiers as stored; "" where absent.
        modality: such as "CT" or "MR".
        is_image: False for segmentations, structures, reports, presentation states and directories.
        is_scout: a localiser.
        is_capture: a picture of a screen (secondary capture).
        is_inverted: low numbers are bright (MONOCHROME1).
        syntax: UID of the transfer syntax.
        shape: rows and columns; None without them.
        samples: numbers per pixel, 3 for colour.
        bytes_needed: of all frames, not compressed.
        pixels: where the pixel data begin in the file and how many bytes they have (-1: not said, compressed); None without pixel data.
        planes: one per frame.
    """

    file: Path
    series: str
    study: str
    instance: str
    patient: str
    modality: str
    is_image: bool
    is_scout: bool
    is_capture: bool
    is_inverted: bool
    syntax: str
    shape: tuple[int, int] | None
    samples: int
    bytes_needed: int
    pixels: tuple[int, int] | None
    planes: tuple[Plane, ...]

    @property
    def frames(self) -> int:
        return len(self.planes)


def is_dicom(path: Path) -> bool:
    """Whether a file is named like DICOM or begins like it."""
    if path.suffix.lower() in ENDINGS:
        return True
    with open(path, "rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00" and len(start) == 132


def looks_like_dicom(path: Path) -> bool:
    """As `is_dicom`, also for files that can't be opened."""
    try:
        return is_dicom(path)
    except OSError:
        return False


def read_folder(folder: Path, groups: bool = True) -> tuple[list[Header], list[ImageError]]:
    """The headers of all DICOM files directly in a folder, sorted by name, and the verdicts on files that are DICOM but can't be read."""
    headers, broken = [], []
    with os.scandir(folder) as entries:
        files = sorted(entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir())
    for name in files:
        try:
            if is_dicom(folder / name):
                headers.append(read_file(folder / name, groups))
        except ImageError as error:
            broken.append(error)
        except FileNotFoundError:
            broken.append(ImageError("missing", "broken link", folder / name, "restore the file"))
    return headers, broken


def read_file(file: Path, groups: bool = True) -> Header:
    """The header of one file.

    Args:
        file: a DICOM file.
        groups: also read the functional groups, where multi-frame files keep the geometry of each frame.

    Raises:
        ImageError: empty, truncated or not DICOM.
    """
    if file.stat().st_size == 0:
        raise ImageError("empty", "the DICOM file is empty", file, "copy or download the file again")
    try:
        with open(file, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=_SHORT + _GROUPS * groups)
            pixels = _pixel_place(stream, content)
            return _header(file, content, pixels)
    except (ImageError, PermissionError):
        raise
    except Exception as error:  # pydicom raises whatever a damaged byte leads to
        raise ImageError("damaged", f"the DICOM header can't be read: {str(error)[:120] or type(error).__name__}", file, "copy the file again") from None


def _header(file: Path, content: Any, pixels: tuple[int, int] | None) -> Header:
    text = {key: str(content.get(key) or "").strip() for key in _SHORT if key.endswith(("UID", "ID", "Modality", "Description", "Interpretation"))}
    sop, syntax = text["SOPClassUID"], str(content.file_meta.get("TransferSyntaxUID", ""))
    if not text["SeriesInstanceUID"] and not sop:
        raise ImageError("damaged", "the file isn't DICOM or its header is cut off", file, "copy the file again")
    rows, columns, bits = (_integer(content.get(key), 0) for key in ("Rows", "Columns", "BitsAllocated"))
    frames, samples = _integer(content.get("NumberOfFrames"), 1), _integer(content.get("SamplesPerPixel"), 1)
    if not 1 <= frames <= _MOST_FRAMES:
        raise ImageError("damaged", f"the DICOM header speaks of {frames} frames", file, "copy the file again")
    kinds = {str(kind).upper() for kind in _several(content.get("ImageType"))}
    description = text["SeriesDescription"].lower()
    return Header(
        file=file,
        series=text["SeriesInstanceUID"],
        study=text["StudyInstanceUID"],
        instance=text["SOPInstanceUID"],
        patient=text["PatientID"],
        modality=text["Modality"].upper(),
        is_image=text["Modality"].upper() not in _NOT_IMAGES and sop != _DIRECTORY and bits != 1 and (rows > 0 or pixels is not None),
        is_scout="LOCALIZER" in kinds or any(word in description for word in ("localizer", "localiser", "scout", "topogram", "surview")),
        is_capture=sop.startswith(_CAPTURE),
        is_inverted=text["PhotometricInterpretation"] == "MONOCHROME1",
        syntax=syntax,
        shape=(rows, columns) if rows > 0 and columns > 0 else None,
        samples=3 if text["PhotometricInterpretation"].startswith("PALETTE") else samples,
        bytes_needed=rows * columns * samples * frames * bits // 8,
        pixels=pixels,
        planes=tuple(_planes(content, frames)),
    )


def _planes(content: Any, frames: int) -> Iterator[Plane]:
    shared, single = _first(content.get("SharedFunctionalGroupsSequence")), content.get("PerFrameFunctionalGroupsSequence") or ()
    positions = _stacked(content, frames)
    for frame in range(frames):
        groups = (single[frame] if frame < len(single) else {}, shared, content)

        def field(sequence: str, key: str, count: int, groups: tuple[Any, ...] = groups) -> tuple[float, ...] | None:
            found = [_numbers(_first(group.get(sequence)).get(key), count) for group in groups] + [_numbers(content.get(key), count)]
            return next((numbers for numbers in found if numbers is not None), None)

        position = field("PlanePositionSequence", "ImagePositionPatient", 3)
        yield Plane(
            frame,
            positions[frame] if positions and not single else position,
            field("PlaneOrientationSequence", "ImageOrientationPatient", 6) or field("DetectorInformationSequence", "ImageOrientationPatient", 6),
            field("PixelMeasuresSequence", "PixelSpacing", 2),
            (field("PixelValueTransformationSequence", "RescaleSlope", 1) or (1.0,))[0],
            (field("PixelValueTransformationSequence", "RescaleIntercept", 1) or (0.0,))[0],
        )


def _stacked(content: Any, frames: int) -> list[tuple[float, ...]]:
    """Positions of frames that only have the first one's position and a distance between slices."""
    detector = _first(content.get("DetectorInformationSequence"))  # nuclear medicine
    position, orientation = (_numbers(content.get(key) or detector.get(key), n) for key, n in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6)))
    distance = _numbers(content.get("SpacingBetweenSlices"), 1)
    if frames < 2 or position is None or orientation is None or distance is None or not distance[0] > 0:
        return []
    step = np.cross(orientation[:3], orientation[3:]) * distance[0]
    return [tuple(float(v) for v in np.add(position, frame * step)) for frame in range(frames)]


def _pixel_place(stream: Any, content: Any) -> tuple[int, int] | None:
    """Where the reading stopped, the pixel data begin: their tag, then perhaps their type, then their length."""
    if str(content.file_meta.get("TransferSyntaxUID", "")) == DEFLATED:
        return (0, -1)  # all behind the file's head is compressed
    implicit, little = content.original_encoding
    start = stream.read(12)
    order = "<" if little else ">"
    if len(start) < 12 or struct.unpack(f"{order}2H", start[:4]) not in _PIXELS:
        return None
    length = struct.unpack(f"{order}I", start[4:8] if implicit else start[8:12])[0]
    return stream.tell() - (4 if implicit else 0), -1 if length == 0xFFFFFFFF else length


def _first(sequence: Any) -> Any:
    return sequence[0] if sequence else {}


def _several(value: Any) -> Sequence[Any]:
    return () if value is None else value if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else (value,)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers or None."""
    try:
        found = tuple(float(v) for v in _several(value))
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(math.isfinite(v) for v in found) else None


def _integer(value: Any, default: int) -> int:
    found = _numbers(value, 1)
    return int(found[0]) if found else default
