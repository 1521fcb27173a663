"""``python -m documentation.pictures METHOD ...``: a picture of each method after a short training on phantoms, images/METHOD.png.

Data, network and training are small and the same every time: minutes on one core, and no more than an impression of what a method does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import methods as registered
from benchmarks.common import PAIRED, ArrayLabels, NoiseStore, make_plan
from benchmarks.pairs import WINDOW, PairedPhantoms
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.plan import NetworkPlan
from nnssl_ext.evaluation.clusters import features_of, fit
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.pictures import draw_run
from nnssl_ext.trainers.sinks import VARIABLE

IMAGES = Path(__file__).with_name("images")
SIZE, SPACING, CASES = 64, 3.0, 16  # voxels per edge of a phantom, mm, number of phantoms
PATCH, BATCH, STEPS = (48, 48, 48), 2, 200
CLUSTERS, CLUSTER_STEPS = 8, 60  # for methods that learn to tell clusters; training steps of the network by whose features they are found
WIDEST, COLOURS = 900, 64  # of a picture: pixels, entries of the palette


def methods() -> dict[str, type[SSLTrainer]]:
    """Trainers by the name of their page and by that of their class."""
    found = registered.methods()
    return {cls.__module__.rpartition(".")[2]: cls for cls in found.values()} | found


class Phantoms(NoiseStore):
    """CT-like volumes (1, z, y, x), clipped to a window of soft tissues and brought to zero mean and unit variance."""

    def __init__(self) -> None:
        images = np.stack([make_phantom(0, case, (SIZE,) * 3, (SPACING,) * 3).image for case in range(CASES)]).clip(*WINDOW)
        self.arrays = ((images - images.mean()) / images.std()).astype(np.float32)[:, None]

    def geometry(self, case: int) -> Geometry:
        return Geometry(self.shape(case), (SPACING,) * 3)

    def fill(self, case: int) -> list[float]:
        return [float(self.arrays[case].min())]

    def clusters(self) -> ArrayLabels:
        """Clusters by the features of a U-Net after a short training with MAETrainer."""
        with tempfile.TemporaryDirectory() as folder:
            extractor = Extractor(train(methods()["MAETrainer"], "resenc", CLUSTER_STEPS, Path(folder)).transferred())
        store: Any = self
        model = fit(store, extractor, "MAETrainer", CLUSTERS, voxels=50_000)
        maps = [features_of(store, case, extractor)[1] for case in range(len(store))]
        labels = [model.labels(found, array, np.ones(array.shape[1:], bool))[None] for found, array in zip(maps, self.arrays)]
        return ArrayLabels([volume.astype(np.uint8) for volume in labels], CLUSTERS)


@cache
def phantoms(paired: bool = False) -> NoiseStore:
    return PairedPhantoms(range(CASES), SIZE, SPACING) if paired else Phantoms()


def train(cls: type[SSLTrainer], family: str, steps: int, folder: Path) -> SSLTrainer:
    """A trained method with a network of the smallest size."""
    network: NetworkPlan = registered.NETWORKS[family]((1, 1, 1), PATCH, "nano", 1e3, BATCH)
    config: Any = cls.Config(epochs=1, iterations=steps, val_iterations=1, batch_size=BATCH, workers=0)
    store: Any = phantoms(cls.__name__ in PAIRED)
    trainer = cls(make_plan(PATCH, family, replace(network, batch_size=BATCH)), "3d_fullres", config, store, folder, family=family)
    trainer.fit()
    return trainer


def draw(trainer: SSLTrainer, path: Path) -> None:
    """The method's picture of validation subjects, made small."""
    draw_run(trainer, trainer.val_data[0], path)
    with Image.open(path) as image:
        factor = min(1.0, WIDEST / image.width)
        small = image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.LANCZOS)
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    known = methods()
    parser = argparse.ArgumentParser("python -m documentation.pictures", description=__doc__)
    parser.add_argument("methods", metavar="METHOD", nargs="+", choices=known, help=f"one or more of: {', '.join(sorted(known))}")
    parser.add_argument("-b", dest="family", choices=registered.NETWORKS, help="backbone family (default: the method's)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "none"
    for cls in (known[name] for name in options.methods):
        began = time.process_time()
        path = options.out / f"{cls.__module__.rpartition('.')[2]}.png"
        with tempfile.TemporaryDirectory() as folder:
            draw(train(cls, options.family or cls.default_family, options.steps, Path(folder)), path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {time.process_time() - began:.0f} CPU-s")


if __name__ == "__main__":
    main()
