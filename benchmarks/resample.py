"""Cubic resampling of volumes against nnU-Net's own function and scikit-image, one thread each.

`detail` also has the cost of the first volume of a size (no matrices kept), label maps, memory and the largest difference.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from scipy import ndimage
from skimage.transform import resize
from threadpoolctl import threadpool_limits

from benchmarks.common import Result, summarize
from nnssl_ext.preprocessing import resample as module
from nnssl_ext.preprocessing.resample import resample, separate_axis
from nnssl_ext.preprocessing.resample_labels import resample_labels

PEER = "nnunetv2 resample_data_or_seg_to_shape"
FIXED = (  # sizes quoted for nnU-Net elsewhere
    ((96, 192, 192), (130, 150, 150)),
    ((122, 101, 112), (183, 152, 168)),
    ((128, 256, 256), (107, 213, 213)),
)


@dataclass(frozen=True)
class Pair:
    """Voxels and mm before and after, (z, y, x)."""

    shape: tuple[int, ...]
    new: tuple[int, ...]
    spacing: tuple[float, ...]
    target: tuple[float, ...]


def pairs(quick: bool) -> list[Pair]:
    """The fixed sizes, and random ones of which every third is anisotropic."""
    rng = np.random.default_rng(0)
    found = [] if quick else [Pair(shape, new, tuple(n / m for n, m in zip(new, shape)), (1, 1, 1)) for shape, new in FIXED]
    for index in range(4 if quick else 12):
        shape, spacing, target = rng.integers(24, 64 if quick else 300, 3), rng.uniform(0.7, 1.6, 3), rng.uniform(0.8, 1.6, 3)
        if index % 3 == 0:
            axis = rng.integers(3)
            shape[axis], spacing[axis] = shape[axis] // 5, spacing[axis] * 5
            target[axis] *= (1, 4)[index % 2]
        new = np.maximum(1, np.rint(shape * spacing / target)).astype(int)
        found.append(Pair(tuple(shape.tolist()), tuple(new.tolist()), tuple(spacing), tuple(target)))
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all threads, and the result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def memory(work: Callable[[], Any]) -> int:
    """Largest number of bytes of NumPy arrays held at once, the arguments not counted."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(pair: Pair, quick: bool) -> dict[str, float]:
    """CPU seconds of everything, the largest difference, bytes per voxel (of the larger of volume and result)."""
    rng = np.random.default_rng(1)
    volume = (ndimage.gaussian_filter(rng.normal(size=pair.shape), 1.5) * 2000 + rng.normal(size=pair.shape) * 50).astype(np.float32)[None]
    grids = (pair.new, pair.spacing, pair.target)

    def ours() -> np.ndarray:
        return resample(volume, *grids)

    def peer() -> np.ndarray:
        found: np.ndarray = resample_data_or_seg_to_shape(volume, *grids, is_seg=False, order=3, order_z=0, force_separate_z=None)
        return found

    module._bands.cache_clear()
    found = {"cold": seconds(ours)[0]}
    found["ours"], result = seconds(ours)
    found["peer"], expected = seconds(peer)
    found["ours"] = statistics.median([found["ours"], seconds(ours)[0], seconds(ours)[0]])
    found["difference"] = float(np.abs(result - expected).max() / np.ptp(volume))
    if separate_axis(pair.spacing, pair.target) is None:
        found["skimage"] = seconds(lambda: resize(volume[0], pair.new, order=3, mode="edge", anti_aliasing=False))[0]
    voxels = max(volume.size, result.size)
    found |= {"bytes": memory(ours) / voxels, "peer_bytes": memory(peer) / voxels}
    labels = np.digitize(ndimage.gaussian_filter(volume[0], 2), np.linspace(-600, 600, 4 if quick else 8)).astype(np.uint8)
    found["labels"], ours_labels = seconds(lambda: resample_labels(labels, *grids))
    found["peer_labels"], peer_labels = seconds(
        lambda: resample_data_or_seg_to_shape(labels[None], *grids, is_seg=True, order=1, order_z=0, force_separate_z=None)
    )
    if not np.array_equal(ours_labels, peer_labels[0]):
        raise RuntimeError(f"labels differ from nnU-Net's for {pair}")
    return found


def run(quick: bool) -> Result:
    with threadpool_limits(1):
        measure(Pair((8, 9, 10), (9, 8, 7), (1, 1, 1), (1, 1, 1)), quick=True)  # imports, thread pools
        found = [measure(pair, quick) for pair in pairs(quick)]
    cold = [row["peer"] / row["cold"] for row in found]
    skimage = [row["skimage"] / row["ours"] for row in found if "skimage" in row]
    labels = [row["peer_labels"] / row["labels"] for row in found]
    detail = {
        "threads": 1,
        "bar": 12,
        "cold_ratio": [round(value, 1) for value in (statistics.median(cold), min(cold), max(cold))],
        "skimage_ratio": [round(value, 1) for value in (statistics.median(skimage), min(skimage), max(skimage))],
        "labels_ratio": [round(value, 1) for value in (statistics.median(labels), min(labels), max(labels))],
        "max_difference": max(row["difference"] for row in found),
        "bytes_per_voxel": {"ours": round(max(row["bytes"] for row in found), 1), "peer": round(max(row["peer_bytes"] for row in found), 1)},
    }
    return summarize([row["ours"] for row in found], [row["peer"] for row in found], PEER, "CPU-s", detail)
