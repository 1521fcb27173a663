"""SegFormer3D: strides from spacing and patch, sizes, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_ext.core.plan import NetworkPlan
from nnssl_ext.planners import resenc
from nnssl_ext.planners.memory import Footprint

STAGES = 4  # at most
SMALLEST = 2  # voxels; an axis of the deepest map is never halved below
SIZES: dict[str, dict[str, Any]] = {  # S as published; M and L have widths and depths of SegFormer-B1 and -B2; nano and tiny for the CPU
    "nano": {"features": (16, 32, 64, 96), "blocks": (1, 1, 1, 1), "decoder": 64},
    "tiny": {"features": (32, 64, 96, 160), "blocks": (1, 1, 1, 1), "decoder": 128},
    "S": {"features": (32, 64, 160, 256), "blocks": (2, 2, 2, 2), "decoder": 256},
    "M": {"features": (64, 128, 320, 512), "blocks": (2, 2, 2, 2), "decoder": 256},
    "L": {"features": (64, 128, 320, 512), "blocks": (3, 4, 6, 3), "decoder": 256},
}
BYTES_PER_UNIT = {"fp32": 3.9, "bf16": 2.8}  # of a feature element; measured 3.5-4.0 and 2.5-3.9 (the most with the smallest networks)
BYTES_PER_PARAMETER = 18.0  # AdamW: weight, gradient, two moments in float32; a bfloat16 copy of the weight
BYTES_PER_VOXEL = 8.0  # of the crop: the image and its reconstruction in float32


def strides(spacing: Sequence[float], patch_size: Sequence[int]) -> list[list[int]]:
    """Strides of each stage, (z, y, x).

    Axes are halved by the rule of the U-Nets while their edge is even and at least `2 * SMALLEST` voxels, twice before the first stage.
    """
    halvings, _ = resenc.topology(spacing, patch_size, STAGES + 2, lambda edge: edge % 2 == 0 and edge >= 2 * SMALLEST)
    return [np.prod(halvings[:3], axis=0).tolist(), *halvings[3:]]


def feature_elements(patch_size: Sequence[int], strides: Sequence[Sequence[int]], features: Sequence[int], blocks: Sequence[int], decoder: int) -> int:
    """Scalars of all layers' outputs in one forward pass of one sample, but for keys and values."""
    shape, total, finest = [int(n) for n in patch_size], 0, 0
    for stride, width, count in zip(strides, features, blocks):
        shape = [n // s for n, s in zip(shape, stride)]
        cells = math.prod(shape)
        finest = finest or cells
        total += cells * (width * (3 + 18 * count) + 2 * decoder) + finest * decoder  # embedding, norms, blocks; the decoder's layers; interpolated
    return total + 2 * finest * decoder  # fused and normalised


def parameters(strides: Sequence[Sequence[int]], features: Sequence[int], blocks: Sequence[int], decoder: int) -> float:
    """Approximate number of parameters."""
    kernels = [math.prod(2 * s - 1 for s in stride) for stride in strides]
    reduced = [math.prod(math.prod(steps) for steps in zip((1,) * 3, *strides[stage + 1 : 3])) for stage in range(len(strides))]
    embeddings = sum(kernel * before * width for kernel, before, width in zip(kernels, (1, *features), features))
    inside = sum(n * (12 * width**2 + 120 * width + (factor > 1) * factor * width**2) for n, width, factor in zip(blocks, features, reduced))
    return float(embeddings + inside + decoder * (sum(features) + len(features) * decoder))


def network(spacing: Sequence[float], patch_size: Sequence[int], size: str, target_gb: float, max_batch: int) -> NetworkPlan:
    """The SegFormer3D for a patch, with the batch size that fits `target_gb` (at least 1)."""
    steps = strides(spacing, patch_size)
    features, blocks = ([int(value) for value in SIZES[size][name][: len(steps)]] for name in ("features", "blocks"))
    decoder = SIZES[size]["decoder"]
    elements = feature_elements(patch_size, steps, features, blocks, decoder)
    count = parameters(steps, features, blocks, decoder)
    footprint = Footprint(count, BYTES_PER_PARAMETER, elements, BYTES_PER_UNIT, BYTES_PER_VOXEL * math.prod(int(n) for n in patch_size))
    batch, memory_gb = footprint.batch(target_gb, max_batch)
    kwargs = {"features_per_stage": features, "strides": steps, "n_blocks_per_stage": blocks, "decoder_width": decoder}
    return NetworkPlan(size, "nnssl_ext.nn.segformer3d.SegFormer3D", kwargs, (), batch, memory_gb)
