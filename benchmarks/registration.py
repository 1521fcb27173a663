"""Registration of pairs of phantoms of 96^3 voxels by MIND-SSC, against the package convexadam 0.2.0 (``pip install convexadam==0.2.0``).

Both compute the features, cells of 6 voxels, 4 cells of reach, inverse consistency, 80 iterations of Adam on control points every 2 voxels, diffusion 1.25.
One thread, a pair each time; `detail` has two threads as well, and the mean end-point error over the body and the mean Dice of the labels, before and after.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import THREADS, Result, compare
from nnssl_ext.evaluation.mind import mind_ssc
from nnssl_ext.evaluation.phantom import PhantomPair, make_pair
from nnssl_ext.evaluation.registration import PRESETS, register_features
from nnssl_ext.evaluation.segmentation_metrics import dice
from nnssl_ext.nn.warp import warp

PEER = "convexadam 0.2.0"
EDGE, SPACING, LONGEST, PAIRS = 96, 3.0, 24.0, 4  # voxels, mm, mm


def ours(fixed: Tensor, moving: Tensor) -> Tensor:
    """Displacement (3, z, y, x), voxels."""
    return register_features(mind_ssc(fixed), mind_ssc(moving), PRESETS["mind_default"])


def theirs() -> Callable[[Tensor, Tensor], Tensor]:
    """The same by the package with the same settings, which are its defaults."""
    from convexAdam.convex_adam_MIND import convex_adam_pt

    def register(fixed: Tensor, moving: Tensor) -> Tensor:
        found = convex_adam_pt(fixed, moving, dtype=torch.float32, device=torch.device("cpu"))
        return torch.from_numpy(np.moveaxis(found, -1, 0).astype(np.float32))

    return register


def quality(pair: PhantomPair, displacement: Tensor) -> dict[str, float]:
    """Mean distance from the true displacement in mm over the body, and mean Dice of the fixed phantom's labels."""
    away = np.linalg.norm(displacement.numpy() * SPACING - pair.displacement, axis=0)
    labels = torch.from_numpy(pair.moving.labels.astype(np.float32))[None, None]
    moved = warp(labels, displacement[None], "nearest")[0, 0].numpy().round()
    overlaps = [dice(pair.fixed.labels == label, moved == label) for label in np.unique(pair.fixed.labels) if label]
    return {"epe_mm": round(float(away[pair.fixed.body].mean()), 4), "dice": round(float(np.mean(overlaps)), 4)}


def run(quick: bool) -> Result:
    peer, edge, count = theirs(), 48 if quick else EDGE, 2 if quick else PAIRS
    pairs = [make_pair(0, index, (edge,) * 3, (SPACING,) * 3, ("CT", "CT"), LONGEST) for index in range(count)]
    images = [[torch.from_numpy(phantom.image.astype(np.float32)) for phantom in (pair.fixed, pair.moving)] for pair in pairs]
    found: dict[str, list[Tensor]] = {"ours": [], "peer": []}

    def side(name: str, register: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        """Registers the next pair at each call."""
        return lambda: found[name].append(register(*images[len(found[name]) % count]))

    results = []
    for threads in (1, THREADS):
        torch.set_num_threads(threads)
        results.append(compare(side("ours", ours), side("peer", peer), PEER, count, warm_up=0 if quick or results else 1))
    torch.set_num_threads(THREADS)
    one, two = results
    zero = [torch.zeros(3, edge, edge, edge)] * count
    judged = {name: [quality(*both) for both in zip(pairs, fields)] for name, fields in (("before", zero), *found.items())}
    means = {name: {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]} for name, rows in judged.items()}
    more = {"two_threads": {"ratio": round(two.ratio, 3), **two.detail["wall_s"]}, "quality": means, "quality_of_pairs": judged, "voxels": edge, "bar": 2}
    return Result(one.ratio, one.min, one.max, one.ours, one.peer, PEER, one.unit, {**one.detail, "threads": 1, **more})
