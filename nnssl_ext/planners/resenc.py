"""Residual-encoder U-Nets: topology from spacing and patch, sizes, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from nnssl_ext.core.plan import NetworkPlan
from nnssl_ext.planners.memory import Footprint

MIN_EDGE = 4  # voxels; an axis of the deepest map is never pooled below
# of a feature element; measured 10.0-10.6 and 5.7-6.1. nnU-Net calibrates the latter with 680e6 elements per sample, of which two fill 8 GB
BYTES_PER_UNIT = {"fp32": 10.3, "bf16": 8e9 / (2 * 680e6)}
BYTES_PER_PARAMETER = 16.0  # SGD: weight, gradient, momentum in float32, a bfloat16 copy of the weight; 2 to spare
SIZES: dict[str, dict[str, Any]] = {  # of 3D networks; M and L are nnU-Net's presets: one topology, other memory targets
    "nano": {"base": 8, "maximum": 64, "blocks": (1, 1, 1, 1)},
    "tiny": {"base": 16, "maximum": 128, "blocks": (1, 1, 1, 1, 1)},
    "S": {"base": 32, "maximum": 256, "blocks": (1, 2, 2, 3, 3, 3)},
    "M": {"base": 32, "maximum": 320, "blocks": (1, 3, 4, 6, 6, 6, 6)},
    "L": {"base": 32, "maximum": 320, "blocks": (1, 3, 4, 6, 6, 6, 6)},
}
MAXIMUM_2D = 512  # features of a stage of the sizes M and L, as nnU-Net's
STAGES_2D = 10  # at most; blocks beyond those of a size's 3D network are as many as in its last stage
_IMPORTS = ("conv_op", "norm_op", "dropout_op", "nonlin")


def _long(edge: int) -> bool:
    return edge >= 2 * MIN_EDGE


def topology(
    spacing: Sequence[float], patch_size: Sequence[int], max_stages: int = 7, halvable: Callable[[int], bool] = _long
) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernel sizes of each stage (nnU-Net's rule: keep voxels as isotropic as possible).

    An axis is halved while it has at least `2 * MIN_EDGE` voxels and its spacing is within a factor of two of the
    finest axis that can still be halved; its kernel is 1 until its spacing is within a factor of two of the finest.

    Args:
        spacing: mm, (z, y, x), or of two axes for a 2D network.
        patch_size: voxels along these axes.
        max_stages: at most so many stages.
        halvable: whether an axis of so many voxels may be halved.

    Source: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 2.
    """
    size, mm = [int(n) for n in patch_size], [float(s) for s in spacing]  # plain numbers: a planner asks for hundreds of topologies
    kernel = [1] * len(mm)
    strides, kernels = [[1] * len(mm)], []
    while len(strides) < max_stages:
        able = [halvable(n) for n in size]
        if not any(able):
            break
        finest = min(s for s, a in zip(mm, able) if a)
        able = [a and s < 2 * finest for s, a in zip(mm, able)]
        if sum(able) == 1 and size[able.index(True)] < 3 * MIN_EDGE:
            break
        kernel = [3 if s < 2 * min(mm) else k for s, k in zip(mm, kernel)]
        kernels.append(kernel)
        strides.append([2 if a else 1 for a in able])
        mm = [2 * s if a else s for s, a in zip(mm, able)]
        size = [-(-n // 2) if a else n for n, a in zip(size, able)]
    kernels.append([3] * len(mm))
    return strides, kernels


def feature_elements(patch_size: Sequence[int], strides: Sequence[Sequence[int]], features: Sequence[int], blocks: Sequence[int], classes: int = 2) -> int:
    """Scalars of all convolution outputs in one forward pass of one sample; what nnU-Net's memory estimate counts."""
    shape = [int(n) for n in patch_size]
    voxels = []
    for stride in strides:  # that of the first stage is 1
        shape = [-(-n // s) for n, s in zip(shape, stride)]
        voxels.append(math.prod(shape))
    total = voxels[0] * features[0]  # stem
    for stage, count in enumerate(blocks):
        shortcut = stage > 0 and (features[stage] != features[stage - 1] or max(strides[stage]) > 1)
        total += voxels[stage] * features[stage] * (2 * count + int(shortcut))
    decoder = sum(voxels[stage] * 2 * features[stage] for stage in range(len(features) - 1))  # transposed and ordinary convolution
    return total + decoder + voxels[0] * classes


def parameters(features: Sequence[int], blocks: Sequence[int], axes: int = 3) -> float:
    """Approximate number of parameters with kernels of edge 3."""
    kernel, halving = 3.0**axes, 2.0**axes
    encoder = sum(kernel * f * (previous + f + 2 * (n - 1) * f) for f, previous, n in zip(features, [features[0], *features], blocks))
    return encoder + sum(kernel * 2 * f * f + halving * f * deeper for f, deeper in zip(features, features[1:]))


def preset(size: str, axes: int = 3) -> tuple[int, int, tuple[int, ...]]:
    """Features of the first and of the widest stage, and residual blocks of every stage that there can be."""
    base, maximum, blocks = SIZES[size]["base"], SIZES[size]["maximum"], SIZES[size]["blocks"]
    if axes == 3:
        return base, maximum, blocks
    return base, MAXIMUM_2D if size in ("M", "L") else maximum, blocks + (STAGES_2D - len(blocks)) * blocks[-1:]


def network(spacing: Sequence[float], patch_size: Sequence[int], size: str, target_gb: float, max_batch: int) -> NetworkPlan:
    """The ResEnc U-Net for a patch, with the batch size that fits `target_gb` (at least 1); a 2D one for spacing and patch of two axes."""
    axes = len(patch_size)
    base, maximum, most = preset(size, axes)
    strides, kernels = topology(spacing, patch_size, max_stages=len(most))
    stages = len(strides)
    features = [min(maximum, base * 2**i) for i in range(stages)]
    blocks = list(most[:stages])
    elements = feature_elements(patch_size, strides, features, blocks)
    footprint = Footprint(parameters(features, blocks, axes), BYTES_PER_PARAMETER, elements, BYTES_PER_UNIT)
    batch, memory_gb = footprint.batch(target_gb, max_batch)
    kwargs = {
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return NetworkPlan(size, "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet", kwargs, _IMPORTS, batch, memory_gb)
