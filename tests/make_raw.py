"""Small raw datasets on disk for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from nnssl_ext.core.rng import sample_rng


def body_volume(shape: Sequence[int] = (20, 24, 28), index: int = 0) -> np.ndarray:
    """A CT-like ball of tissue in air, int16 (z, y, x)."""
    rng = sample_rng(0, index, "test volume")
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = z**2 + y**2 + x**2 < 0.7 + 0.02 * index
    tissue = 40 + 60 * np.sin(4 * x + index) + rng.normal(0, 10, tuple(shape))
    return np.where(inside, tissue, -1000).astype(np.int16)


def write_image(path: Path, array: np.ndarray, spacing: Sequence[float] = (3.0, 2.0, 2.0), origin: Sequence[float] = (10.0, -20.0, 30.0)) -> Path:
    """Write (z, y, x) with spacing (z, y, x) and origin (x, y, z)."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing][::-1][: image.GetDimension()])
    image.SetOrigin([float(o) for o in origin][: image.GetDimension()])
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def nnunet_dataset(root: Path, cases: int = 3, channels: int = 1, name: str = "Dataset801_Test", modality: str = "CT") -> Path:
    """An nnU-Net raw folder with `cases` volumes."""
    folder = root / name
    for case in range(cases):
        for channel in range(channels):
            write_image(folder / "imagesTr" / f"case{case}_{channel:04d}.nii.gz", body_volume(index=case))
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {str(c): modality for c in range(channels)}, "file_ending": ".nii.gz", "labels": {"background": 0}})
    )
    return folder


def labelled_dataset(
    root: Path, cases: int = 3, name: str = "Dataset901_Labelled", spacing: Sequence[float] = (3.0, 2.0, 2.0), shape: Sequence[int] = (20, 24, 28)
) -> Path:
    """An nnU-Net raw folder with labels: 1 the ball of tissue, 2 its voxels above 70 HU."""
    folder = root / name
    for case in range(cases):
        array = body_volume(shape, case)
        write_image(folder / "imagesTr" / f"case{case}_0000.nii.gz", array, spacing)
        write_image(folder / "labelsTr" / f"case{case}.nii.gz", ((array > -500).astype(np.uint8) + (array > 70)).astype(np.uint8), spacing)
    labels = {"background": 0, "body": 1, "dense": 2}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}))
    return folder


def pretrain_dataset(root: Path, subjects: int = 3, name: str = "Dataset802_Test") -> Path:
    """nnssl's pretrain_data.json: each subject has a CT and an MR session."""
    folder, entries = root / name, {}
    for subject in range(subjects):
        sessions = {}
        for session, modality in enumerate(("CT", "MR")):
            array = body_volume(index=2 * subject + session)
            path = write_image(folder / "images" / f"s{subject}" / f"{modality}.nii.gz", array if modality == "CT" else (array + 1000).astype(np.int16))
            image = {"name": path.name, "modality": modality, "image_path": f"$nnssl_raw/{path.relative_to(root)}", "image_info": {}, "associated_masks": None}
            sessions[f"ses{session}"] = {"session_id": f"ses{session}", "session_info": {}, "images": [image]}
        entries[f"s{subject}"] = {"subject_id": f"s{subject}", "subject_info": {"age": 50}, "sessions": sessions}
    datasets = {"7": {"dataset_index": "7", "name": "test", "dataset_info": {}, "subjects": entries}}
    (folder / "pretrain_data.json").write_text(json.dumps({"collection_index": 802, "collection_name": name, "datasets": datasets}))
    return folder


CT_IMAGE, MR_IMAGE, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"


def dicom_slice(array: np.ndarray, number: int = 0, series: str = "1.2.3.1", **tags: Any) -> FileDataset:
    """A DICOM image of one plane (y, x) or of frames (z, y, x), int16; `tags` by keyword, None takes one out."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = CT_IMAGE, f"{series}.{number + 1}", ExplicitVRLittleEndian
    content = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": CT_IMAGE,
        "SOPInstanceUID": f"{series}.{number + 1}",
        "SeriesInstanceUID": series,
        "StudyInstanceUID": "1.2.3",
        "PatientID": "MUELLER-1970",
        "PatientName": "Mueller^Eva",
        "Modality": "CT",
        "InstanceNumber": number + 1,
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "Rows": array.shape[-2],
        "Columns": array.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "PixelData": array.astype("<i2").tobytes(),
    }
    for key, value in {**values, **({"NumberOfFrames": len(array)} if array.ndim == 3 else {}), **tags}.items():
        if value is not None:
            setattr(content, key, value)
    if "PixelData" in content:
        content["PixelData"].VR = "OW"
    return content


def write_dicom(
    folder: Path,
    array: np.ndarray,
    spacing: Sequence[float] = (3.0, 2.0, 2.0),
    origin: Sequence[float] = (10.0, -20.0, 30.0),
    direction: Any = None,
    series: str = "1.2.3.1",
    leave_out: Sequence[int] = (),
    **tags: Any,
) -> Path:
    """Write (z, y, x) as a DICOM series with spacing (z, y, x) and origin (x, y, z).

    Args:
        direction: 3 x 3 matrix, columns are the x, y and z axes (the identity without it).
        series: SeriesInstanceUID.
        leave_out: slices that are not written.
        **tags: values by DICOM keyword, or functions of the slice's number that give them; None takes a tag out.
    """
    axes = np.eye(3) if direction is None else np.reshape(direction, (3, 3))
    folder.mkdir(parents=True, exist_ok=True)
    for number, plane in enumerate(array):
        if number in leave_out:
            continue
        geometry = {
            "ImagePositionPatient": [float(v) for v in np.asarray(origin) + number * spacing[0] * axes[:, 2]],
            "ImageOrientationPatient": [float(v) for v in (*axes[:, 0], *axes[:, 1])],
            "PixelSpacing": [float(spacing[1]), float(spacing[2])],
        }
        special = {key: value(number) if callable(value) else value for key, value in tags.items()}
        name = f"{series.rpartition('.')[2]}_{number:04d}.dcm"
        dicom_slice(plane, number, series, **{**geometry, **special}).save_as(folder / name, enforce_file_format=True)
    return folder


def write_multiframe(
    path: Path, array: np.ndarray, spacing: Sequence[float] = (3.0, 2.0, 2.0), rescale: Sequence[tuple[float, float]] = (), **tags: Any
) -> Path:
    """Write (z, y, x) as one DICOM file with functional groups, frames from bottom to top; `rescale`: slope and intercept of each frame."""
    frames = []
    for number in range(len(array)):
        frame = _nested(PlanePositionSequence=_nested(ImagePositionPatient=[10.0, -20.0, 30.0 + spacing[0] * number]))
        if rescale:
            slope, intercept = rescale[number]
            frame.PixelValueTransformationSequence = [_nested(RescaleSlope=slope, RescaleIntercept=intercept)]
        frames.append(frame)
    shared = _nested(
        PixelMeasuresSequence=_nested(PixelSpacing=[float(spacing[1]), float(spacing[2])]),
        PlaneOrientationSequence=_nested(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames, "SOPClassUID": ENHANCED_MR, "Modality": "MR"}
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom_slice(array, **{**groups, "RescaleSlope": None, "RescaleIntercept": None, **tags}).save_as(path, enforce_file_format=True)
    return path


def _nested(**values: Any) -> Dataset:
    """A DICOM data set; data sets in it become sequences of one item."""
    result = Dataset()
    for key, value in values.items():
        setattr(result, key, [value] if isinstance(value, Dataset) else value)
    return result
