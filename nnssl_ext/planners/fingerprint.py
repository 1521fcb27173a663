"""What a dataset is like and what is wrong with it: spacings, shapes, body boxes, intensities, verdicts; one pass over every file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext import __version__
from nnssl_ext.core.errors import ImageError, UserError
from nnssl_ext.core.files import FolderLock, sha256_json, write_json, write_text
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.paths import index_cache, preprocessed_folder, raw_folder
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io import journal
from nnssl_ext.io.case import split_selector
from nnssl_ext.io.index import MASKS, Case, read_index
from nnssl_ext.io.integrity import QUARANTINED, Finding, Look, collection_findings, content_hash, geometry_findings, verdict_of, volume_findings
from nnssl_ext.io.readers import files_of, read_case, read_header, stamps, warnings_of
from nnssl_ext.preprocessing.crop import body_mask, bounding_box
from nnssl_ext.preprocessing.parallel import Workers, run_all

SCHEMA_VERSION = 1
PASS_VERSION = 1  # of what is recorded of a case; a change makes every file be read again
CACHE = "fingerprint_cache"  # folder of the journal
SAMPLES = 10_000  # body voxels drawn from each channel of a case, of a dataset of up to 1,000 channels
TOTAL_SAMPLES = 10_000_000  # of all channels of all cases; 40 MB
BYTES_PER_VOXEL = 12  # of a channel while it is looked at


@dataclass(frozen=True)
class Examination:
    """What a pass over a dataset has found.

    Args:
        dataset_name: `DatasetXXX_NAME`.
        cases: all cases of its index.
        described: the fingerprint's entry of each case that could be read, by name in alphabetical order.
        samples: intensities of the body of each channel, for the same cases; empty lists where no voxel was read.
        findings: by case; empty lists for cases without any.
        failed: message of each case that could not be read.
        sha256: `content_hash` of each channel, by case; empty where no voxel was read.
    """

    dataset_name: str
    cases: list[Case]
    described: dict[str, dict[str, Any]]
    samples: dict[str, list[np.ndarray]]
    findings: dict[str, list[Finding]]
    failed: dict[str, str]
    sha256: dict[str, list[str]]

    def verdict(self, name: str) -> str:
        return verdict_of(self.findings[name], name in self.failed)

    def counts(self) -> dict[str, int]:
        """How many cases have each verdict."""
        verdicts = [self.verdict(name) for name in self.findings]
        return {verdict: verdicts.count(verdict) for verdict in ("ok", "warning", QUARANTINED)}


def extract_fingerprint(dataset_name: str, workers: Workers) -> dict[str, Any]:
    """Read every case of a dataset and write its fingerprint, see `examine`.

    Returns:
        the fingerprint: `cases` (shape and spacing (z, y, x) in voxels and mm, body box, modalities), `intensities` of the
        body by modality, `failed` (message by case).

    Raises:
        UserError: unreadable index, or not a single readable case.
        DiskError: the disk is full or failing.
    """
    found = examine(dataset_name, workers)
    if not found.described:
        first, message = next(iter(found.failed.items()))
        raise UserError(f"no case of {dataset_name} could be read; {first}: {message.splitlines()[0]}", raw_folder(dataset_name), "mend the files")
    return _fingerprint(found)


def examine(dataset_name: str, workers: Workers) -> Examination:
    """Read every file of a dataset once, judge it, and write `integrity.json`, `dataset_fingerprint.json` and `pretrain_data.json`.

    They are written to its preprocessed folder, the last two only if any case can be read. What was found of a case is kept there
    too: an interrupted pass goes on where it was, and a later one reads only files that are new, changed or quarantined.

    Args:
        dataset_name: `DatasetXXX_NAME`.
        workers: who does the work.

    Raises:
        UserError: unreadable index.
        DiskError: the disk is full or failing.
    """
    folder = preprocessed_folder(dataset_name)
    with FolderLock(folder):
        cases = read_index(raw_folder(dataset_name), index_cache(dataset_name), workers.processes)
        found = _pass(dataset_name, cases, folder / CACHE, workers)
        _write_by_line(folder / "integrity.json", _integrity(found))
        if found.described:
            _write_by_line(folder / "dataset_fingerprint.json", _fingerprint(found))
            write_json(folder / "pretrain_data.json", _index(dataset_name, cases))
    return found


def examine_headers(dataset_name: str, workers: Workers) -> Examination:
    """A quick look at sizes, spacings and positions; no voxel is read and nothing is written.

    Raises:
        UserError: unreadable index.
    """
    cases = read_index(raw_folder(dataset_name), processes=workers.processes)
    errors: dict[str, Finding] = {}
    read, failed = run_all(_describe_header, cases, [case.identifier for case in cases], workers, f"headers of {dataset_name}")
    for name in [name for name, content in read.items() if "error" in content]:
        errors[name], failed[name] = _refused(read.pop(name)["error"])
    return _examination(dataset_name, cases, read, failed, errors)


def sample_count(channels: int) -> int:
    """Intensities drawn from each of `channels` (of all cases together) so that memory stays bounded: 10,000, 1,000 or 100.

    Steps of ten, so that cases can be added without reading the others again.
    """
    return next((count for count in (SAMPLES, SAMPLES // 10) if channels * count <= TOTAL_SAMPLES), SAMPLES // 100)


def _pass(dataset_name: str, cases: Sequence[Case], cache: Path, workers: Workers) -> Examination:
    wanted = sample_count(len(cases) * len(cases[0].images))
    usable = {(record["name"], record["stamp"]) for record in journal.records(cache) if "error" not in record and _suffices(record, wanted)}
    known = {name for name, _ in usable}
    states = {case.identifier: _stamp(case) for case in cases if case.identifier in known}
    states = {name: stamp for name, stamp in states.items() if (name, stamp) in usable}
    waiting = [case for case in cases if case.identifier not in states]
    if states:
        print(f"fingerprint of {dataset_name}: {len(states)} of {len(cases)} cases are known already, their files are unchanged")
    done: dict[str, str] = {}
    failed: dict[str, str] = {}
    if waiting:
        work = partial(_record, cache=cache, samples=wanted)
        done, failed = run_all(work, waiting, [case.identifier for case in waiting], workers, f"fingerprint of {dataset_name}", _memory)
    states |= done
    read: dict[str, dict[str, Any]] = {}
    errors: dict[str, Finding] = {}
    for record in journal.records(cache):
        name = record["name"]
        if "error" in record:
            finding, message = _refused(record["error"])
            if failed.get(name) == message:
                errors[name] = finding
        elif states.get(name) == record["stamp"] and _suffices(record, wanted):
            read[name] = record
    for name in done.keys() - read.keys():
        failed[name] = str(UserError("what was found of the case did not arrive", cache, "make sure that all workers see the same nnssl_preprocessed"))
    if waiting or len(read) < len(known):
        journal.compact(cache, (read[name] for name in sorted(read)))
    for name in read:
        read[name]["samples"] = [
            _drawn(_decoded(text), total, wanted, name, channel) for channel, (text, total) in enumerate(zip(read[name]["samples"], read[name]["totals"]))
        ]
    return _examination(dataset_name, cases, read, failed, errors)


def _examination(
    dataset_name: str, cases: Sequence[Case], read: Mapping[str, dict[str, Any]], failed: Mapping[str, str], errors: Mapping[str, Finding]
) -> Examination:
    names = sorted(read)
    described = {name: read[name]["case"] for name in names}
    sha256 = {name: read[name]["sha256"] for name in names}
    beside = collection_findings(described, sha256)
    findings = {name: [*(Finding(*finding) for finding in read[name]["findings"]), *beside.get(name, [])] for name in names}
    for name, message in failed.items():
        findings[name] = [errors.get(name) or Finding("unexpected", message.splitlines()[0], "see the message of the program")]
    samples = {name: read[name]["samples"] for name in names}
    return Examination(dataset_name, list(cases), described, samples, dict(sorted(findings.items())), dict(sorted(failed.items())), sha256)


def _record(case: Case, cache: Path, samples: int) -> str:
    """Read a case and write what was found, or why it can't be read, to the journal; returns the state of its files."""
    stamp = _stamp(case)
    try:
        found = _describe(case, samples)
    except ImageError as error:
        journal.append(cache, {"name": case.identifier, "stamp": stamp, "error": list(error.args)})
        raise
    found["samples"] = [base64.b64encode(np.asarray(values, "<f4").tobytes()).decode() for values in found["samples"]]
    journal.append(cache, {"name": case.identifier, "stamp": stamp, **found})
    return stamp


def _describe(case: Case, samples: int = SAMPLES) -> dict[str, Any]:
    array, geometry = read_case(case)
    masks = [body_mask(channel, modality) for channel, modality in zip(array, case.modalities)]
    box = bounding_box(masks[0] if len(masks) == 1 else np.any(masks, axis=0))
    drawn, totals, findings = [], [], _known_findings(case, geometry)
    for channel, (volume, mask) in enumerate(zip(array, masks)):
        found = volume_findings(Look.at(volume, mask, case.modalities[channel]))
        where = f"channel {channel}: " if len(array) > 1 else ""
        findings += [[finding.kind, where + finding.sentence, finding.fix] for finding in found]
        inside = volume[mask] if mask.any() else volume.ravel()
        drawn.append(_drawn(inside, len(inside), samples, case.identifier, channel))
        totals.append(len(inside))
    body = {"body_box": [list(edge) for edge in box], "shape_after_crop": [high - low for low, high in box]}
    description = {**_description(case, geometry), **body}
    return {"case": description, "samples": drawn, "totals": totals, "sha256": [content_hash(volume) for volume in array], "findings": findings}


def _describe_header(case: Case) -> dict[str, Any]:
    """As `_describe`, or why the case can't be read, as values."""
    try:
        geometries = [read_header(path) for path in case.images]
        if any(other.shape != geometries[0].shape for other in geometries):
            raise ImageError("mismatch", f"channels of case {case.identifier} differ in shape", case.images[0], "resample them to one grid")
        return {"case": _description(case, geometries[0]), "samples": [], "sha256": [], "findings": _known_findings(case, geometries[0])}
    except ImageError as error:
        return {"error": list(error.args)}


def _description(case: Case, geometry: Geometry) -> dict[str, Any]:
    bytes_of_files = sum(file.stat().st_size for file in dict.fromkeys(file for path in case.images for file in files_of(path)))
    return {"subject": case.subject, "modalities": list(case.modalities), **geometry.as_dict(), "file_bytes": bytes_of_files}


def _known_findings(case: Case, geometry: Geometry) -> list[list[str]]:
    """What header and file format tell."""
    told = [[kind, sentence, "nothing needs to be done if that is right"] for path in case.images for kind, sentence in warnings_of(path)]
    return told + [[finding.kind, finding.sentence, finding.fix] for finding in geometry_findings(geometry)]


def _refused(error: Sequence[str]) -> tuple[Finding, str]:
    """Why a case can't be read: as a finding, and as a message."""
    kind, what, _, fix = error
    return Finding(kind, what, fix), str(ImageError(*error))


def _stamp(case: Case) -> str:
    """Changes with every file of a case (name, size, time of change) and with what the index says of it."""
    return sha256_json([PASS_VERSION, case.subject, case.modalities, [str(path) for path in case.images], stamps(case.images)])


def _memory(case: Case) -> int:
    """Bytes that looking at a case takes at most; 0 where that can't be known at once (a folder, a broken file)."""
    try:
        return 0 if split_selector(case.images[0])[0].is_dir() else BYTES_PER_VOXEL * len(case.images) * int(np.prod(read_header(case.images[0]).shape))
    except UserError:
        return 0


def _drawn(values: np.ndarray, total: int, count: int, identifier: str, channel: int) -> np.ndarray:
    """`count` of a channel's `total` body voxels; `values` are all of them, or some that were drawn earlier.

    The first draws are the same whatever their number, and a case's voxels don't depend on the other cases.
    """
    if total <= count:
        return values
    if len(values) < total:
        return values[:count]
    return values[sample_rng(0, channel, f"fingerprint {identifier}").integers(0, total, count)]


def _suffices(record: Mapping[str, Any], wanted: int) -> bool:
    return all(len(text) * 3 // 16 >= min(wanted, total) for text, total in zip(record["samples"], record["totals"]))


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _fingerprint(found: Examination) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset_name": found.dataset_name,
        "nnssl_ext_version": __version__,
        "channels": len(found.cases[0].images),
        "cases": found.described,
        "intensities": {modality: _statistics(values) for modality, values in pooled_samples(found).items()},
        "failed": found.failed,
    }


def _integrity(found: Examination) -> dict[str, Any]:
    cases = {
        name: {"verdict": found.verdict(name), "sha256": found.sha256.get(name, []), "findings": [finding.as_dict() for finding in findings]}
        for name, findings in found.findings.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset_name": found.dataset_name,
        "nnssl_ext_version": __version__,
        "summary": found.counts(),
        "cases": cases,
    }


def _write_by_line(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with a line for each case."""

    def text(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    def lines(entries: Iterable[tuple[str, Any]]) -> str:
        return ",\n".join(f"{text(key)}: {text(value)}" for key, value in entries)

    parts = [f"{text(key)}: " + (f"{{\n{lines(value.items())}\n}}" if key == "cases" else text(value)) for key, value in content.items()]
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def pooled_samples(found: Examination) -> dict[str, np.ndarray]:
    """Intensities of the body of all cases, by modality."""
    by_modality: dict[str, list[np.ndarray]] = {}
    for name, case in found.described.items():
        for modality, values in zip(case["modalities"], found.samples[name]):
            by_modality.setdefault(modality, []).append(values)
    return {modality: np.concatenate(parts) for modality, parts in sorted(by_modality.items())}


def _statistics(values: np.ndarray) -> dict[str, float]:
    values = values.astype(np.float64)
    low, median, high = (float(v) for v in np.percentile(values, (0.5, 50, 99.5)))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "median": median,
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_00_5": low,
        "percentile_99_5": high,
        "voxels": len(values),
    }


def _index(dataset_name: str, cases: list[Case]) -> dict[str, Any]:
    """The cases in nnssl's schema, whatever index they came from; nothing about the patients."""
    subjects: dict[str, Any] = {}
    for case in cases:
        subject = subjects.setdefault(case.subject, {"subject_id": case.subject, "subject_info": {}, "sessions": {}})
        session = subject["sessions"].setdefault(case.session, {"session_id": case.session, "session_info": {}, "images": []})
        found = {key: getattr(case, key) for key in MASKS}
        masks = {key: _portable(mask) if mask else None for key, mask in found.items()} if any(found.values()) else None
        for path, modality in zip(case.images, case.modalities):
            session["images"].append({"name": path.name, "modality": modality, "image_path": _portable(path), "image_info": {}, "associated_masks": masks})
    number = dataset_name.removeprefix("Dataset").partition("_")[0]
    datasets = {number: {"dataset_index": number, "name": dataset_name, "dataset_info": {}, "subjects": subjects}}
    return {"collection_index": int(number), "collection_name": dataset_name, "datasets": datasets}


def _portable(path: Path) -> str:
    folder = raw_folder("").resolve()
    resolved = path.resolve()
    return f"$nnssl_raw/{resolved.relative_to(folder).as_posix()}" if resolved.is_relative_to(folder) else str(path)
