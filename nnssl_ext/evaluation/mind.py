"""MIND-SSC: a descriptor of the structure around a voxel that doesn't depend on the contrast of the image.

Source: Heinrich et al. 2013, Towards realtime multimodal fusion for image-guided interventions using self-similarities,
doi:10.1007/978-3-642-40811-3_24, section 2.
"""

from __future__ import annotations

from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.nn.precision import wide

SIX = tuple(tuple(sign * (axis == other) for other in range(3)) for axis, sign in product(range(3), (-1, 1)))  # the six neighbours of a voxel
PAIRS = tuple((a, b) for a, b in combinations(range(6), 2) if a // 2 != b // 2)  # twelve, those that don't face each other across the voxel
LIMITS = (1e-3, 1e3)  # of the local variance, in means of it over the image


def mind_ssc(image: Tensor, radius: int = 1, dilation: int = 2) -> Tensor:
    """Descriptors (12, z, y, x) in (0, 1]: how alike the patches at two neighbours of a voxel are, for the twelve pairs of neighbours.

    exp(-(D - min D) / V) with the mean squared difference D of two patches and the mean V of D - min D over the twelve. They stay the same when the
    image is scaled, shifted or inverted.

    Args:
        image: (z, y, x).
        radius: of the patches, voxels.
        dilation: distance of the neighbours, voxels.
    """
    shape, reach = image.shape, dilation
    padded = F.pad(wide(image)[None, None], [reach] * 6, mode="replicate")[0, 0]
    starts = [[reach + dilation * step for step in neighbour] for neighbour in SIX]
    around = [padded[z : z + shape[0], y : y + shape[1], x : x + shape[2]] for z, y, x in starts]
    apart = torch.stack([_window_mean((around[a] - around[b]).square_(), radius) for a, b in PAIRS])
    apart -= apart.amin(0)
    variance = apart.mean(0)
    low, high = (float(variance.mean()) * limit for limit in LIMITS)
    return apart.div_(variance.clamp_(max(low, torch.finfo(apart.dtype).tiny), max(high, 1e-30))).neg_().exp_()


def _window_mean(values: Tensor, radius: int) -> Tensor:
    """Mean over the window around each voxel of (z, y, x), as far as it lies inside: few voxels are added faster than they are pooled."""
    for axis, n in enumerate(values.shape):
        total, inside = values.clone(), values.new_ones([n if other == axis else 1 for other in range(3)])
        for step in range(1, min(radius, n - 1) + 1):
            for here, there in (((0, n - step), (step, n - step)), ((step, n - step), (0, n - step))):
                total.narrow(axis, *here).add_(values.narrow(axis, *there))
                inside.narrow(axis, *here).add_(1)
        values = total.div_(inside)
    return values
