"""Does RegistrationPretextTrainer learn to register? End-point error on phantoms that it has not seen, bent by known warps.

The smallest residual U-Net, 32^3 voxels of 3 mm, trained once for each of three seeds on one thread, all pairs known. The peer is the
identity: the ratio is the mean length of the true displacements over the mean end-point error.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import phantoms
from benchmarks.common import THREADS, Result, make_plan
from nnssl_ext.data.augment import DINO
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.random_warp import RegistrationPair
from nnssl_ext.data.views import Crop
from nnssl_ext.nn.registration_losses import end_point_error
from nnssl_ext.nn.warp import jacobian_determinant
from nnssl_ext.planners import resenc
from nnssl_ext.trainers.pictures import evaluating
from nnssl_ext.trainers.registration_pretext import RegistrationPretextTrainer
from nnssl_ext.trainers.sinks import VARIABLE

SIZE, SPACING, PATCH = 64, 3.0, (32, 32, 32)  # voxels per edge of a phantom, mm, voxels of a crop
SEEDS, EPOCHS, ITERATIONS, BATCH = 3, 5, 120, 2
OPTIONS = {"optimizer": "adamw", "lr": 2e-3, "warmup": 0.05, "known": 1.0}  # SGD with momentum 0.99 has hardly begun after a few hundred steps
CROPS, TESTED = 4, 10  # of each of the 40 phantoms that were held back; of which so many at a time


def train(data: Path, folder: Path, seed: int, iterations: int = ITERATIONS, **options: Any) -> RegistrationPretextTrainer:
    """A trained method.

    Args:
        data: folder of `phantoms.make`.
        folder: of the results.
    """
    network = resenc.network((SPACING,) * 3, PATCH, "nano", 1e3, BATCH)
    config = {"epochs": EPOCHS, "iterations": iterations, "val_iterations": 4, "batch_size": BATCH, "workers": 0, "seed": seed, **OPTIONS, **options}
    store: Any = phantoms.PhantomStore(data)
    made = RegistrationPretextTrainer(make_plan(PATCH, "resenc", network), "3d_fullres", RegistrationPretextTrainer.Config(**config), store, folder)
    made.fit()
    return made


class HeldBack(phantoms.PhantomStore):
    """The volumes that nothing was pretrained with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images, self.bodies = self.images[phantoms.UNLABELLED :], self.bodies[phantoms.UNLABELLED :]

    def __len__(self) -> int:
        return len(self.images)


@torch.no_grad()
def errors(trainer: RegistrationPretextTrainer, data: Path) -> dict[str, float]:
    """Mean end-point error of the identity and of the network, voxels, and the share of voxels where its displacement folds space.

    All seeds are judged by the same crops and warps.
    """
    store: Any = HeldBack(data)
    spec = RegistrationPair(Crop(PATCH, intensity=DINO), None, 1.0, trainer.config.largest)
    batches = StepDataset(store, spec, range(len(store)), 0, TESTED, stream="test")
    found: dict[str, list[float]] = {"identity": [], "trained": [], "folded": []}
    with evaluating(trainer.model):
        for step in range(CROPS * len(store) // TESTED):
            fixed, moving, true = (batches[step][name].image for name in ("fixed", "moving", "displacement"))
            displacement = trainer.model(fixed, moving)[1]
            found["identity"] += end_point_error(torch.zeros_like(true), true).tolist()
            found["trained"] += end_point_error(displacement, true).tolist()
            found["folded"] += (jacobian_determinant(displacement) <= 0).float().mean((1, 2, 3)).tolist()
    return {name: statistics.mean(values) for name, values in found.items()}


def run(quick: bool) -> Result:
    os.environ[VARIABLE] = "none"
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "phantoms"
        phantoms.make(data, THREADS, SIZE, SPACING)
        for seed in range(1 if quick else SEEDS):
            began = time.process_time()
            trainer = train(data, Path(folder) / str(seed), seed, iterations=10 if quick else ITERATIONS)
            runs.append({"cpu_seconds": round(time.process_time() - began), **errors(trainer, data)})
    ratios = [found["identity"] / found["trained"] for found in runs]
    ours, peer = (statistics.median(found[name] for found in runs) for name in ("trained", "identity"))
    detail = {"seeds": [{name: round(value, 4) for name, value in found.items()} for found in runs], "threads": 1}
    return Result(statistics.median(ratios), min(ratios), max(ratios), ours, peer, "the identity", "voxels", detail)
