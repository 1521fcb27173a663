"""Units of work: frozen features judged by the probe, by classes of volumes, by registration; and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.benchmark.data import Data, classification_images
from nnssl_ext.benchmark.embedded import CLASSES, PAIRS
from nnssl_ext.benchmark.pretrain import CHECKPOINT
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.evaluation import token_probe
from nnssl_ext.evaluation.classification import STATISTICS, cross_validated, features_of, judge, matched, read_labels
from nnssl_ext.evaluation.feature_files import find_cases
from nnssl_ext.evaluation.registration import PRESETS
from nnssl_ext.evaluation.registration_features import Describer
from nnssl_ext.evaluation.registration_files import INITIAL, METRICS, RegistrationRun
from nnssl_ext.evaluation.registration_pairs import read_pairs
from nnssl_ext.finetuning.pretrained import Pretrained

MIND, INTENSITY = "mind", "intensity"
TITLES = {MIND: "MIND", INTENSITY: "raw intensities"}
_CLASSIFIERS = {"k-NN": "knn_dice", "linear": "linear_dice"}


def probe(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Organs told from single cells: Dice of each test case, for each number of labelled volumes.

    Args:
        settings: "dataset", "labels" (numbers of labelled volumes), "device", "controls" (judge the raw intensities in place of the checkpoint).
        folder: of the unit.
        given: folder with the checkpoint.
    """
    assert given is not None
    pretrained = Pretrained.load(given / CHECKPOINT)
    method = token_probe.RAW_PATCHES if settings["controls"] else pretrained.method
    rows = token_probe.evaluate(pretrained, Data.beside(folder).raw(settings["dataset"]), settings["labels"], settings["device"], only=method)
    found: dict[int, dict[str, dict[str, float | None]]] = {}
    for row in rows:
        case = found.setdefault(row["volumes"], {}).setdefault(row["case"], {})
        case[_CLASSIFIERS[row["classifier"]]] = _finite(row["dice"])
    return {"runs": [{"labels": count, "cases": cases, "figures": _means(cases, _CLASSIFIERS.values())} for count, cases in found.items()]}


def classification(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Classes of volumes, told by a linear head in folds of subjects: AUC and accuracy; `settings` as for `probe`, without labels."""
    assert given is not None
    pretrained, raw = Pretrained.load(given / CHECKPOINT), Data.beside(folder).raw(settings["dataset"])
    lines = read_labels(raw / CLASSES)
    cases = matched(lines, find_cases([classification_images(raw)], pretrained))
    classes = sorted({line.label for line in lines})
    labels, subjects = np.array([classes.index(line.label) for line in lines]), np.array([line.subject for line in lines])
    method = STATISTICS if settings["controls"] else pretrained.method
    predicted = cross_validated(features_of(cases, pretrained, settings["device"], only=method)[method], labels, subjects)
    (found,) = judge({method: predicted}, labels, subjects)
    figures = {name: {key: _finite(getattr(found[name], key)) for key in ("mean", "low", "high")} | {"count": len(lines)} for name in ("auc", "accuracy")}
    each = {line.case: {f"p({name})": float(value) for name, value in zip(classes, values)} for line, values in zip(lines, predicted.probabilities)}
    return {"runs": [{"figures": figures}], "probabilities": each}


def registration(settings: dict[str, Any], folder: Path, given: Path | None) -> dict[str, Any]:
    """Pairs registered zero-shot by the features of a checkpoint, or, with "controls", by MIND and intensities, beside no registration at all.

    Args:
        settings: "dataset", "device", "controls", "registration" (a `suite.Registration`).
        folder: of the unit.
        given: folder with the checkpoint.
    """
    assert given is not None
    raw, wanted = Data.beside(folder).raw(settings["dataset"]), settings["registration"]
    if wanted["preset"] not in PRESETS:
        raise UserError(f"there is no preset '{wanted['preset']}'", "registration", f"known: {', '.join(PRESETS)}")
    preset, mind = PRESETS[wanted["preset"]], PRESETS["mind_default"]
    if wanted["iterations"] is not None:
        preset, mind = (replace(one, iterations=wanted["iterations"]) for one in (preset, mind))
    kinds = (MIND, INTENSITY) if settings["controls"] else ("checkpoint",)
    describe = Describer(Pretrained.load(given / CHECKPOINT), overlap=wanted["overlap"], zoom=wanted["zoom"], device=settings["device"])
    out = folder / "registration"
    _, failed = RegistrationRun(describe, kinds, out, preset, mind).run(read_pairs(raw / PAIRS))
    if failed:
        raise UserError(f"{len(failed)} pairs can't be registered: {next(iter(failed.values()))}", raw / PAIRS, "mend or remove them")
    written = read_json(out / "results.json")
    for volume in out.glob("*/*/*.nii.gz"):  # fields and warped images: large, and written again by nnssl_evaluate_registration
        volume.unlink()
    return {"runs": [_registered(written, kind, folder) for kind in ((INITIAL, *kinds) if settings["controls"] else kinds)]}


def _registered(written: Mapping[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """One run from the results of `RegistrationRun`."""
    cases = {row["pair"]: {name: row[name] for name in METRICS} for row in written["pairs"] if row["features"] == kind}
    for row in written["labels"]:
        if row["features"] == kind:
            cases[row["pair"]].setdefault("labels", {})[str(row["label"])] = {name: row[name] for name in METRICS[:3]}
    pictures = {}
    if kind != INITIAL:
        pair = next(iter(cases))
        pictures[f"{pair}: fixed and moving image in turn, before and after"] = f"registration/{pair}/{kind}/checkerboard.png"
    named = {"method": TITLES.get(kind, kind)} if kind != "checkpoint" else {}
    return {**named, "cases": cases, "figures": _means(cases, METRICS), "pictures": pictures}


def _means(cases: Mapping[str, Mapping[str, Any]], names: Any) -> dict[str, float | None]:
    return {name: _mean([case.get(name) for case in cases.values()]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
