"""Does one modality help to reconstruct the other? MultiMAETrainer on registered phantoms, judged on subjects that it never saw.

``python -m benchmarks.multimodal``: trains a small Primus once for each seed, one core, then hides two thirds of one modality's tokens
and reconstructs them with none, some and all tokens of the other modality visible, and with all of another subject's instead.
Prints a Markdown table, which grows with the seeds: median and range over them of the mean squared error of normalised tokens
(1 = their mean is all that is known).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import make_plan
from benchmarks.pairs import PairedPhantoms
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.nn.multimodal import hidden_error, normalised_patches
from nnssl_ext.planners import primus
from nnssl_ext.trainers.multi_mae import MultiMAETrainer
from nnssl_ext.trainers.pictures import evaluating
from nnssl_ext.trainers.sinks import VARIABLE

SIZE, SPACING, SMOOTH, PATCH, BATCH = 48, 4.0, 1.0, (32, 32, 32), 8
TRAINED, JUDGED, CROPS = 32, 16, 2  # subjects, crops of each that is judged
STEPS, LR = 2400, 3e-3
NONE, SOME, ALL, OTHER = "alone", "a third of the other modality's", "all of the other modality's", "all of another subject's"


def train(store: PairedPhantoms, seed: int, steps: int) -> MultiMAETrainer:
    """A trained run."""
    network = replace(primus.network((1, 1, 1), PATCH, "nano", 1e3, BATCH), batch_size=BATCH)
    config = MultiMAETrainer.Config(epochs=1, iterations=steps, val_iterations=1, lr=LR, workers=0, seed=seed)
    cases: Any = store
    with tempfile.TemporaryDirectory() as folder:
        trainer = MultiMAETrainer(make_plan(PATCH, "primus", network), "3d_fullres", config, cases, folder, family="primus")
        trainer.fit()
    return trainer


def crops_of(store: PairedPhantoms) -> Tensor:
    """The crops in two opposite corners of every subject, (subjects * CROPS, modalities, z, y, x)."""
    volumes = torch.from_numpy(store.arrays[:, 0]).unflatten(0, (-1, 2))
    (z, y, x), first = PATCH, volumes[:, :, : PATCH[0], : PATCH[1], : PATCH[2]]
    return torch.stack((first, volumes[:, :, -z:, -y:, -x:]), 1).flatten(0, 1)


@torch.no_grad()
def judge(trainer: Any, image: Tensor, modality: int) -> dict[str, np.ndarray]:
    """Error of one modality's hidden tokens for each subject, by what is visible of the other modality; the same tokens are hidden throughout."""
    backbone, count = trainer.backbone, len(image)
    tokens = int(np.prod(backbone.grid))
    orders = torch.stack([torch.from_numpy(sample_rng(0, n, "judged tokens").permutation(tokens)) for n in range(2 * count)]).view(2, count, tokens)
    some = torch.ones(2, count, tokens, dtype=torch.bool).scatter(2, orders[..., : tokens // 3], False)
    target, shifted = normalised_patches(image, backbone.grid, backbone.token), image.clone()
    shifted[:, 1 - modality] = image[:, 1 - modality].roll(CROPS, 0)
    found = {}
    with evaluating(trainer.model):
        for name, shown, other in (
            (NONE, image, torch.ones_like(some[1])),
            (SOME, image, some[1]),
            (ALL, image, torch.zeros_like(some[1])),
            (OTHER, shifted, torch.zeros_like(some[1])),
        ):
            hidden = torch.stack((some[0], other) if modality == 0 else (other, some[0]), 1)
            prediction = torch.cat([trainer.model(*part) for part in zip(shown.split(16), hidden.split(16))])
            own = [part[:, [modality]] for part in (prediction, target, hidden)]
            found[name] = hidden_error(*own)[:, 0].view(-1, CROPS).mean(1).numpy()
    return found


def table(errors: list[list[dict[str, np.ndarray]]]) -> str:
    """Markdown, from the errors of every seed and modality: a row for each modality."""
    names = (NONE, SOME, ALL, OTHER)
    lines = ["| error of | " + " | ".join(names) + f" | subjects for whom '{ALL}' is better than '{NONE}' |", "|---" * (len(names) + 2) + "|"]
    for modality, runs in zip(("CT", "MR"), zip(*errors)):
        cells = []
        for name in names:
            means = [float(run[name].mean()) for run in runs]
            cells.append(f"{statistics.median(means):.3f} ({min(means):.3f} to {max(means):.3f})")
        better = [int((run[ALL] < run[NONE]).sum()) for run in runs]
        lines.append(f"| {modality} | " + " | ".join(cells) + f" | {', '.join(map(str, better))} of {len(runs[0][ALL])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.multimodal", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--subjects", type=int, default=TRAINED, help="that are trained on (default: %(default)s)")
    parser.add_argument(
        "--smooth", type=float, default=SMOOTH, help="voxels, standard deviation of the kernel that smooths the phantoms (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "none"
    store = PairedPhantoms(range(options.subjects), SIZE, SPACING, options.smooth)
    image, errors = crops_of(PairedPhantoms(range(100_000, 100_000 + JUDGED), SIZE, SPACING, options.smooth)), []
    for seed in options.seeds:
        began = time.process_time()
        trainer = train(store, seed, options.steps)
        errors.append([judge(trainer, image, modality) for modality in range(2)])
        print(f"seed {seed}: {time.process_time() - began:.0f} CPU-s\n{table(errors)}", flush=True)


if __name__ == "__main__":
    main()
