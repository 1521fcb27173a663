"""Pictures of pairs of crops: where both lie in their case, and what the network gets of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnssl_ext.core.geometry import Box
from nnssl_ext.data.loader import ViewBatch
from nnssl_ext.data.spatial import bounds
from nnssl_ext.data.views import read_box
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.pictures import SAMPLES, TILE, Rows, Slices

COLOURS = {"orange": (1.0, 0.55, 0.0), "blue": (0.2, 0.7, 1.0)}  # of the two crops


def pair_rows(store: CaseStore, first: ViewBatch, second: ViewBatch) -> Rows:
    """For a trainer's `picture`: slices of the case with the outlines of both crops, the crops, and their IoU.

    Args:
        first, second: two views of the same cases.
    """
    rows: list[dict[str, np.ndarray | Slices | str]] = []
    for sample in range(min(SAMPLES, len(first.cases))):
        crops = [view.image[sample, 0].float().cpu().numpy() for view in (first, second)]
        affines, sizes = [view.affine[sample].numpy() for view in (first, second)], [crop.shape for crop in crops]
        named = {f"crop {i + 1} ({colour})": crop for i, (colour, crop) in enumerate(zip(COLOURS, crops))}
        rows.append({"case": case_slices(store, first.cases[sample], affines, sizes), **named, "IoU": f"{true_iou(affines, sizes):.2f}"})
    return rows


def inside(affine: np.ndarray, size: Sequence[int], box: Box) -> np.ndarray:
    """Voxels of a box of the case whose centre lies in a crop, turned and zoomed as it may be: bool, of the box's shape."""
    axes = [np.arange(low, high) - shift for (low, high), shift in zip(box, affine[:, 3])]
    held = np.ones([len(axis) for axis in axes], bool)
    for weights, n in zip(np.linalg.inv(affine[:, :3]), size):
        z, y, x = (weight * axis for weight, axis in zip(weights, axes))
        place = z[:, None, None] + y[:, None] + x
        held &= (place > -0.5) & (place < n - 0.5)
    return held


def true_iou(affines: Sequence[np.ndarray], sizes: Sequence[Sequence[int]]) -> float:
    """IoU of what two crops show of their case, counted in its voxels.

    Args:
        affines, sizes: of both; (3, 4), and voxels (z, y, x).
    """
    larger = [np.column_stack((affine[:, :3], affine[:, 3] - affine[:, :3].sum(1))) for affine in affines]  # by a voxel on every side
    reach = [bounds(affine, [n + 2 for n in size]) for affine, size in zip(larger, sizes)]
    (low, high), *plane = ((min(one[0], other[0]), max(one[1], other[1])) for one, other in zip(*reach))
    shared = united = 0
    for z in range(low, high):
        one, other = (inside(affine, size, ((z, z + 1), *plane)) for affine, size in zip(affines, sizes))
        shared, united = shared + np.count_nonzero(one & other), united + np.count_nonzero(one | other)
    return shared / max(1, united)


def case_slices(store: CaseStore, case: int, affines: Sequence[np.ndarray], sizes: Sequence[Sequence[int]]) -> Slices:
    """Three whole slices of a case with the outlines of two crops, in [0, 1].

    They lie in the middle of what both share, and of the first along an axis along which they share nothing.
    """
    shape, middle = store.shape(case), []
    for one, other, n in zip(*(bounds(affine, size) for affine, size in zip(affines, sizes)), shape):
        low, high = max(one[0], other[0]), min(one[1], other[1])
        low, high = (low, high) if low < high else one
        middle.append(min(max(0, (low + high) // 2), n - 1))
    boxes = [tuple((middle[a], middle[a] + 1) if a == axis else (0, n) for a, n in enumerate(shape)) for axis in range(3)]
    images = [read_box(store, case, box)[0].astype(np.float32).squeeze(axis) for axis, box in enumerate(boxes)]
    darkest, brightest = np.percentile(np.concatenate([image.ravel() for image in images]), (1, 99))
    slices = []
    for axis, (image, box) in enumerate(zip(images, boxes)):
        grey = ((image - darkest) / max(brightest - darkest, 1e-6)).clip(0, 1)
        coloured, width = np.repeat(grey[..., None], 3, axis=-1), -(-max(shape) // TILE)
        for affine, size, colour, wide in zip(affines, sizes, COLOURS.values(), (2 * width, width)):  # both are seen where they are the same
            coloured[_outline(inside(affine, size, box).squeeze(axis), wide)] = colour
        slices.append(coloured)
    return slices[0], slices[1], slices[2]


def _outline(held: np.ndarray, width: int) -> np.ndarray:
    """The outermost pixels of an area (h, w)."""
    padded, inner = np.pad(held, width), held.copy()
    for axis in range(2):
        for shift in (-width, width):
            inner &= np.roll(padded, shift, axis)[width:-width, width:-width]
    return held & ~inner
