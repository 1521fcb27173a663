"""Crops that tile a part of a case, and crops from anywhere within it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from nnssl_ext.data.augment import Intensity
from nnssl_ext.data.sampling import random_box, whole
from nnssl_ext.data.spatial import MIRROR, Spatial, make_affine
from nnssl_ext.data.views import View, read_crops
from nnssl_ext.preprocessing.store import CaseStore


@dataclass(frozen=True)
class GridTargets:
    """Base crops side by side, as views "base_0", "base_1", ... (the last axis fastest), and crops from anywhere in their grid, "target_0", ...

    The grid lies at random in the case. Along an axis on which the case is shorter than the grid, the grid spans the case: all
    crops show less of this axis, in as many voxels, so that they still tile and nothing is padded (but for a case of one voxel
    along an axis). Targets lie at whole voxels of the grid, uniformly. All crops are mirrored alike.

    Args:
        grid: base crops along (z, y, x).
        size: voxels of every crop, (z, y, x).
        targets: number of target crops.
        spatial: how all crops are mirrored (its rotation and zoom are not used).
        intensity: augmentation of each crop's values.
        body: smallest share of body in the grid, where there is such a place; [0, 1].
    """

    grid: tuple[int, ...]
    size: tuple[int, ...]
    targets: int = 2
    spatial: Spatial = MIRROR
    intensity: Intensity = Intensity()
    body: float = 0.25

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        size, voxels, shape = np.array(self.size), np.multiply(self.grid, self.size), np.array(store.shape(case))
        box = random_box(whole(shape.tolist()), np.minimum(voxels, shape).tolist(), rng, store.body(case) if self.body else None, self.body)
        zoom = np.where(shape < voxels, np.maximum(shape - 1, 1 / voxels) / np.maximum(voxels - 1, 1), 1.0)
        first = np.mean(box, axis=1) - (1 + (voxels - 1) * zoom) / 2  # where the grid's first voxel lies in the case
        places = {f"base_{number}": np.array(cell) * size for number, cell in enumerate(product(*map(range, self.grid)))}
        places |= {f"target_{number}": rng.integers(0, voxels - size, endpoint=True) for number in range(self.targets)}
        mirrored = self.spatial.within(self.size).draw_mirror(rng)
        centres = [first + zoom * (place + (size - 1) / 2) for place in places.values()]
        affines = [make_affine(centre, self.size, (1.0, 1.0, 1.0), np.eye(3), zoom, mirrored) for centre in centres]
        images = read_crops(store, case, affines, [self.size] * len(affines))
        return {name: View(image, affine, intensity=self.intensity.draw(len(image), rng)) for name, image, affine in zip(places, images, affines)}


def overlaps(targets: Tensor, bases: Tensor, size: Sequence[int]) -> Tensor:
    """Share of each target's volume that each base crop covers, (B, k, n) in [0, 1]; exact for crops that are not rotated.

    Args:
        targets, bases: affines (B, k, 3, 4) and (B, n, 3, 4) of crops of the same case, sample by sample.
        size: voxels of all crops, (z, y, x); a voxel reaches half a step beyond its centre.
    """
    edges = torch.tensor(size, dtype=targets.dtype)
    (low, high), (first, last) = (_faces(affines, edges) for affines in (targets[:, :, None], bases[:, None]))
    shared = (torch.minimum(high, last) - torch.maximum(low, first)).clamp_min(0)
    return shared.prod(-1) / (high - low).prod(-1)


def _faces(affines: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper faces (..., 3) of crops, in voxels of the case."""
    matrix = affines[..., :3]
    centre, reach = matrix @ ((edges - 1) / 2) + affines[..., 3], matrix.abs() @ edges / 2
    return centre - reach, centre + reach


def assembled(bases: Tensor, affine: Tensor, grid: Sequence[int]) -> Tensor:
    """The part of the case that the base crops (n, z, y, x) tile, not mirrored.

    Args:
        affine: (3, 4), of any of them.
        grid: base crops along (z, y, x); their product is n.
    """
    assert len(bases) == math.prod(grid)
    upright = bases.flip([axis + 1 for axis in range(3) if affine[axis, axis] < 0])
    return rearrange(upright, "(a b c) z y x -> (a z) (b y) (c x)", a=grid[0], b=grid[1])
