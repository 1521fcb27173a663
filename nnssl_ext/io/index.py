"""Which images belong to a dataset: an index file or a folder tree -> cases."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.io import bids, dicom_files, dicom_tree, hdf5, hdf5_tree, table
from nnssl_ext.io.case import ENDINGS, MASKS, Case, join_name, resolve, stem
from nnssl_ext.io.tree import walk

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def read_index(folder: Path, cache: Path | None = None, processes: int = 1) -> list[Case]:
    """All cases of a raw dataset folder, sorted by identifier.

    Args:
        folder: holds, in this order of precedence, `pretrain_data.json` (nnssl), `dataset.json` with `imagesTr/CASE_0000.nii.gz` (nnU-Net),
            `cases.csv`, or is a BIDS, HDF5 or DICOM tree.
        cache: JSON file that remembers what each folder of a DICOM or HDF5 tree holds; a second call opens only files of changed folders.
        processes: how many read headers of a DICOM or HDF5 tree.

    Raises:
        UserError: missing or empty folder, no index and no known tree, malformed index, cases of unequal channels.
    """
    if not folder.is_dir():
        raise UserError("dataset folder not found", folder, "put the raw data there")
    if (folder / "pretrain_data.json").is_file():
        cases = _from_pretrain_data(folder / "pretrain_data.json")
    elif (folder / "dataset.json").is_file():
        cases = _from_nnunet(folder)
    elif (folder / "cases.csv").is_file():
        cases = table.read_table(folder / "cases.csv")
    elif bids.is_bids(folder):
        cases = bids.read_bids(folder)
    else:
        cases = _from_tree(folder, cache, processes)
    if not cases:
        raise UserError("the dataset holds no image", folder, "check its index and its image folders")
    _check(cases, folder)
    return sorted(cases, key=lambda case: case.identifier)


def sessions(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases of one subject and session together; groups sorted by subject and session, cases within by identifier."""
    found: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.identifier):
        found[case.subject, case.session].append(case)
    return [found[key] for key in sorted(found)]


def _from_tree(folder: Path, cache: Path | None, processes: int) -> list[Case]:
    """A DICOM or HDF5 tree; its first file tells which."""
    for place, files, _ in walk(folder):
        for name in (name for name in files if not name.startswith(".") and not name.endswith(ENDINGS)):
            if name.lower().endswith(hdf5.ENDINGS):
                return hdf5_tree.read_hdf5_tree(folder, cache, processes)
            if dicom_files.looks_like_dicom(place / name):
                cases, left_out = dicom_tree.read_dicom_tree(folder, cache, processes)
                for reason, count in Counter(reason for _, reason in left_out).most_common():
                    print(f"{folder.name}: {count} DICOM series left out of the index: {reason}")
                return cases
    raise UserError(
        "the dataset folder holds neither pretrain_data.json nor dataset.json nor cases.csv, and is no BIDS, DICOM or HDF5 tree",
        folder,
        "list its images in a cases.csv; see 'Your own data' in the documentation",
    )


def _from_nnunet(folder: Path) -> list[Case]:
    description = read_json(folder / "dataset.json")
    names = description.get("channel_names", description.get("modality")) if isinstance(description, dict) else None
    if not isinstance(names, dict) or not names or not all(str(number).isdigit() for number in names):
        raise UserError("dataset.json names no channels by number", folder / "dataset.json", 'add "channel_names": {"0": "CT"}')
    modalities = {int(number): str(name) for number, name in names.items()}
    ending = description.get("file_ending", ".nii.gz")
    channels: dict[str, dict[int, Path]] = defaultdict(dict)
    for subfolder in ("imagesTr", "imagesUn"):
        place = folder / subfolder
        for name in os.listdir(place) if place.is_dir() else ():
            if not name.endswith(ending) or name.startswith("."):  # such as what macOS and synchronisation tools leave behind
                continue
            match = _CHANNEL.fullmatch(name.removesuffix(ending))
            if match is None:
                raise UserError("an image's name does not end in a channel number such as _0000", place / name, f"rename it to CASE_0000{ending}")
            channels[match[1]][int(match[2])] = place / name
    wanted = sorted(modalities)
    odd = [f"{case} has {sorted(files)}" for case, files in sorted(channels.items()) if sorted(files) != wanted]
    if odd:
        raise UserError(
            f"dataset.json names the channels {wanted}, {len(odd)} of {len(channels)} cases have others: {_first(odd)}",
            folder,
            "add the missing files or take the cases out",
        )
    names_in_order = tuple(modalities[channel] for channel in wanted)
    subjects = description.get("subjects", {})
    if not isinstance(subjects, dict):
        raise UserError('"subjects" of dataset.json is no table of cases', folder / "dataset.json", 'write "subjects": {"CASE": "SUBJECT"}')
    return [Case(case, str(subjects.get(case, case)), "1", tuple(files[channel] for channel in wanted), names_in_order) for case, files in channels.items()]


def _from_pretrain_data(file: Path) -> list[Case]:
    content = read_json(file)
    cases = []
    try:
        for dataset_id, dataset in content["datasets"].items():
            for subject_id, subject in dataset["subjects"].items():
                for session_id, session in subject["sessions"].items():
                    for image in session["images"]:
                        name = join_name(dataset_id, subject_id, session_id, stem(image["name"]))
                        path = resolve(image["image_path"], file)
                        masks: dict[str, Any] = {
                            key: resolve(mask, file) for key, mask in (image.get("associated_masks") or {}).items() if mask and key in MASKS
                        }
                        cases.append(Case(name, f"{dataset_id}/{subject_id}", str(session_id), (path,), (str(image["modality"]),), **masks))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"pretrain_data.json is malformed: {type(error).__name__} {error}", file, "compare it with the schema in the folder reference"
        ) from None
    return cases


def _check(cases: list[Case], folder: Path) -> None:
    twice = [name for name, count in Counter(case.identifier for case in cases).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} identifiers are used twice: {_first(twice)}", folder, "give the images of a session distinct names")
    usual = Counter(len(case.images) for case in cases).most_common(1)[0][0]
    odd = [case.identifier for case in cases if len(case.images) != usual]
    if odd:
        fix = "give every case the same channels, or every image a case of its own"
        raise UserError(f"most cases have {usual} channels, {len(odd)} of {len(cases)} have others: {_first(odd)}", folder, fix)


def _first(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
