"""The configuration `2d`: which way slices lie, how much of them a network sees, and the 2D U-Net that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnssl_ext.core.plan import ConfigPlan, Normalization
from nnssl_ext.planners import resenc

CONFIGURATION = "2d"
SHARE = 0.5  # of the median slice's edges that a patch has: pairs of crops find room in a slice, and a batch holds more of them
SMALL = 64  # pixels; edges of a slice up to this length are not halved
SMALLEST = 2 * resenc.MIN_EDGE  # pixels of a patch along an axis
COVERAGE = 0.05  # of all pixels of the dataset that a batch may hold (nnU-Net)
LIMITS = ((0, 64**2, 16), (1, 128**2, 16), (2, 192**2, 16), (6, 2048**2, 512))  # smallest memory target in GB -> pixels of a patch, largest batch


def configuration(
    spacing: Sequence[float],
    spacings: np.ndarray,
    shapes: np.ndarray,
    size: str,
    memory_gb: float,
    plans_name: str,
    normalization: Mapping[str, Normalization],
) -> tuple[ConfigPlan, list[str]]:
    """The configuration of slices, and why it is as it is.

    Slices lie across the coarsest axis, as nnU-Net cuts them. They are resampled to a common spacing in the plane; how far apart
    they are stays as it is in each case.

    Args:
        spacing: mm of 3d_fullres, (z, y, x).
        spacings, shapes: mm and voxels of every case, (cases, 3).
        size: of the U-Net.
        memory_gb: memory target in GB.
        plans_name: of the plan.
        normalization: by modality.
    """
    axis = int(np.argmax(spacing))
    plane = [other for other in range(3) if other != axis]
    mm = np.asarray(spacing, float)[plane]
    resampled = shapes.copy()
    resampled[:, plane] = np.maximum(1, np.round(spacings[:, plane] / mm * shapes[:, plane]))
    median = np.maximum(1, np.round(np.median(resampled, axis=0))).astype(int)
    pixels, most = next((pixels, most) for at_least, pixels, most in reversed(LIMITS) if memory_gb >= at_least)
    patch, why = _patch(mm, median[plane], size, memory_gb, pixels)
    covered = int(COVERAGE * resampled.prod(1).sum() / np.prod(patch))
    network = resenc.network(mm.tolist(), patch, size, memory_gb, max(2, min(most, covered)))

    config = ConfigPlan(
        data_identifier=f"{plans_name}_{CONFIGURATION}",
        spacing=(*mm[:axis].tolist(), None, *mm[axis:].tolist()),
        patch_size=(*patch[:axis], 1, *patch[axis:]),
        median_shape=tuple(median.tolist()),
        normalization=normalization,
        resampling={"order": 3, "order_z": 0, "force_separate_z": None},
        networks={"resenc": network},
    )
    return config, _decisions(config, axis, memory_gb, why, float(resampled.prod(1).sum()))


def _patch(mm: np.ndarray, median: np.ndarray, size: str, memory_gb: float, pixels: int) -> tuple[list[int], str]:
    """The largest patch, about square in mm and half as long as the median slice, of which two fit the memory target; and what limits it."""
    aspect, stages = 1 / mm, len(resenc.preset(size, axes=2)[2])
    longest = np.maximum(np.minimum(median, SMALL), np.ceil(SHARE * median))
    area, why = float(pixels), f"limited to {pixels:,} pixels, which train at a good pace with {memory_gb:g} GB"
    while True:
        square = np.round(aspect * np.sqrt(area / aspect.prod()))
        patch = _rounded(np.clip(square, SMALLEST, np.maximum(longest, SMALLEST)), mm, stages)
        network = resenc.network(mm.tolist(), patch, size, memory_gb, 2)
        if (network.memory_gb <= memory_gb and network.batch_size == 2) or max(patch) == SMALLEST:
            break
        area, why = 0.8 * min(area, float(np.prod(patch))), f"limited by memory: {memory_gb:g} GB must hold two samples"
    if (np.array(patch) >= median).all():
        why = "it holds the whole median slice (smaller ones are padded)"
    elif (square >= longest).all():
        why = "half of its edges: pairs of crops find room in a slice, and a batch holds more of them"
    return patch, why


def _rounded(patch: np.ndarray, mm: np.ndarray, stages: int) -> list[int]:
    """Rounded up to multiples of the strides; repeated, since a larger patch may be halved more often."""
    edges = [int(edge) for edge in patch]
    while True:
        strides = np.prod(resenc.topology(mm.tolist(), edges, stages)[0], axis=0)
        larger = [int(-(-edge // stride) * stride) for edge, stride in zip(edges, strides)]
        if larger == edges:
            return edges
        edges = larger


def _decisions(config: ConfigPlan, axis: int, memory_gb: float, why: str, voxels: float) -> list[str]:
    network = config.networks["resenc"]
    sizes = (config.spacing_for((0.0,) * 3), config.patch_size, config.median_shape)
    spacing, patch, median = ("x".join(f"{v:g}" for v in np.delete(np.array(values, float), axis).round(3)) for values in sizes)
    strides = network.kwargs["strides"]
    maps = "x".join(str(p // s) for p, s in zip(np.delete(config.patch_size, axis), network.cell))
    return [
        f"{CONFIGURATION}: slices across axis {'zyx'[axis]}, the coarsest one, whose spacing stays each case's own; {spacing} mm in the plane",
        f"{CONFIGURATION}: median slice {median} pixels, patch {patch}, {why}",
        f"{CONFIGURATION}: resenc {network.size}, batch {network.batch_size}, about {network.memory_gb:.2f} of {memory_gb:g} GB",
        f"{CONFIGURATION}: resenc has {len(strides)} stages and halves down to maps of {maps}; no transformer reads slices",
        f"{CONFIGURATION}: {voxels:.3g} voxels of each channel to store",
    ]
