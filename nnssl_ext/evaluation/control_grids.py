"""Displacements on the control grids of a registration: the middles of cells of step^3 voxels, the first of which begins with the first voxel.

Fields and features are (1, C, z, y, x); a displacement is in the cells of its own grid. What "u cells" means is the whole subject: two conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.evaluation.interpolation import Interpolated
from nnssl_ext.nn.warp import identity_grid, warp

EDGE = 1e-3  # cells beyond the faces that rounding may lead to


def repeated_means(values: Tensor, window: int, passes: int, counted: bool) -> Tensor:
    """Repeated means over the window around a cell: a matrix for each axis. What lies outside is counted as zeros, or not at all."""
    matrices = []
    for n in values.shape[2:]:
        at = torch.arange(n, device=values.device)
        near = ((at - at[:, None]).abs() <= window // 2).to(values.dtype)
        matrices.append(torch.linalg.matrix_power(near / (window if counted else near.sum(1, keepdim=True)), passes))
    z, y, x = matrices
    return y @ (z @ values.flatten(3)).view(values.shape) @ x.T


class ControlGrids:
    """A displacement by u cells means exactly that, everywhere: a pure translation is kept by every step."""

    def pool(self, values: Tensor, step: int) -> Tensor:
        """Means over cells; the last one of an axis is filled up with the last voxel."""
        ends = [end for n in reversed(values.shape[2:]) for end in (0, -n % step)]
        return F.avg_pool3d(F.pad(values, ends, mode="replicate"), step)

    def enlarge(self, displacement: Tensor, step: int, shape: Sequence[int]) -> Tensor:
        """From cells of `step` voxels to the `shape` (z, y, x) voxels, trilinear, and from cells to voxels."""
        cells = [n * step for n in displacement.shape[2:]]
        fine = F.interpolate(displacement * step, size=cells, mode="trilinear", align_corners=False)  # here: cells and voxels share their outer faces
        return fine[:, :, : shape[0], : shape[1], : shape[2]]

    def reduce(self, displacement: Tensor, step: int) -> Tensor:
        """From voxels to cells of `step` voxels."""
        return self.pool(displacement, step) / step

    def smooth(self, values: Tensor, window: int, passes: int) -> Tensor:
        """Repeated means over the window around a cell, as far as it lies inside."""
        return repeated_means(values, window, passes, counted=False)

    def relax(self, displacement: Tensor, window: int, passes: int) -> Tensor:
        """Repeated means of a displacement whose control points beyond the faces all have its mean.

        So a translation stays what it is, and what noise makes of the background dies out towards the faces, which means as far as they lie inside don't do.
        """
        whole = displacement.mean((2, 3, 4), keepdim=True)
        return whole + repeated_means(displacement - whole, window, passes, counted=True)

    def warp(self, values: Tensor, displacement: Tensor) -> Tensor:
        """`values` at p + u(p); outside the nearest cell counts."""
        return warp(values, displacement)

    def sampler(self, values: Tensor) -> Callable[[Tensor], Tensor]:
        """The same as `warp` for values that are wanted again and again, with a gradient by the displacement alone."""
        shape, table = values.shape, values[0].flatten(1).T.contiguous()
        places = identity_grid(shape[2:], values).flatten(1)
        return lambda displacement: Interpolated.apply(places + displacement[0].flatten(1), table, shape[2:]).T.reshape(shape)

    def seen(self, displacement: Tensor) -> Tensor:
        """Whether p + u(p) lies in the volume, bool (1, d, h, w)."""
        places = identity_grid(displacement.shape[2:], displacement) + displacement
        last = displacement.new_tensor(displacement.shape[2:]).view(3, 1, 1, 1) - 1
        return ((places >= -EDGE) & (places <= last + EDGE)).all(1)

    def around(self, values: Tensor, reach: int) -> Tensor:
        """`values` with `reach` more cells at each face."""
        return F.pad(values, [reach] * 6, mode="replicate")


class LegacyGrids(ControlGrids):
    """The convention of ConvexAdam's public code, for comparison: it shortens translations.

    A displacement of u cells is scaled as if voxel centres spanned [-1, 1], 2 u / (n - 1), and then read by a sampler whose outer faces span it, 2 u / n: what
    is found is shorter by 1 / n. Means of windows and samples count zeros outside, which draws displacements near the faces towards 0.
    """

    def pool(self, values: Tensor, step: int) -> Tensor:
        return F.avg_pool3d(values, step)

    def enlarge(self, displacement: Tensor, step: int, shape: Sequence[int]) -> Tensor:
        return F.interpolate(displacement * step, size=tuple(shape), mode="trilinear", align_corners=False)

    def reduce(self, displacement: Tensor, step: int) -> Tensor:
        return F.interpolate(displacement, size=[n // step for n in displacement.shape[2:]], mode="trilinear", align_corners=False) / step

    def smooth(self, values: Tensor, window: int, passes: int) -> Tensor:
        return repeated_means(values, window, passes, counted=True)

    def relax(self, displacement: Tensor, window: int, passes: int) -> Tensor:
        return self.smooth(displacement, window, passes)

    def warp(self, values: Tensor, displacement: Tensor) -> Tensor:
        shape = displacement.shape[2:]
        faces = F.affine_grid(torch.eye(3, 4, dtype=displacement.dtype, device=displacement.device)[None], [1, 1, *shape], align_corners=False)
        scale = displacement.new_tensor([2 / (n - 1) for n in shape]).view(3, 1, 1, 1)
        return F.grid_sample(values, faces + (displacement * scale).flip(1).movedim(1, -1), align_corners=False)

    def sampler(self, values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda displacement: self.warp(values, displacement)

    def seen(self, displacement: Tensor) -> Tensor:
        return torch.ones_like(displacement[:, 0], dtype=torch.bool)

    def around(self, values: Tensor, reach: int) -> Tensor:
        return F.pad(values, [reach] * 6)
