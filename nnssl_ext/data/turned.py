"""Two quarter-turned views of a crop, with boxes of noise and boxes that are left for another sample's voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.data.corrupt import value_range
from nnssl_ext.data.views import Crop, View
from nnssl_ext.preprocessing.store import CaseStore

_PLANES = ((1, 2), (0, 2), (0, 1))  # about the axes z, y, x
_EQUAL = 0.01  # share by which two spacings may differ
_EDGES = (0.05, 0.25)  # of a box, over those of the crop
_AT_ONCE = 64  # boxes that are drawn together


@dataclass(frozen=True)
class Turning:
    """How crops are turned, so that they keep their size and their voxels.

    Args:
        size: voxels of the crops, (z, y, x).
        plane: the two axes that are turned, from the first to the second.
        turns: numbers of quarter turns that occur.
    """

    size: tuple[int, ...]
    plane: tuple[int, int]
    turns: tuple[int, ...]


def choose_turning(patch_size: Sequence[int], spacing: Sequence[float | None] | None, stride: Sequence[int]) -> Turning:
    """The turning that leaves most of the patch.

    Axes of equal spacing can be turned by 90 degrees after the longer one is cropped to a square that the strides divide. Where
    no two axes are alike, or the spacing is each case's own, slices are turned by 0 and 180 degrees, which every crop allows.

    Args:
        patch_size: voxels, (z, y, x).
        spacing: mm, (z, y, x), or None; None for the axis across slices, which are turned in their plane.
        stride: what must divide each axis of an input, (z, y, x).
    """
    found, planes = [], [plane for plane in _PLANES if patch_size[plane[0]] > 1 and patch_size[plane[1]] > 1] or [_PLANES[0]]
    for plane in planes if spacing is not None else ():
        multiple = math.lcm(*(stride[axis] for axis in plane))
        edge = min(patch_size[axis] for axis in plane) // multiple * multiple
        apart = max(spacing[axis] for axis in plane) / min(spacing[axis] for axis in plane) - 1  # type: ignore[index,type-var,operator]
        if edge and apart <= _EQUAL:
            found.append(Turning(tuple(edge if axis in plane else n for axis, n in enumerate(patch_size)), plane, (0, 1, 2, 3)))
    return max(found, key=lambda turning: math.prod(turning.size), default=Turning(tuple(patch_size), planes[0], (0, 2)))


def turn(image: np.ndarray, affine: np.ndarray, times: int, plane: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Copy of an image (C, z, y, x) and its affine (3, 4) after quarter turns, as `np.rot90`."""
    turned = np.rot90(image, times, (plane[0] + 1, plane[1] + 1)).copy()
    once = np.eye(3)
    once[plane, plane] = 0
    once[plane], once[plane[::-1]] = 1, -1
    matrix, middle = affine[:, :3] @ np.linalg.matrix_power(once, times), (np.array(image.shape[1:]) - 1) / 2
    return turned, np.column_stack((matrix, affine[:, 3] + (affine[:, :3] - matrix) @ middle))


def turns(turned: Tensor, clean: Tensor, plane: tuple[int, int]) -> Tensor:
    """Number of quarter turns (B,), 0 to 3, from the affines (B, 3, 4) of crops to those of their turned versions."""
    rotation = torch.linalg.solve(clean[:, :, :3], turned[:, :, :3])
    angle = torch.atan2(rotation[:, plane[0], plane[1]], rotation[:, plane[0], plane[0]])
    return (angle / (torch.pi / 2)).round().long() % 4


def boxes(shape: Sequence[int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Random boxes with edges of 5 to 25 % of the volume's, bool (z, y, x); the first one that would exceed `share` of the volume is left out."""
    low, high = (np.maximum(1, np.floor(np.array(shape) * edge)).astype(int) for edge in _EDGES)
    chosen = np.zeros(tuple(shape), bool)
    left = share * chosen.size
    while True:
        edges = rng.integers(low, high, (_AT_ONCE, 3), endpoint=True)
        starts = rng.integers(0, np.array(shape) - edges, endpoint=True)
        for (z, y, x), (d, h, w) in zip(starts.tolist(), edges.tolist()):
            box = chosen[z : z + d, y : y + h, x : x + w]
            left -= box.size - np.count_nonzero(box)
            if left < 0:
                return chosen
            box[...] = True


@dataclass(frozen=True)
class TurnedPair:
    """One random crop, as view "target", and two versions of it, "image_0" and "image_1", each turned, with noise and a mask of its own.

    The mask has a cell per voxel; it hides what another sample's voxels are to replace. The affine of a version says how often
    it is turned (`turns`).

    Args:
        crop: where it comes from; mirrored crops would make half a turn look like none.
        turning: how it is turned.
        noise, hidden: largest share of the crop that becomes noise, and that is hidden; uniform from 0.
    """

    crop: Crop
    turning: Turning
    noise: float = 0.3
    hidden: float = 0.3

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        target = self.crop.sample(store, case, rng)["image"]
        return {f"image_{i}": self._version(target, rng) for i in range(2)} | {"target": target}

    def _version(self, target: View, rng: np.random.Generator) -> View:
        image, affine = turn(target.image, target.affine, int(rng.choice(self.turning.turns)), self.turning.plane)
        noisy = boxes(image.shape[1:], rng.uniform(0, self.noise), rng)
        low, high = value_range(image)[:, :, None]
        image[:, noisy] = rng.random((len(image), np.count_nonzero(noisy)), np.float32) * (high - low) + low
        return View(image, affine, boxes(image.shape[1:], rng.uniform(0, self.hidden), rng))
