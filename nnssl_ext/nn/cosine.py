"""Agreement of vectors by their directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_ext.nn.precision import wide

EPS = 1e-8  # of the norms: a vector of zeros stays one


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the vectors of -cos(p, z), in [-1, 1]; without gradient through z.

    Args:
        p, z: (B, D).

    Source: Chen & He 2021, arXiv:2011.10566, eq. 1 and 3.
    """
    with torch.autocast(p.device.type, enabled=False):
        p, z = (F.normalize(wide(x), dim=1, eps=EPS) for x in (p, z.detach()))
        return -(p * z).sum(1).mean()
