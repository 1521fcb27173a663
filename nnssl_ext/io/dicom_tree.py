"""A tree of DICOM files, as archives export it -> cases, one per series. Patients are named by hashes only."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from nnssl_ext.io.case import Case, join_name
from nnssl_ext.io.dicom import FEW_SLICES
from nnssl_ext.io.dicom_files import Header, read_folder
from nnssl_ext.io.tree import scan_tree

_VERSION = "dicom 1"
_FEW = f"fewer than {FEW_SLICES} slices"
_NOBODY = {"", "0", "anon", "anonymous", "anonymized", "anonymised", "na", "n/a", "none", "patient", "unknown"}  # patient IDs that many patients share


class _Found(NamedTuple):
    """A series in a folder, as the cache keeps it."""

    uid: str
    subject: str  # hash of the patient ID; "" without one
    session: str  # hash of the study's UID
    modality: str
    slices: int
    instances: str  # hash of the UIDs of its files
    alone: bool  # the only series of its folder
    reason: str  # why it is no case; "" if it is one


def read_dicom_tree(folder: Path, cache: Path | None = None, processes: int = 1) -> tuple[list[Case], list[tuple[Path, str]]]:
    """All series of a tree.

    Args:
        folder, cache, processes: as for `scan_tree`.

    Returns:
        cases: image path = folder of the series, `folder#UID` where a folder holds several or a series is spread over several folders. Subject = hash of
            the patient ID, or the name of the top folder where the ID is empty or a placeholder; session = hash of the study.
        left out: (image path, reason) of localisers, series of fewer than three slices, objects that are no images, copies and unreadable files.
    """
    cases, left_out = [], []
    places: dict[tuple[str, str, str], list[tuple[str, _Found]]] = defaultdict(list)
    for name, (series, unreadable) in scan_tree(folder, scan, _VERSION, cache, processes).items():
        left_out += [(folder / name, "unreadable file")] * (unreadable if not series else 0)  # beside a series they are a verdict on it
        for entry in map(_Found._make, series):
            if entry.reason and entry.reason != _FEW:
                left_out.append((_path(folder, name, entry), entry.reason))
            else:
                subject = entry.subject or join_name(Path(name).parts[0] if name != "." else "unknown")
                places[subject, entry.session, entry.uid].append((name, entry))
    for (subject, session, uid), found in sorted(places.items()):
        firsts = list({entry.instances: (name, entry) for name, entry in reversed(found)}.values())[::-1]
        left_out += [(_path(folder, name, entry), "copy of another folder") for name, entry in found if (name, entry) not in firsts]
        name, entry = firsts[0]
        path = _path(folder, name, entry)
        if len(firsts) > 1:
            common = os.path.commonpath([name for name, _ in firsts]) if all(name != "." for name, _ in firsts) else ""
            path = _selected(folder / common, uid)
        if sum(entry.slices for _, entry in firsts) < FEW_SLICES:
            left_out.append((path, _FEW))
        else:
            cases.append(Case(join_name(subject, session, _hash(uid, 4)), subject, session, (path,), (entry.modality,)))
    return cases, sorted(left_out)


def scan(folder: Path) -> tuple[list[_Found], int]:
    """The series of a folder and the number of its files that are DICOM but can't be read."""
    headers, broken = read_folder(folder, groups=False)
    groups: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        groups[header.series if header.is_image else f"{header.series} {header.modality}"].append(header)
    images = sum(group[0].is_image for group in groups.values())
    return [_describe(group, len(groups) == 1 or images == 1 and group[0].is_image) for _, group in sorted(groups.items())], len(broken)


def _describe(group: list[Header], alone: bool) -> _Found:
    first, slices = group[0], sum(header.frames for header in group)
    reason = (
        f"no image ({first.modality or 'unknown modality'})"
        if not first.is_image
        else "localiser"
        if any(header.is_scout for header in group)
        else "secondary capture"
        if first.is_capture and all(plane.position is None for header in group for plane in header.planes)
        else "no SeriesInstanceUID in a folder of several series"
        if not first.series and not alone
        else _FEW
        if slices < FEW_SLICES
        else ""
    )
    patient = "" if first.patient.lower().strip(" ._-") in _NOBODY else _hash(first.patient, 6)
    instances = _hash("\n".join(sorted(header.instance or header.file.name for header in group)), 8)
    return _Found(first.series, patient, _hash(first.study, 4) if first.study else "1", first.modality or "unknown", slices, instances, alone, reason)


def _path(folder: Path, name: str, entry: _Found) -> Path:
    return folder / name if entry.alone else _selected(folder / name, entry.uid)


def _selected(folder: Path, uid: str) -> Path:
    return folder.parent / f"{folder.name}#{uid}"


def _hash(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=size).hexdigest()
