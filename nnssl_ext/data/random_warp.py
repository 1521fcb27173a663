"""Pairs for registration: two subjects, or a crop and the same crop bent by a random diffeomorphism that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.compiled import compiled
from nnssl_ext.data.interpolate import interpolate
from nnssl_ext.data.partners import Partners, at_same_place
from nnssl_ext.data.views import Crop, View, read_crops
from nnssl_ext.preprocessing.store import CaseStore

CELLS = 3  # of the velocity's lattice along each axis: a bump is about as wide as the crop
FINEST = 24  # nodes along an axis on which the velocity is followed, at most
SQUARINGS = 6


def random_warp(shape: Sequence[int], rng: np.random.Generator, largest: float) -> np.ndarray:
    """The displacement after following a smooth random stationary velocity for a unit of time: a diffeomorphism.

    The velocity is a cubic B-spline on a coarse lattice, in edges of the crop, so that crops of any shape are bent alike; its
    largest component is 50 to 100 % of `largest`. Nothing holds the faces of the crop in place.

    Args:
        shape: voxels, (z, y, x).
        largest: bound on the displacement along each axis, in edges of the crop along it. With 0.2 the least Jacobian
            determinant of 300 draws was 0.24.

    Returns:
        (3, z, y, x) float32, voxels, over the axes (z, y, x): what is seen at p comes from p + u(p).

    Source: Arsigny et al. 2006, doi:10.1007/11866565_113 (scaling and squaring).
    """
    nodes = [min(n, FINEST) for n in shape]
    field = rng.standard_normal((3, *(CELLS + 3,) * 3), np.float32)
    for axis, n in enumerate(nodes, 1):
        field = np.moveaxis(np.tensordot(_spline(n), field, (1, axis)), 0, axis)
    edges = np.array(nodes, np.float32)[:, None, None, None]
    displacement = field * edges * np.float32(largest * rng.uniform(0.5, 1) / np.abs(field).max() / 2**SQUARINGS)
    for _ in range(SQUARINGS):
        displacement = displacement + bend(displacement, displacement)
    scale = np.array(nodes) / shape
    fine = interpolate(displacement, np.column_stack((np.diag(scale), (scale - 1) / 2)), shape)
    return fine / scale.astype(np.float32)[:, None, None, None]


def _spline(n: int) -> np.ndarray:
    """Uniform cubic B-splines at the centres of n intervals, (n, CELLS + 3)."""
    place = (np.arange(n) + 0.5) * CELLS / n
    distance = np.abs(place[:, None] - np.arange(-1, CELLS + 2))
    return np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6).astype(np.float32)


def bend(source: np.ndarray, displacement: np.ndarray, margin: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Trilinear values of a volume at p + u(p) for every voxel p of a displacement; outside of the volume its nearest voxel counts.

    Args:
        source: (C, z, y, x) float32.
        displacement: (3, z, y, x), voxels.
        margin: voxels of the volume before the first one of the displacement, (z, y, x).
    """
    out = np.empty((len(source), *displacement.shape[1:]), np.float32)
    _bend(np.ascontiguousarray(source), np.ascontiguousarray(displacement), np.array(margin), out)
    return out


@compiled
def _bend(source: np.ndarray, displacement: np.ndarray, margin: np.ndarray, out: np.ndarray) -> None:
    channels, depth, height, width = source.shape
    zero, one = np.float32(0), np.float32(1)
    for z in range(out.shape[1]):
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                at_z = min(max(np.float32(z + margin[0]) + displacement[0, z, y, x], zero), np.float32(depth - 1))
                at_y = min(max(np.float32(y + margin[1]) + displacement[1, z, y, x], zero), np.float32(height - 1))
                at_x = min(max(np.float32(x + margin[2]) + displacement[2, z, y, x], zero), np.float32(width - 1))
                i, j, k = int(at_z), int(at_y), int(at_x)
                a, b, c = min(i + 1, depth - 1), min(j + 1, height - 1), min(k + 1, width - 1)
                p, q, r = at_z - np.float32(i), at_y - np.float32(j), at_x - np.float32(k)
                for channel in range(channels):
                    v = source[channel]
                    near = (one - q) * ((one - r) * v[i, j, k] + r * v[i, j, c]) + q * ((one - r) * v[i, b, k] + r * v[i, b, c])
                    far = (one - q) * ((one - r) * v[a, j, k] + r * v[a, j, c]) + q * ((one - r) * v[a, b, k] + r * v[a, b, c])
                    out[channel, z, y, x] = near + p * (far - near)


@dataclass(frozen=True)
class RegistrationPair:
    """Views "fixed", "moving" and "displacement", (3, z, y, x) in voxels, by which the moving one is warped onto the fixed one where it is known, else zeros.

    Known pairs are of one case: the moving crop, and what is seen of the case through a random warp. In the others the moving
    crop is of another subject, from about the same place. The fixed crop's intensities are changed in both.

    Args:
        crop: where the crop of the case comes from, and how the fixed one's intensities are changed.
        partners: cases of the other crop; None: all pairs are known.
        known: probability that a pair is known.
        largest: displacement, see `random_warp`.
    """

    crop: Crop
    partners: Partners | None
    known: float
    largest: float

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        fixed = self.crop.sample(store, case, rng)["image"]
        if self.partners is None or rng.random() < self.known:
            displacement = random_warp(self.crop.patch_size, rng, self.largest)
            moving = replace(fixed, intensity=())
            fixed = replace(fixed, image=seen_through(store, case, fixed.affine, displacement))
        else:
            displacement = np.zeros((3, *self.crop.patch_size), np.float32)
            moving = at_same_place(store, case, fixed, self.partners, rng)
        return {"fixed": fixed, "moving": moving, "displacement": View(displacement, fixed.affine)}


def seen_through(store: CaseStore, case: int, affine: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """A crop (C, z, y, x) that shows at p what the crop with this affine (3, 4) has at p + u(p), also beyond that crop."""
    margin = np.ceil(np.abs(displacement).max((1, 2, 3))).astype(int)
    wider = np.column_stack((affine[:, :3], affine[:, 3] - affine[:, :3] @ margin))
    return bend(read_crops(store, case, [wider], [tuple((displacement.shape[1:] + 2 * margin).tolist())])[0], displacement, margin)
