"""Writing a raw dataset folder: images as NIfTI, a record of every finished case, and the indexes made of the records."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, read_json, sha256_json, write_json
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.paths import RAW

TRAINING, UNLABELLED, TEST = "imagesTr", "imagesUn", "imagesTs"
FORMATS = ("nnunet", "pretrain_data")
SETTINGS, RECORDS = "conversion.json", "converted"


@dataclass(frozen=True)
class Record:
    """A finished case; paths are relative to the dataset folder.

    Args:
        identifier, subject, session, modalities: as in `io.index.Case`.
        images: one file per channel.
        source: name, size and time of change of every file it was made from.
        label: its segmentation; "" without one.
        label_values: the values in it.
        masks: files of the masks by their field of `Case`.
        category: class of the whole volume; "" without one.
        fold: part of a cross-validation; "" without one.
        crop: which part of which case it is; empty for whole cases.
    """

    identifier: str
    subject: str
    session: str
    modalities: list[str]
    images: list[str]
    source: list[list[Any]]
    label: str = ""
    label_values: list[int] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)
    category: str = ""
    fold: str = ""
    crop: dict[str, Any] = field(default_factory=dict)

    @property
    def subfolder(self) -> str:
        return self.images[0].partition("/")[0]

    @property
    def files(self) -> list[str]:
        return [*self.images, *self.masks.values(), *([self.label] if self.label else [])]


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make sure that a folder is new or was begun with the same settings; call it under the folder's lock.

    Raises:
        UserError: it holds something else.
    """
    file, fix = folder / SETTINGS, "choose another ID or name, or delete the folder"
    if not file.is_file() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError("the dataset folder exists and was not made by nnssl_convert", folder, fix)
    if file.is_file() and sha256_json(read_json(file)) != sha256_json(settings) and any((folder / RECORDS).glob("*.json")):
        raise UserError("the dataset folder holds the result of a conversion with other options or of another source", folder, fix)
    write_json(file, settings)


def save(folder: Path, record: Record) -> None:
    """Write a record; it comes last and marks the case as whole."""
    write_json(_record_file(folder, record.identifier), dataclasses.asdict(record))


def remove(folder: Path, record: Record) -> None:
    """Remove a record and then its files."""
    _record_file(folder, record.identifier).unlink(missing_ok=True)
    for name in record.files:
        (folder / name).unlink(missing_ok=True)


def load(folder: Path, identifier: str) -> Record | None:
    """The record of a finished case whose files are all there, or None."""
    file = _record_file(folder, identifier)
    try:
        record = Record(**read_json(file)) if file.is_file() else None
    except (UserError, TypeError):
        return None
    return record if record and all((folder / name).is_file() for name in record.files) else None


def load_all(folder: Path) -> list[Record]:
    """All finished cases, sorted by identifier."""
    found = (load(folder, path.name.removesuffix(".json")) for path in sorted((folder / RECORDS).glob("*.json")) if not path.name.startswith("."))
    return [record for record in found if record is not None]


def _record_file(folder: Path, identifier: str) -> Path:
    return folder / RECORDS / f"{identifier}.json"


def write_nifti(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a volume as NIfTI; equal volumes make equal files.

    Args:
        path: ends in `.nii` or `.nii.gz`.
        array: (z, y, x) float32; stored as the smallest integer type that holds all its values exactly, else as float32.
        geometry: where it lies.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3)) * np.asarray(geometry.spacing)[::-1]
    affine[:3, 3] = geometry.origin
    image = nibabel.Nifti1Image(array.astype(integer_type(array), copy=False).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    image.set_qform(image.affine, "scanner")
    image.set_sform(image.affine, "scanner")
    image.header.set_xyzt_units("mm")
    write_image(path, image)


def write_image(path: Path, image: nibabel.Nifti1Image) -> None:
    """Write a NIfTI image as `.nii` or `.nii.gz`, whole or not at all."""
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, 6, mtime=0) if path.suffix == ".gz" else content)


def integer_type(array: np.ndarray) -> type[np.generic]:
    """The smallest of uint8, int16, uint16 and int32 that holds all values exactly, else float32."""
    if not np.array_equal(array, np.rint(array)):
        return np.float32
    low, high = float(array.min()), float(array.max())
    kinds: tuple[type[np.integer[Any]], ...] = (np.uint8, np.int16, np.uint16, np.int32)
    return next((kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), np.float32)


def indexes(modalities: Sequence[tuple[str, ...]], wanted: str | None) -> tuple[bool, bool]:
    """Which indexes a dataset gets: (`dataset.json`, `pretrain_data.json`).

    nnU-Net's `dataset.json` needs the same channels in every case; nnssl's `pretrain_data.json`, which is the one read
    where both exist, keeps subjects and sessions, but knows one-channel images only.

    Args:
        modalities: of every case.
        wanted: one of `FORMATS`; None takes both where no information is lost.

    Raises:
        UserError: `dataset.json` is wanted, but the cases have different channels.
    """
    alike, single = len(set(modalities)) <= 1, all(len(names) == 1 for names in modalities)
    if wanted == "nnunet" and not alike:
        different = ", ".join(sorted({"+".join(names) for names in modalities})[:6])
        raise UserError(f"the cases have different channels ({different}), dataset.json knows one set", "option -format", "use -format pretrain_data")
    return alike, wanted == "pretrain_data" or (wanted is None and (single or not alike))


def write_indexes(folder: Path, ending: str, description: Mapping[str, Any], wanted: str | None) -> None:
    """Write `dataset.json` and `pretrain_data.json`, as `indexes` says, and `classes.csv` where volumes have classes.

    Args:
        folder: the dataset folder with its records.
        ending: of all image files, such as ".nii.gz".
        description: fields of `dataset.json` that are known; "labels" is made of the values found if it is missing.
        wanted: see `indexes`.
    """
    records = load_all(folder)
    chosen = indexes([tuple(record.modalities) for record in records], wanted) if records else (False, False)
    contents = (_dataset_json(records, ending, description), _pretrain_data(folder.name, records)) if records else ({}, {})
    for name, content, needed in zip(("dataset.json", "pretrain_data.json"), contents, chosen):
        if needed:
            write_json(folder / name, content)
        else:
            (folder / name).unlink(missing_ok=True)


def _dataset_json(records: Sequence[Record], ending: str, description: Mapping[str, Any]) -> dict[str, Any]:
    largest = max((value for record in records for value in record.label_values), default=0)
    labels = {"background": 0, **{f"label_{value}": value for value in range(1, largest + 1)}}
    subjects = {record.identifier: record.subject for record in records if record.subject != record.identifier}
    return {
        "channel_names": {str(number): name for number, name in enumerate(records[0].modalities)},
        "labels": labels,
        "numTraining": sum(record.subfolder == TRAINING for record in records),
        "file_ending": ending,
        **({"subjects": subjects} if subjects else {}),
        **description,
    }


def _pretrain_data(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """The cases in nnssl's schema without those of the test set; nothing about the patients."""
    subjects: dict[str, Any] = {}
    for record in records:
        if record.subfolder == TEST:
            continue
        subject = subjects.setdefault(record.subject, {"subject_id": record.subject, "subject_info": {}, "sessions": {}})
        session = subject["sessions"].setdefault(record.session, {"session_id": record.session, "session_info": {}, "images": []})
        masks = {key: f"${RAW}/{name}/{mask}" for key, mask in record.masks.items()} or None
        for path, modality in zip(record.images, record.modalities):
            title = record.identifier if len(record.images) == 1 else Path(path).name
            image = {"name": title, "modality": modality, "image_path": f"${RAW}/{name}/{path}", "image_info": {}, "associated_masks": masks}
            session["images"].append(image)
    number = name.removeprefix("Dataset").partition("_")[0]
    return {
        "collection_index": int(number),
        "collection_name": name,
        "datasets": {number: {"dataset_index": number, "name": name, "dataset_info": {}, "subjects": subjects}},
    }
