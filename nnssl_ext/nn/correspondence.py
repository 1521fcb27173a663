"""What corresponds in two views of a case: cells and voxels at the same places, and the retrieval of one by the other's features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.nn.warp import identity_grid

QUERIES = 256  # of each sample, at most
REACH = 1.0  # tokens; how far from the true place the retrieved token may lie
_EXACT = 1e-6  # tokens; what rounding may add to a place


@torch.no_grad()
def retrieval(
    features_a: Tensor, features_b: Tensor, affine_a: Tensor, affine_b: Tensor, grid: Sequence[int], token: Sequence[int], queries: int = QUERIES
) -> dict[str, Tensor]:
    """How often the token of view b that is most similar to a token of view a lies where that token's centre does.

    A query is a token of view a whose centre lies between the centres of the outermost tokens of view b, that is inside of view b
    by half a token at least. It is a hit when the most similar token (cosine; the first of several) is at most one token away.
    With affines on the CPU, where a `ViewBatch` has them, nothing makes the host wait for the device.

    Args:
        features_a, features_b: tokens of the two views, (B, N, C).
        affine_a, affine_b: from voxels of each view to voxels of the case, (B, 3, 4), see `data.spatial`.
        grid: tokens along each axis, (d, h, w); their product is N.
        token: voxels of a token, (z, y, x).
        queries: of each sample, at most; tokens of a are left out evenly.

    Returns:
        scalars: "hits", share of the queries; "chance", the share that random features reach; "count" of queries. All are 0 where the views don't overlap.
    """
    cells_N3 = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    chosen_Q, edge_3 = _strided(grid, queries), torch.tensor(token, dtype=torch.float64)
    place_BQ3 = _carry((cells_N3[chosen_Q] + 0.5) * edge_3 - 0.5, affine_a.cpu().double(), affine_b.cpu().double())
    place_BQ3 = (place_BQ3 + 0.5) / edge_3 - 0.5  # in tokens of b
    place_BQ3, cells_N3, chosen_Q = (x.to(features_a.device, non_blocking=True) for x in (place_BQ3, cells_N3, chosen_Q))
    last_3 = cells_N3[-1]
    valid_BQ = ((place_BQ3 >= -_EXACT) & (place_BQ3 <= last_3 + _EXACT)).all(2)
    near_BQN = torch.cdist(place_BQ3, cells_N3.expand(len(place_BQ3), -1, -1), compute_mode="donot_use_mm_for_euclid_dist") <= REACH + _EXACT
    with torch.autocast(features_a.device.type, enabled=False):
        query_BQC, key_BNC = (F.normalize(x.float(), dim=2) for x in (features_a[:, chosen_Q], features_b))
        found_BQ1 = (query_BQC @ key_BNC.mT).argmax(2, keepdim=True)
    count = valid_BQ.sum()
    hits, chance = near_BQN.gather(2, found_BQ1)[..., 0].float(), near_BQN.float().mean(2)
    return {"hits": (hits * valid_BQ).sum() / count.clamp_min(1), "chance": (chance * valid_BQ).sum() / count.clamp_min(1), "count": count}


def shared_grid(affine_a: Tensor, affine_b: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
    """Where to read the maps of two views so that both are read at the same places of the case, evenly spread over what they share.

    The places go from the first to the last cell centre that lies among those of both views, as many along each axis as a map has
    cells: no value is extrapolated, and views of the same crop are read at their cells. Where less than one cell is shared along
    an axis, the nearest cells are read.

    Args:
        affine_a, affine_b: from voxels of each view to voxels of the case, (B, 3, 4), see `data.spatial`; of views that are shifted,
            zoomed and mirrored against each other, not turned.
        grid: cells of a map, (d, h, w).
        cell: voxels of a cell, (z, y, x).

    Returns:
        displacements (2, B, 3, d, h, w) in cells, by which `warp.warp` reads the map of either view; on the affines' device.
    """
    edge_3, last_3 = (affine_a.new_tensor(x, dtype=torch.float64) for x in (cell, [n - 1 for n in grid]))
    affine_a, affine_b = affine_a.double(), affine_b.double()

    def carried(cells_BQ3: Tensor, source: Tensor, goal: Tensor) -> Tensor:
        return (_carry((cells_BQ3 + 0.5) * edge_3 - 0.5, source, goal) + 0.5) / edge_3 - 0.5

    ends_B23 = carried(torch.stack((torch.zeros_like(last_3), last_3)).expand(len(affine_a), -1, -1), affine_b, affine_a)
    low_B3, high_B3 = ends_B23.amin(1).clamp_min(0), torch.minimum(ends_B23.amax(1), last_3)
    cells_3DHW = identity_grid(grid, edge_3)
    share_Q3 = cells_3DHW.flatten(1).T / last_3.clamp_min(1)
    places_BQ3 = low_B3[:, None] + share_Q3 * (high_B3 - low_B3)[:, None]
    both = torch.stack((places_BQ3, carried(places_BQ3, affine_a, affine_b)))
    return both.mT.unflatten(3, tuple(grid)) - cells_3DHW


def shared_places(affine_a: Tensor, affine_b: Tensor, shape: Sequence[int], cell: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """The same places of the case in two views that may be shifted, zoomed, mirrored and turned against each other.

    The smallest box of view a that holds what both share, from the first to the last cell centre of both, is divided into equal
    parts, of which the places are the middles: as many along each axis as there are cells, or as keep their number within `most`.
    Of turned views the box holds places that are not in b, too, which do not count. At least one counts, if need be the one that
    is nearest to both.

    Args:
        affine_a, affine_b: as of `retrieval`.
        shape: voxels of either view.
        cell: voxels of a cell, (z, y, x).
        most: places of each sample.

    Returns:
        places (2, B, Q, 3) in voxels of a and of b, and which of them count, (B, Q) bool; on the affines' device.
    """
    affine_a, affine_b = affine_a.double(), affine_b.double()
    low_3 = (affine_a.new_tensor(cell) - 1) / 2
    high_3 = affine_a.new_tensor(shape) - 1 - low_3
    corners_83 = torch.where(torch.cartesian_prod(*[torch.arange(2, device=low_3.device)] * 3).bool(), high_3, low_3)
    ends_B83 = _carry(corners_83, affine_b, affine_a)
    first_B3, last_B3 = torch.maximum(ends_B83.amin(1), low_3), torch.minimum(ends_B83.amax(1), high_3)
    cells = [n // edge for n, edge in zip(shape, cell)]
    longest = max(edge for edge in range(1, max(cells) + 1) if edge == 1 or math.prod(min(edge, n) for n in cells) <= most)
    shares = [(torch.arange(n, dtype=torch.float64, device=low_3.device) + 0.5) / n for n in (min(longest, n) for n in cells)]
    share_Q3 = torch.cartesian_prod(*shares)
    places_BQ3 = first_B3[:, None] + share_Q3 * (last_B3 - first_B3)[:, None]
    both_2BQ3 = torch.stack((places_BQ3, _carry(places_BQ3, affine_a, affine_b)))
    off_BQ = torch.maximum(low_3 - both_2BQ3, both_2BQ3 - high_3).amax((0, 3))
    return both_2BQ3, off_BQ <= off_BQ.amin(1, keepdim=True).clamp_min(_EXACT)


def moved(points_BQ3: Tensor, affine: Tensor) -> Tensor:
    """Points (B, Q, 3), or (Q, 3) of all samples, through affine maps (B, 3, 4)."""
    return points_BQ3 @ affine[:, :, :3].mT + affine[:, None, :, 3]


def shared_voxels(affine_a: Tensor, affine_b: Tensor, shape: Sequence[int]) -> Tensor:
    """Which voxels of view a lie in view b, (B, z, y, x) bool, on the affines' device.

    Args:
        affine_a, affine_b: as of `retrieval`.
        shape: voxels of either view.
    """
    places_BQ3 = _carry(identity_grid(shape, affine_a.double()).flatten(1).T, affine_a.double(), affine_b.double())
    size_3 = places_BQ3.new_tensor(shape)
    return ((places_BQ3 >= -0.5 - _EXACT) & (places_BQ3 <= size_3 - 0.5 + _EXACT)).all(2).unflatten(1, tuple(shape))


@torch.no_grad()
def labels_of_other(labels_b: Tensor, affine_a: Tensor, affine_b: Tensor) -> Tensor:
    """The label that view b has for each voxel of view a, that of b's nearest voxel; 0 where a voxel lies outside of b.

    Args:
        labels_b: of view b, (B, z, y, x), whole numbers from 0.
        affine_a, affine_b: as of `retrieval`; both views have the same shape.

    Returns:
        (B, z, y, x) int64, on the labels' device.
    """
    inverse = torch.linalg.inv(affine_b[:, :, :3])
    matrix, shift = inverse @ affine_a[:, :, :3], inverse @ (affine_a[:, :, 3:] - affine_b[:, :, 3:])
    matrix, shift = (x.to(labels_b.device, non_blocking=True) for x in (matrix, shift))
    shape = labels_b.shape[1:]
    z, y, x = (matrix @ identity_grid(shape, matrix).flatten(1) + shift).round().long().unbind(1)
    inside = (z >= 0) & (z < shape[0]) & (y >= 0) & (y < shape[1]) & (x >= 0) & (x < shape[2])
    found = labels_b.flatten(1).long().gather(1, torch.where(inside, (z * shape[1] + y) * shape[2] + x, 0))
    return torch.where(inside, found, 0).view_as(labels_b)


def _carry(points_Q3: Tensor, affine_a: Tensor, affine_b: Tensor) -> Tensor:
    """Voxels (Q, 3) or (B, Q, 3) of view a as voxels of view b, (B, Q, 3)."""
    carried: Tensor = (moved(points_Q3, affine_a) - affine_b[:, None, :, 3]) @ torch.linalg.inv(affine_b[:, :, :3]).mT
    return carried


def _strided(grid: Sequence[int], most: int) -> Tensor:
    """Indices of at most `most` tokens: every s-th one of each axis, in its middle; s is the smallest that is enough."""
    for step in range(1, max(grid) + 1):
        counts = [-(-n // step) for n in grid]
        if counts[0] * counts[1] * counts[2] <= most:
            break
    axes = [torch.arange((n - 1) % step // 2, n, step) for n in grid]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return ((z * grid[1] + y) * grid[2] + x).flatten()
