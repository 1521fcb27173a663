"""Batches of two crops with nnU-Net's training augmentation, against batchgeneratorsv2 as nnU-Net's trainer composes it.

Both read the same compressed cases, one thread. The peer reads the larger patch that nnU-Net's trainer reads and transforms
it; ours draws rotations, zooms and intensities of the same probabilities and ranges. `detail`: ratios and patches per CPU
second by edge, those of rotation, zoom and mirroring alone beside the figures recorded for nnssl (equal work), and how
strongly both change a crop (see `strength`).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from benchmarks.common import Result, spread, summarize
from benchmarks.loader import BATCH, EDGES, in_turn, make_store, patches_per_cpu_s
from benchmarks.strength import displacement, intensity, peer_size, peer_transforms
from nnssl_ext.data import augment
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.sampling import random_box, whole
from nnssl_ext.data.spatial import NNUNET
from nnssl_ext.data.views import Crop, View, read_box
from nnssl_ext.preprocessing.store import CaseStore

PEER = "batchgeneratorsv2 (nnU-Net's training transforms)"
NNSSL_PATCHES_PER_CPU_S = {64: 17.1, 96: 4.1}  # recorded with rotation and zoom at p = .2 and mirroring, order 3; not run here


class Peer:
    """nnU-Net's larger patch through its trainer's transforms."""

    def __init__(self, edge: int) -> None:
        self.read = peer_size((edge,) * 3)
        self.transforms = ComposeTransforms(peer_transforms((edge,) * 3))

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        patch = read_box(store, case, random_box(whole(store.shape(case)), self.read, rng))
        return {"image": View(self.transforms(image=torch.from_numpy(patch))["image"].contiguous().numpy(), np.eye(3, 4))}


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
            times = in_turn({name: lambda i, d=d, s=steps: patches_per_cpu_s(d, s, i * s) for name, d in data.items()}, 2 if quick else 7)
            changes = intensity(store.read(0, tuple((n // 2 - 24, n // 2 + 24) for n in store.shape(0))), 60 if quick else 1500) if edge == EDGES[0] else {}
        detail[f"ratio_{edge}"] = spread(p / o for o, p in zip(times["ours"], times["peer"]))
        detail[f"patches_per_cpu_s_{edge}"] = {name: round(1 / statistics.median(values), 1) for name, values in times.items()}
        detail[f"spatial_only_over_nnssl_{edge}"] = spread(1 / value / NNSSL_PATCHES_PER_CPU_S[edge] for value in times["ours, spatial only"])
        detail[f"displacement_{edge}"] = displacement(edge, 200 if quick else 4000)
        detail |= {"intensity": changes} if changes else {}
        ours += times["ours"]
        peer += times["peer"]
    return summarize(ours, peer, PEER, "CPU-s per patch", detail)
