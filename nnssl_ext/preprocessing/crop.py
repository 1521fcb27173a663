"""The body in a volume."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from nnssl_ext.core.geometry import Box

AIR_HU = -500.0
MARGIN = 2  # voxels kept around the body
_COARSE = 2_000_000  # voxels above which a subsampled grid is searched


def is_ct(modality: str) -> bool:
    """Whether a modality's name says computed tomography ("CT", "ct", "CT_contrast", "CTA", "computed tomography")."""
    return modality.upper().startswith(("CT", "COMPUTED TOMOGRAPHY"))


def body_mask(volume: np.ndarray, modality: str) -> np.ndarray:
    """Voxels of the body: the largest component above a threshold, holes filled slice by slice along each axis.

    The threshold is -500 HU for CT and Otsu's for other modalities. A volume without any such voxel is all body.

    Args:
        volume: (z, y, x).
        modality: "CT..." or any other.

    Returns:
        bool (z, y, x).
    """
    step = max(1, int(np.ceil((volume.size / _COARSE) ** (1 / 3))))
    threshold = AIR_HU if is_ct(modality) else otsu(volume[::step, ::step, ::step])
    mask = volume > threshold
    coarse = mask[::step, ::step, ::step]
    labels, count = ndimage.label(coarse)
    if count == 0:
        return np.ones(volume.shape, bool)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        coarse = labels == sizes.argmax()
    for axis in range(3):  # lungs and bowel gas belong to the body, air around the arms does not
        coarse = _fill_holes(coarse, axis)
    if step == 1:
        return coarse
    sure, near = (grid.repeat(step, 1)[:, : mask.shape[1]].repeat(step, 2)[:, :, : mask.shape[2]] for grid in (~_dilated(~coarse), _dilated(coarse)))
    for first in range(step):  # the surface to the voxel
        planes = mask[first::step]
        planes &= near[: len(planes)]
        planes |= sure[: len(planes)]
    return mask


def _fill_holes(mask: np.ndarray, axis: int) -> np.ndarray:
    """Fill what no path within a slice connects to the slice's border, for all slices across an axis at once."""
    within = np.zeros((3, 3, 3), bool)
    within[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(~mask, np.swapaxes(within, 0, axis))
    outside = np.zeros(count + 1, bool)
    for other in {0, 1, 2} - {axis}:
        for end in (0, -1):
            outside[labels.take(end, other)] = True
    outside[0] = False
    return ~outside[labels]


def _dilated(mask: np.ndarray) -> np.ndarray:
    """By one voxel in all directions, corners too."""
    for axis in range(3):
        old, new = np.swapaxes(mask, 0, axis), np.swapaxes(grown := mask.copy(), 0, axis)
        new[1:] |= old[:-1]
        new[:-1] |= old[1:]
        mask = grown
    return mask


def otsu(volume: np.ndarray) -> float:
    """Otsu's threshold: the cut of a 256-bin histogram that maximises the variance between the two classes.

    Source: Otsu 1979, doi:10.1109/TSMC.1979.4310076.
    """
    low, high = (float(v) for v in np.percentile(volume, (0.5, 99.5)))
    if low >= high:
        low, high = float(volume.min()), float(volume.max())
    if low >= high:
        return high
    counts, edges = np.histogram(volume, 256, (low, high))
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
