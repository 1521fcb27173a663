"""results.json of a benchmark that never ran, with record files and pictures, for tests of its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

DATASET = "Dataset902_PhantomLabelled"
CONTROL, BOUND = "MAETrainer on noise", "all labels"
GAINS = {"scratch": 0.0, "MAETrainer": 0.09, "DINOv2Trainer": 0.05, "VoCoTrainer": 0.015, CONTROL: 0.002}
ORGANS = ("liver", "spleen", "left kidney", "aorta", "bowel")
ROLES = {"scratch": "baseline", "random weights": "baseline", "raw intensities": "baseline", "MIND": "baseline", "initial": "baseline"}
ROLES |= {CONTROL: "negative control", BOUND: "upper bound"}


def make_results(
    methods: Sequence[str] = ("MAETrainer", "DINOv2Trainer", CONTROL),
    labels: Sequence[int] = (2, 4, 8),
    seeds: int = 3,
    cases: int = 12,
    modes: Sequence[str] = ("full", "frozen"),
    families: Sequence[str] = ("resenc",),
    kinds: Sequence[str] = ("pretrain", "segmentation", "probe", "classification", "registration"),
) -> dict[str, Any]:
    """The content of the file; modes but the first one have the fewest labels only."""
    rng, runs = np.random.default_rng(0), []
    hardness = rng.normal(0, 0.05, cases)
    for family in families:
        for seed in range(seeds):
            for method in methods:
                runs.append(_pretraining(method, family, seed, rng))
            for method in ("scratch", *methods):
                settings = [(modes[0], count) for count in labels] + [(mode, labels[0]) for mode in modes[1:] if method != "scratch"]
                for mode, count in settings:
                    quality = 0.45 + 0.09 * np.log2(count) + GAINS[method] * 2 / count**0.5 - (0.1 if mode == "frozen" else 0.0)
                    runs.append(_segmentation(method, family, mode, count, seed, quality, hardness, rng))
            runs.append(_segmentation(BOUND, family, modes[0], 40, seed, 0.88, hardness, rng))
            for method in ("random weights", "raw intensities", *methods):
                if method != "raw intensities" or seed == 0:
                    runs += [_probe(method, family, seed, count, hardness, rng) for count in (1, 5)] + [_classification(method, family, seed, rng)]
            for method in ("random weights", *methods, *(("initial", "MIND") if seed == 0 else ())):
                runs.append(_registration(method, family, seed, rng))
    runs = [run for run in runs if run["kind"] in kinds]
    for number, run in enumerate(runs):
        run["record"] = f"units/{run['kind']}_{number:04d}/record.json"
        if run["kind"] == "segmentation":
            run["pictures"] = {"case_000, prediction and truth": f"units/{run['kind']}_{number:04d}/overlay.png"}
    return {
        "version": "0.9.0",
        "command": "nnssl_benchmark -suite learning -out results/learning --report",
        "suite": {"name": "Learning suite", "description": "Phantoms of 64³ voxels, small networks.", "remarks": ["Phantoms only: no evidence for patients."]},
        "environment": {"python": "3.11.4", "torch": "2.7.1", "cpu": "2 cores", "threads": 1},
        "digest": "8c1f" * 16,
        "runs": runs,
    }


def write_results(out: Path, content: dict[str, Any]) -> None:
    """The file, and those that it names."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(content), encoding="utf-8")
    for run in content["runs"]:
        if run.get("record"):
            (out / run["record"]).parent.mkdir(parents=True, exist_ok=True)
            (out / run["record"]).write_text("{}", encoding="utf-8")
        for file in run.get("pictures", {}).values():
            _overlay(out / file)


def _run(kind: str, method: str, family: str, seed: int, seconds: float, **others: Any) -> dict[str, Any]:
    learned = method in GAINS and method != "scratch"
    seeds = {"pretrain_seed": seed if learned else None, "seed": None if kind == "pretrain" else seed}
    common = {"kind": kind, "method": method, "family": family, "role": ROLES.get(method, "method"), "dataset": DATASET, "mode": None, "labels": None}
    return {**common, **seeds, "seconds": seconds, "cpu_seconds": 0.98 * seconds, "cases": {}, "figures": {}, "curves": {}, "alarms": [], **others}


def _pretraining(method: str, family: str, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    steps = np.arange(0, 400, 10)
    curves = {f"{split}/total": [[int(step), float(value)] for step, value in zip(steps, _decay(steps, rng))] for split in ("train", "val")}
    alarms = ["epoch 3: the gradient norm rose to 12 times the usual"] if (method, seed) == ("DINOv2Trainer", 1) else []
    figures = {"train/total": curves["train/total"][-1][1]}
    return _run("pretrain", method, family, seed, 170 + 5 * rng.random(), dataset="Dataset802_Phantom", curves=curves, figures=figures, alarms=alarms)


def _decay(steps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(np.exp(-steps / 120) + 0.3 + rng.normal(0, 0.01, len(steps)))


def _segmentation(method: str, family: str, mode: str, count: int, seed: int, quality: float, hardness: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    cases = {}
    for number, hard in enumerate(hardness):
        single = {organ: float(np.clip(quality + hard - 0.06 * place + 0.12 + rng.normal(0, 0.03), 0, 1)) for place, organ in enumerate(ORGANS)}
        labels = {organ: {"dice": dice, "nsd": min(1.0, dice + 0.08), "hd95_mm": 2 + 20 * (1 - dice)} for organ, dice in single.items()}
        means: dict[str, float | None] = {name: float(np.mean([figures[name] for figures in labels.values()])) for name in ("dice", "nsd", "hd95_mm")}
        if number == 0 and method == "scratch" and count == 2:
            means["hd95_mm"] = None  # nothing was found in this case
        cases[f"case_{number:03d}"] = {**means, "labels": labels}
    steps = np.arange(0, 300, 10)
    curves = {"train/total": [[int(step), float(value)] for step, value in zip(steps, _decay(steps, rng))]}
    return _run("segmentation", method, family, seed, 60 + 5 * rng.random(), mode=mode, labels=count, cases=cases, curves=curves)


def _probe(method: str, family: str, seed: int, count: int, hardness: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    quality = 0.3 + 0.03 * count + 3 * GAINS.get(method, 0.0) + (0.05 if method == "random weights" else 0.0)
    cases = {
        f"case_{number:03d}": {"knn_dice": quality + hard + float(rng.normal(0, 0.02)), "linear_dice": quality + 0.04 + hard + float(rng.normal(0, 0.02))}
        for number, hard in enumerate(hardness)
    }
    return _run("probe", method, family, seed, 8 + rng.random(), labels=count, cases=cases)


def _classification(method: str, family: str, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    auc = 0.6 + 2 * GAINS.get(method, 0.0) + float(rng.normal(0, 0.02))
    figures = {"auc": {"mean": auc, "low": auc - 0.1, "high": auc + 0.09, "count": 60}, "accuracy": auc - 0.03}
    return _run("classification", method, family, seed, 12 + rng.random(), dataset="Dataset903_PhantomLesions", figures=figures)


def _registration(method: str, family: str, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    dice = {"initial": 0.45, "MIND": 0.67, "random weights": 0.6}.get(method, 0.62 + GAINS.get(method, 0.0))
    pairs = {}
    for number in range(6):
        value = dice + float(rng.normal(0, 0.02))
        pairs[f"pair_{number}"] = {
            "dice": value,
            "hd95_mm": 4 + 10 * (1 - value),
            "tre_mm": 6 * (1 - value),
            "sd_log_j": 0.1 + 0.1 * value,
            "seconds": 3 + rng.random(),
        }
    return _run("registration", method, family, seed, 20 + rng.random(), dataset="Dataset803_PhantomPairs", cases=pairs)


def _overlay(path: Path) -> None:
    image = Image.fromarray(np.tile(np.linspace(30, 120, 1200).astype(np.uint8)[None, :, None], (400, 1, 3)))
    draw = ImageDraw.Draw(image)
    for place, colour in enumerate(("#ff8787", "#74c0fc", "#8ce99a")):
        draw.ellipse((120 + 400 * place, 80, 320 + 400 * place, 300), outline=colour, width=8)
    image.save(path)
