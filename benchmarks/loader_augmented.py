"""Batches of two crops with nnU-Net's training augmentation, against batchgeneratorsv2 as nnU-Net's trainer composes it.

Both read the same compressed cases, one thread. The peer reads the larger patch that nnU-Net's trainer reads and transforms
it; ours draws rotations, zooms and intensities of the same probabilities and ranges. `detail`: patches per CPU second by
edge, with the spatial part alone, the mean displacement of voxels by both (equal strength), nnssl's recorded figures.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from benchmarks.common import Result, summarize
from benchmarks.loader import BATCH, EDGES, in_turn, make_store, patches_per_cpu_s
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import augment
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.sampling import random_box, whole
from nnssl_ext.data.spatial import NNUNET, to_case
from nnssl_ext.data.views import Crop, View, read_box
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_data import ArrayStore

PEER = "batchgeneratorsv2 (nnU-Net's training transforms)"
ANGLE = math.radians(30)
NNSSL_PATCHES_PER_CPU_S = {64: 17.1, 96: 4.1}  # recorded with rotation and zoom at p = .2 and mirroring, order 3; not run here


class Peer:
    """nnU-Net's larger patch through its trainer's transforms."""

    def __init__(self, edge: int) -> None:
        self.size = (edge,) * 3
        self.read = tuple(int(n) for n in get_patch_size(self.size, (-ANGLE, ANGLE), (-ANGLE, ANGLE), (-ANGLE, ANGLE), (0.85, 1.25)))
        self.transforms = nnUNetTrainer.get_training_transforms(self.size, (-ANGLE, ANGLE), None, (0, 1, 2), False)

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        patch = read_box(store, case, random_box(whole(store.shape(case)), self.read, rng))
        return {"image": View(self.transforms(image=torch.from_numpy(patch))["image"].contiguous().numpy(), np.eye(3, 4))}


def displacement(edge: int, draws: int) -> dict[str, float]:
    """Mean distance in voxels by which rotation and zoom move a patch's voxels, over draws that move any; and their share."""
    size, store = (edge,) * 3, ArrayStore(1, (edge + 2,) * 3)
    grid = np.stack(np.meshgrid(*(np.linspace(-(edge - 1) / 2, (edge - 1) / 2, 9),) * 3, indexing="ij"), -1).reshape(-1, 3)
    spatial = SpatialTransform(size, 0, False, p_rotation=0.2, rotation=(-ANGLE, ANGLE), p_scaling=0.2, scaling=(0.7, 1.4), p_synchronize_scaling_across_axes=1)
    spec = Crop(size, NNUNET, body=0.0)
    moved: dict[str, list[float]] = {"ours": [], "peer": []}
    for index in range(draws):
        affine = spec.sample(store, 0, sample_rng(0, index))["image"].affine
        matrix = affine[:, :3] * np.sign(np.diag(affine[:, :3]))  # without mirroring
        moved["ours"].append(float(np.linalg.norm(to_case(np.column_stack((matrix, np.zeros(3))), grid) - grid, axis=1).mean()))
        other = spatial.get_parameters(image=torch.zeros((1, *size)))["affine"]
        moved["peer"].append(0.0 if other is None else float(np.linalg.norm(grid @ other.T - grid, axis=1).mean()))
    found = {f"{name}_share": round(float(np.mean(np.array(values) > 0)), 3) for name, values in moved.items()}
    return found | {f"{name}_voxels": round(float(np.mean([v for v in values if v > 0])), 2) for name, values in moved.items()}


def run(quick: bool) -> Result:
    ours: list[float] = []
    peer: list[float] = []
    detail: dict[str, object] = {"threads": 1, "bar": 3, "bar_over_nnssl": 10, "nnssl_recorded": NNSSL_PATCHES_PER_CPU_S}
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    for edge in EDGES:
        size, steps = (edge,) * 3, 4 if quick else 30
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(Path(folder), edge, quick)
            specs = {"ours": Crop(size, NNUNET, augment.NNUNET, body=0.0), "ours, spatial only": Crop(size, NNUNET, body=0.0), "peer": Peer(edge)}
            data = {name: StepDataset(store, spec, range(len(store)), 0, BATCH) for name, spec in specs.items()}
            times = in_turn({name: lambda i, d=d, s=steps: patches_per_cpu_s(d, s, i * s) for name, d in data.items()}, 2 if quick else 5)
        detail[f"patches_per_cpu_s_{edge}"] = {name: round(1 / statistics.median(values), 1) for name, values in times.items()}
        detail[f"displacement_{edge}"] = displacement(edge, 60 if quick else 600)
        ours += times["ours"]
        peer += times["peer"]
    return summarize(ours, peer, PEER, "CPU-s per patch", detail)
