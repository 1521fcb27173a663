"""Values of cells at voxels: trilinear, or joint bilateral under the guidance of the image. Shape suffixes: N points, K values of a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

CORNERS = tuple(product((0, 1), repeat=3))


class Upsampler:
    """Interpolates maps of the cells of a volume at its voxels.

    The value at a voxel is a weighted mean of those of the eight cells around it. The weights are trilinear; with a guide, each
    counts the more the more alike the voxel and the mean of the cell are, exp(-sum over channels of (v - m)^2 / (2 s^2)), where s is
    the standard deviation of the volume's voxels about the means of their own cells: nothing is left to choose or to learn.

    Args:
        shape: voxels of the volume, (z, y, x).
        cell: voxels of a cell, (z, y, x); cells begin with the first voxel, the last one of an axis may reach beyond the volume.
        guide: image (C, z, y, x) of the volume, or None.

    Source: Kopf et al. 2007, Joint bilateral upsampling, doi:10.1145/1276377.1276497.
    """

    def __init__(self, shape: Sequence[int], cell: Sequence[int], guide: np.ndarray | None = None) -> None:
        self.shape, self.cell = tuple(shape), torch.tensor(cell)
        self.cells = torch.tensor([-(-n // edge) for n, edge in zip(shape, cell)])
        self.guide = self.means = None
        if guide is not None:
            means = torch.from_numpy(cell_means(guide, cell))
            z, y, x = (torch.arange(n) // edge for n, edge in zip(shape, cell))
            image = torch.from_numpy(guide).float()
            spread = (image - means[:, z[:, None, None], y[:, None], x]).square().mean((1, 2, 3), keepdim=True).sqrt()
            scale = torch.where(spread > 0, 1 / (math.sqrt(2) * spread.clamp_min(1e-30)), 0)  # an image without any spread guides nobody
            self.guide, self.means = (image * scale).flatten(1), (means * scale).flatten(1)

    def weights(self, points_N: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the eight cells around voxels and their weights, (8, N) each.

        Args:
            points_N: indices into the flattened volume.
        """
        place_N3 = torch.stack(torch.unravel_index(points_N, self.shape), 1)
        place_N3 = torch.minimum(((place_N3 + 0.5) / self.cell - 0.5).clamp_min(0), self.cells - 1)
        low_N3 = place_N3.floor().long()
        part_N3, high_N3 = place_N3 - low_N3, torch.minimum(low_N3 + 1, self.cells - 1)
        cells, weights = [], []
        for corner in CORNERS:
            upper = torch.tensor(corner, dtype=torch.bool)
            z, y, x = torch.where(upper, high_N3, low_N3).unbind(1)
            cells.append((z * self.cells[1] + y) * self.cells[2] + x)
            weights.append(torch.where(upper, part_N3, 1 - part_N3).prod(1))
        index_8N, weight_8N = torch.stack(cells), torch.stack(weights)
        if self.guide is None or self.means is None:
            return index_8N, weight_8N
        apart_8N = torch.stack([(self.guide[:, points_N] - self.means[:, cell]).square().sum(0) for cell in index_8N])
        return index_8N, (weight_8N.log() - apart_8N).softmax(0)

    def __call__(self, maps: Tensor, points_N: Tensor) -> Tensor:
        """Values (K, N) at some voxels of maps (K, d, h, w) of all cells."""
        flat = maps.flatten(1)
        index_8N, weight_8N = self.weights(points_N)
        return sum((flat[:, cell] * weight for cell, weight in zip(index_8N, weight_8N)), torch.zeros(()))


def cell_means(image: np.ndarray, cell: Sequence[int]) -> np.ndarray:
    """Mean of each cell of an image (C, z, y, x) over the voxels that it has, (C, d, h, w) float32."""
    sums, counts = image.astype(np.float64), np.ones(image.shape[1:])
    for axis, edge in enumerate(cell):
        starts = np.arange(0, image.shape[axis + 1], edge)
        sums, counts = np.add.reduceat(sums, starts, axis + 1), np.add.reduceat(counts, starts, axis)
    means: np.ndarray = (sums / counts).astype(np.float32)
    return means
