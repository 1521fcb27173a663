"""Figures that show whether features still tell images apart: pure functions of a batch of vectors, computed in fp32.

None of them gives NaN for finite input, constant or zero vectors included. Shape suffixes: n vectors, D dimensions, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-12


def normalized(x_nD: Tensor) -> Tensor:
    """Rows of unit length in fp32; a row of zeros stays one."""
    x = x_nD.float()
    return x / x.norm(dim=1, keepdim=True).clamp_min(EPS)


def spread(x_nD: Tensor) -> Tensor:
    """Mean standard deviation of the normalised vectors over their dimensions, times sqrt(D): 1 isotropic, 0 collapsed.

    Source: Chen & He 2021, arXiv:2011.10566, section 4.1.
    """
    return normalized(x_nD).std(0, correction=0).mean() * math.sqrt(x_nD.shape[1])


def mean_cosine(x_nD: Tensor) -> Tensor:
    """Mean cosine between two different vectors: 0 isotropic, 1 collapsed; 0 for a single vector."""
    x = normalized(x_nD)
    n = len(x)
    return (x.sum(0).square().sum() - x.square().sum()) / max(1, n * (n - 1))


def singular_values(x_nD: Tensor) -> Tensor:
    """Singular values of the normalised vectors, not centred, descending, min(n, D) of them."""
    x = normalized(x_nD).double()
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).float()


def rank_me(values: Tensor) -> Tensor:
    """Effective rank: exp of the entropy of the singular values' shares; between 1 and their number, 0 when all are zero.

    Args:
        values: from `singular_values`.

    Source: Garrido et al. 2023, arXiv:2210.02885.
    """
    return _entropy(values / values.sum().clamp_min(EPS)).exp() * (values.sum() > EPS)


def dimension_share(values: Tensor) -> Tensor:
    """Participation ratio of the squared singular values over their number: 1 when all are equal, 1 / number when one is left."""
    energy = values.square()
    return energy.sum().square() / energy.square().sum().clamp_min(EPS) / len(values)


def directions(x_nD: Tensor) -> Tensor:
    """Participation ratio of the variances of the normalised vectors along their principal axes: D isotropic, 1 on a line, 0 constant.

    It does not depend on the width: RankMe over min(n, D) is lower the wider the vectors are.
    """
    x = normalized(x_nD).double()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    total = gram.trace()
    return (total.square() / gram.square().sum().clamp_min(EPS**2) * (total > EPS * len(x))).float()


def patch_variances(x_BPD: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of normalised patch vectors within their image and between the images' means, summed over the dimensions.

    Args:
        x_BPD: P patches of each of B images.
    """
    x = normalized(x_BPD.flatten(0, 1)).reshape(x_BPD.shape)
    return x.var(1, correction=0).sum(1).mean(), x.mean(1).var(0, correction=0).sum()


def position_r2(x_nD: Tensor, position_n3: Tensor) -> Tensor:
    """Share of the variance of the vectors that a linear map of the position (with an offset) explains, in [0, 1]; 0 for constant vectors.

    Args:
        position_n3: (z, y, x) of each vector in any unit.
    """
    x, design = x_nD.double(), position_n3.double()
    x, design = x - x.mean(0), design - design.mean(0)
    total = x.square().sum()
    left, values, _ = torch.linalg.svd(design, full_matrices=False)
    basis = left[:, values > 1e-9 * values.max().clamp_min(1e-9)]  # an axis along which nothing varies explains nothing
    explained = (basis.T @ x).square().sum() / total.clamp_min(EPS)
    return (explained * (total > EPS * max(1, len(x)))).float()


def dead_share(x_nD: Tensor) -> Tensor:
    """Share of the dimensions whose standard deviation is below 1/1000 of the largest; 1 for constant vectors."""
    deviation = x_nD.float().std(0, correction=0)
    return (deviation <= 1e-3 * deviation.max()).float().mean()


def background_share(image_BCZYX: Tensor) -> Tensor:
    """Share of the voxels in the lowest 5 % of their crop's and channel's range of intensities; 1 for a constant crop."""
    image = image_BCZYX.float().flatten(2)
    low, high = image.amin(2, keepdim=True), image.amax(2, keepdim=True)
    return (image <= low + 0.05 * (high - low)).float().mean()


def conditional_entropy(logits_nK: Tensor) -> Tensor:
    """H_cond in nat: mean entropy of the vectors' class probabilities; log K uniform, 0 one-hot."""
    return _entropy(logits_nK.float().softmax(1)).mean()


def marginal_entropy(mean_K: Tensor) -> Tensor:
    """H_marg in nat: entropy of the mean class probabilities. H_marg - H_cond is the mutual information of vector and class, at most log n."""
    return _entropy(mean_K.float())


def divergence(teacher_nK: Tensor, student_nK: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nat.

    Args:
        teacher_nK, student_nK: logits.
    """
    teacher, student = teacher_nK.float().log_softmax(1), student_nK.float().log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum(1).mean()


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
