"""The body in a volume."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from nnssl_ext.core.geometry import Box

AIR_HU = -500.0
MARGIN = 2  # voxels kept around the body
_COARSE = 2_000_000  # voxels above which components are found on a subsampled mask


def body_mask(volume: np.ndarray, modality: str) -> np.ndarray:
    """Voxels of the body: the largest component above a threshold, holes filled slice by slice along each axis.

    The threshold is -500 HU for CT and Otsu's for other modalities. A volume without any such voxel is all body.

    Args:
        volume: (z, y, x).
        modality: "CT..." or any other.

    Returns:
        bool (z, y, x).
    """
    threshold = AIR_HU if modality.upper().startswith("CT") else otsu(volume)
    mask = volume > threshold
    step = max(1, int(np.ceil((volume.size / _COARSE) ** (1 / 3))))
    coarse = mask[::step, ::step, ::step]
    labels, count = ndimage.label(coarse)
    if count == 0:
        return np.ones(volume.shape, bool)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        coarse = labels == sizes.argmax()
    for axis in range(3):  # lungs and bowel gas belong to the body, air around the arms does not
        slices = np.moveaxis(coarse, axis, 0)
        coarse = np.moveaxis(np.stack([ndimage.binary_fill_holes(cut) for cut in slices]), 0, axis)
    if step == 1:
        return coarse
    corners = np.ones((3, 3, 3), bool)
    sure, near = ndimage.binary_erosion(coarse, corners, border_value=1), ndimage.binary_dilation(coarse, corners)
    return _refined(sure, step, volume.shape) | (_refined(near, step, volume.shape) & mask)  # the surface to the voxel


def _refined(coarse: np.ndarray, step: int, shape: tuple[int, ...]) -> np.ndarray:
    fine = coarse.repeat(step, 0).repeat(step, 1).repeat(step, 2)
    return fine[: shape[0], : shape[1], : shape[2]]


def otsu(volume: np.ndarray) -> float:
    """Otsu's threshold: the cut of a 256-bin histogram that maximises the variance between the two classes.

    Source: Otsu 1979, doi:10.1109/TSMC.1979.4310076.
    """
    low, high = np.percentile(volume, (0.5, 99.5))
    if low >= high:
        low, high = float(volume.min()), float(volume.max())
    counts, edges = np.histogram(volume, 256, (low, high if high > low else low + 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = counts.sum() - below
    weighted = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    return float(edges[1 + np.nanargmax(np.nan_to_num(between[:-1]))])


def bounding_box(mask: np.ndarray, margin: int = MARGIN) -> Box:
    """Smallest box around a mask, enlarged by `margin` voxels within the volume; the whole volume for an empty mask."""
    if not mask.any():
        return tuple((0, n) for n in mask.shape)
    box = []
    for axis, size in enumerate(mask.shape):
        filled = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        box.append((max(0, int(filled[0]) - margin), min(size, int(filled[-1]) + 1 + margin)))
    return tuple(box)
