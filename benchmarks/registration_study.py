"""Zero-shot registration of real CT pairs with known displacements, by what backbones learned from other scans.

``python -m benchmarks.registration_study --out FOLDER``: derives unlabelled volumes from two CT scans and pairs from a third one, pretrains two
small networks on the former and gives the pairs to nnssl_evaluate_registration, one thread. What FOLDER already holds is kept, so that it goes on where
it stopped. Writes study.json and study.md, the table.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch

from benchmarks.common import make_plan
from nnssl_ext.cli import evaluate_registration
from nnssl_ext.core.files import read_json, write_json, write_text
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.plan import Plan
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.cohort import derive_pair, derive_volume, merge_organs
from nnssl_ext.evaluation.registration_files import INITIAL, METRICS
from nnssl_ext.evaluation.registration_files import write_field as write_displacement
from nnssl_ext.io.case import Case
from nnssl_ext.io.itk import write_image
from nnssl_ext.planners import primus, resenc
from nnssl_ext.preprocessing.crop import body_mask
from nnssl_ext.preprocessing.preprocessor import Preprocessor
from nnssl_ext.preprocessing.store import CaseStore, write_case
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.sinks import VARIABLE

TRAINED, HELD_OUT = ("thorax_ct", "spine_ct"), "abdomen_ct"
EDGE, SPACING, VOLUMES, PAIRS, LANDMARKS = 96, 3.0, 16, 4, 60
ITERATIONS = 80  # of the instance optimisation
RUNS: dict[str, tuple[type[SSLTrainer], str, tuple[int, int, int], dict[str, Any]]] = {  # method, family, patch, options
    "MAE": (MAETrainer, "resenc", (48, 48, 48), {"batch_size": 2, "iterations": 60, "optimizer": "adamw", "lr": 1e-3, "warmup": 0.05, "clip": 1.0}),
    "DINOv2": (DINOv2Trainer, "primus", (32, 32, 32), {"batch_size": 4, "iterations": 40, "locals": 4, "prototypes": 256}),
}
EPOCHS = 3
FEATURES = {  # of each run of the command; a residual U-Net's cells are 8 voxels, a token 4: both are 12 mm
    "MAE": ["--features", "mind", "intensity", "random", "checkpoint", "-zoom", "2"],
    "DINOv2": ["--features", "random", "checkpoint", "-overlap", "0.25"],
}
NAMES = {"random": "random weights, {}", "checkpoint": "{}"}
SHOWN = ("dice", "hd95_mm", "tre_mm", "epe_mm", "sd_log_j", "folded", "cpu_seconds", "memory_gb")


def cropped(array: np.ndarray) -> np.ndarray:
    """At most EDGE voxels of the last three axes, about the middle."""
    starts = [max(0, (n - EDGE) // 2) for n in array.shape[-3:]]
    return array[(..., *(slice(start, start + EDGE) for start in starts))]


def write(path: Path, array: np.ndarray, spacing: float = SPACING) -> None:
    image = SimpleITK.GetImageFromArray(cropped(array))
    image.SetSpacing((spacing,) * 3)
    write_image(path, image, "the study")


def make_pairs(folder: Path, count: int) -> None:
    """Pairs of the held-out scan with everything that is known of them, each with its list for the command."""
    for index in range(count):
        if (folder / f"pair{index}.json").is_file():
            continue
        pair = derive_pair(0, index, HELD_OUT)
        displacement = cropped(pair.displacement)
        body = body_mask(cropped(pair.fixed.image), "CT")
        inside = np.argwhere(body & (np.abs(displacement).max(0) > 0))
        points = sample_rng(0, index, "landmarks").permutation(inside)[:LANDMARKS]
        moved = points * SPACING + displacement[(slice(None), *points.T)].T
        for part, volume, places in (("fixed", pair.fixed, points * SPACING), ("moving", pair.moving, moved)):
            write(folder / f"{index}_{part}.nii.gz", np.rint(volume.image).astype(np.int16))
            write(folder / f"{index}_{part}_labels.nii.gz", merge_organs(volume.labels))
            write(folder / f"{index}_{part}_mask.nii.gz", body_mask(cropped(volume.image), "CT").astype(np.uint8))
            write_text(folder / f"{index}_{part}.csv", "x,y,z\n" + "".join(f"{x:.4f},{y:.4f},{z:.4f}\n" for z, y, x in places))
        grid = Geometry(body.shape, (SPACING,) * 3)
        write_displacement(folder / f"{index}_true", torch.from_numpy(displacement / SPACING), grid)
        known = {key: [f"{index}_{part}{end}" for part in ("fixed", "moving")] for key, end in _KNOWN.items()}
        images = {part: f"{index}_{part}.nii.gz" for part in ("fixed", "moving")}
        write_json(folder / f"pair{index}.json", [{"name": f"pair{index}", **images, **known, "field": f"{index}_true/disp.nii.gz"}])


_KNOWN = {"labels": "_labels.nii.gz", "masks": "_mask.nii.gz", "keypoints": ".csv"}


def plan(family: str, patch: tuple[int, int, int]) -> Plan:
    size = (SPACING,) * 3
    if family == "resenc":
        network = resenc.network(size, patch, "nano", 1e3, 2)
    else:
        network = primus.network(size, patch, "nano", 1e3, 2)
        network = replace(network, kwargs={**network.kwargs, "patch_embed_size": [4, 4, 4]})
    made = make_plan(patch, family, network)
    return replace(made, configurations={name: replace(config, spacing=size) for name, config in made.configurations.items()})


def make_store(folder: Path, made: Plan) -> CaseStore:
    """Preprocessed volumes derived from the scans that are trained on."""
    config = made.configuration("3d_fullres")
    for index in range(VOLUMES):
        source, name = TRAINED[index % len(TRAINED)], f"volume{index:02}"
        if not (folder / f"{name}.json").is_file():
            volume = derive_volume(0, index, source, pseudo_mr=0.0)
            write(folder / "images" / f"{name}.nii.gz", np.rint(volume.image).astype(np.int16), volume.geometry.spacing[0])
            finished = Preprocessor(config).run(Case(name, source, name, (folder / "images" / f"{name}.nii.gz",), ("CT",)))
            write_case(folder, name, finished.array, finished.info, config.patch_size)
    return CaseStore(folder)


def pretrain(name: str, folder: Path) -> Path:
    """A finished checkpoint."""
    method, family, patch, options = RUNS[name]
    checkpoint = folder / name / "checkpoint_final.pth"
    if not checkpoint.is_file():
        made = plan(family, patch)
        store = make_store(folder / "store", made)
        config = method.Config(epochs=EPOCHS, val_iterations=2, workers=0, **options)
        method(made, "3d_fullres", config, store, folder / name, family=family).fit(resume=(folder / name / "checkpoint_latest.pth").is_file())
    return checkpoint


def register(name: str, checkpoint: Path, folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows of all pairs."""
    rows = []
    for index in range(count):
        out = folder / "registered" / name / f"pair{index}"
        if not (out / "results.json").is_file():
            common = ["-ckpt", str(checkpoint), "-pairs", str(folder / "pairs" / f"pair{index}.json"), "-out", str(out)]
            if evaluate_registration.main([*common, "-iterations", str(ITERATIONS), "-device", "cpu", *FEATURES[name]]):
                raise SystemExit(f"{name} failed on pair {index}")
        rows += [{**row, "method": _label(row["features"], name)} for row in read_json(out / "results.json")["pairs"]]
    return rows


def _label(features: str, name: str) -> str:
    return NAMES.get(features, features).format(name if features == "checkpoint" else f"{RUNS[name][1]}")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean over the pairs, and the smallest and largest of Dice and end-point error."""
    lines = ["| features | pairs | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["pair"]: row for row in rows if row["method"] == method}.values()
        cells = []
        for metric in SHOWN:
            values = [row[metric] for row in own if row[metric] is not None]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if values and metric in ("dice", "epe_mm") else ""
            cells.append(f"{np.mean(values):.3g}{spread}" if values else "-")
        lines.append(f"| {method} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.registration_study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how many (default: %(default)s)")
    options = parser.parse_args()
    folder: Path = options.out
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "none"
    for part in ("pairs", "store/images"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    checkpoints = {name: pretrain(name, folder) for name in RUNS}
    make_pairs(folder / "pairs", options.pairs)
    rows = [row for name, checkpoint in checkpoints.items() for row in register(name, checkpoint, folder, options.pairs)]
    rows.sort(key=lambda row: row["method"] != INITIAL)
    assert set(SHOWN) <= set(METRICS)
    write_json(folder / "study.json", {"rows": rows, "held_out": HELD_OUT, "trained": TRAINED, "iterations": ITERATIONS})
    write_text(folder / "study.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
