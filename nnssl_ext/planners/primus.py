"""Primus transformers: token size from spacing, sizes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_ext.core.plan import NetworkPlan
from nnssl_ext.planners.memory import Footprint, precision

TOKEN = 8  # voxels along the finest axis
SIZES: dict[str, dict[str, int]] = {  # S, B, M, L as published; nano and tiny for the CPU
    "nano": {"embed_dim": 96, "eva_depth": 4, "eva_numheads": 4},
    "tiny": {"embed_dim": 216, "eva_depth": 4, "eva_numheads": 6},
    "S": {"embed_dim": 396, "eva_depth": 12, "eva_numheads": 6},
    "B": {"embed_dim": 792, "eva_depth": 12, "eva_numheads": 12},
    "M": {"embed_dim": 864, "eva_depth": 16, "eva_numheads": 12},
    "L": {"embed_dim": 1056, "eva_depth": 24, "eva_numheads": 16},
}
BYTES_PER_UNIT = {"fp32": 80.0, "bf16": 56.0}  # of a token, channel and block; measured 75-78 and 51-53 (all tokens encoded, attention not stored)
BYTES_PER_PARAMETER = 18.0  # AdamW: weight, gradient, two moments in float32; a bfloat16 copy of the weight
BYTES_PER_VOXEL = 8.0  # of the crop: the image and its tokens in float32
TOKENIZER_BYTES_PER_VOXEL = {"fp32": 1150.0, "bf16": 700.0}  # of the crop, Primus V2; measured 1080-1140 and 630-690 (48^3 and larger)


def token_size(spacing: Sequence[float]) -> tuple[int, ...]:
    """Token edge lengths in voxels: 8 along the finest axis, halved (down to 1) along coarser ones so that tokens are near cubes in mm."""
    mm = np.asarray(spacing, float)
    halvings = np.clip(np.round(np.log2(mm / mm.min())), 0, 3).astype(int)
    return tuple(int(TOKEN >> h) for h in halvings)


def local_crop(patch_size: Sequence[int], token: Sequence[int]) -> tuple[int, ...]:
    """Edges of a multi-crop method's local crops in voxels: half of the patch, in whole tokens, at least two where the patch has them."""
    return tuple(int(max(min(2, p // t), p // t // 2) * t) for p, t in zip(patch_size, token))


def network(spacing: Sequence[float], patch_size: Sequence[int], size: str, target_gb: float, max_batch: int) -> NetworkPlan:
    """The Primus for a patch, with the batch size that fits `target_gb` (at least 1) when all tokens are encoded."""
    return _network("Primus", token_size(spacing), patch_size, size, target_gb, max_batch, BYTES_PER_VOXEL)


def network_v2(spacing: Sequence[float], patch_size: Sequence[int], size: str, target_gb: float, max_batch: int) -> NetworkPlan | None:
    """The Primus V2 for a patch; None where the tokens are not cubes of 8 voxels, which its tokenizer always makes, or where there is one alone."""
    token = token_size(spacing)
    if token != (TOKEN,) * 3 or max(patch_size) == TOKEN:
        return None
    return _network("PrimusV2", token, patch_size, size, target_gb, max_batch, TOKENIZER_BYTES_PER_VOXEL[precision(target_gb)])


def _network(name: str, token: Sequence[int], patch_size: Sequence[int], size: str, target_gb: float, max_batch: int, bytes_per_voxel: float) -> NetworkPlan:
    preset = SIZES[size]
    tokens = int(np.prod([p // t for p, t in zip(patch_size, token)]))
    width, depth = preset["embed_dim"], preset["eva_depth"]
    parameters = 12.0 * depth * width**2 + tokens * width  # blocks and positions
    footprint = Footprint(parameters, BYTES_PER_PARAMETER, float(tokens * width * depth), BYTES_PER_UNIT, bytes_per_voxel * float(np.prod(patch_size)))
    batch, memory_gb = footprint.batch(target_gb, max_batch)
    kwargs: dict[str, Any] = {**preset, "patch_embed_size": list(token), "drop_path_rate": 0.2, "init_values": 0.1, "scale_attn_inner": True}
    return NetworkPlan(size, f"dynamic_network_architectures.architectures.primus.{name}", kwargs, (), batch, memory_gb)
