"""Pictures of places that two crops share: matches, their mirror images, and what the features of one place are like."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.data.loader import ViewBatch
from nnssl_ext.data.sagittal import mirrored
from nnssl_ext.data.spatial import to_case, to_crop
from nnssl_ext.nn.correspondence import shared_places
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.colours import label_colour
from nnssl_ext.trainers.pair_pictures import case_slices
from nnssl_ext.trainers.pictures import SAMPLES, Rows, Slices, blend

NAMES = ("first", "second")
DOTS = 3  # matches along each edge of a slice
HEAT = (1.0, 0.6, 0.0)  # of a likeness of 1


def match_rows(store: CaseStore, model: Any, frames: np.ndarray, first: ViewBatch, second: ViewBatch) -> Rows:
    """For a trainer's `picture`: both crops in their case; matches of equal colours, with rings at their mirror images; likeness to the place in the middle.

    The slices lie in the middle of what is shared; of crops that are turned against each other they are not quite the same.

    Args:
        model: gives unit vectors (B, Q, D) of images (B, C, z, y, x) at places (B, Q, 3).
        frames: from voxels of each case to mm from the middle of its body, (B, 3, 4), see `data.sagittal`.
        first, second: two views of the same cases.
    """
    rows: list[dict[str, np.ndarray | Slices | str]] = []
    for sample in range(min(SAMPLES, len(first.cases))):
        images = [view.image[sample : sample + 1] for view in (first, second)]
        affines, size = [view.affine[sample].numpy() for view in (first, second)], images[0].shape[2:]
        places, valid = shared_places(first.affine[sample : sample + 1], second.affine[sample : sample + 1], size, (1, 1, 1), 1000)
        middle = places[:, 0, int((places[0, 0] - places[0, 0].mean(0)).square().sum(1).masked_fill(~valid[0], torch.inf).argmin())].numpy()
        crops = [blend(volume, np.zeros((*volume.shape, 3), np.float32), 0.0) for volume in (image[0, 0].float().cpu().numpy() for image in images)]
        world = [_composed(frames[sample], affine) for affine in affines]
        row: dict[str, Any] = {"case": case_slices(store, first.cases[sample], affines, [size] * 2)}
        row |= {f"{name} (matches)": _marked(crops[number], middle[number], middle[0], world, number) for number, name in enumerate(NAMES)}
        row |= {f"{name} (likeness)": cuts for name, cuts in zip(NAMES, _likeness(model, images, crops, middle))}
        rows.append(row)
    return rows


def _composed(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return np.column_stack((outer[:, :3] @ inner[:, :3], to_case(outer, inner[:, 3])))


def _marked(crop: np.ndarray, middle: np.ndarray, start: np.ndarray, world: list[np.ndarray], number: int) -> Slices:
    """Slices of a crop (z, y, x, 3) through a place, with dots at places about it, and rings where these are mirrored.

    Args:
        middle, start: the place in this crop, and in the first one, about which the dots are chosen.
        world: from voxels of either crop to mm from the middle of the body.
        number: which of both this one is.
    """
    size, cuts = np.array(crop.shape[:3]), []
    for axis in range(3):
        plane = [other for other in range(3) if other != axis]
        image = _slice(crop, axis, middle)
        radius = max(1.0, max(image.shape) / 40)
        for dot, shifts in enumerate(product(np.linspace(-0.3, 0.3, DOTS), repeat=2)):
            place = start.copy()
            place[plane] += shifts * size[plane]
            there = to_case(world[0], place)
            for point, hollow in ((there, False), (mirrored(there), True)):
                at = to_crop(world[number], point)
                if abs(at[axis] - middle[axis]) <= 2 * radius and (at > -0.5).all() and (at < size - 0.5).all():
                    _draw(image, at[plane], radius, label_colour(dot), hollow)
        cuts.append(image)
    return cuts[0], cuts[1], cuts[2]


def _draw(image: np.ndarray, at: np.ndarray, radius: float, colour: tuple[float, float, float], hollow: bool) -> None:
    rows, columns = np.indices(image.shape[:2])
    distance = np.hypot(rows - at[0], columns - at[1])
    image[(np.abs(distance - 1.5 * radius) <= 0.5 * radius) if hollow else (distance <= radius)] = colour


def _likeness(model: Any, images: list[Tensor], crops: list[np.ndarray], middle: np.ndarray) -> list[Slices]:
    """Cosines of the vectors of all voxels in slices with that of the middle place of the first crop, negative ones as 0, as heat over the crops."""
    voxels = np.moveaxis(np.indices(crops[0].shape[:3]), 0, -1)
    asked = [np.concatenate([at[None], *(_slice(voxels, axis, at).reshape(-1, 3) for axis in range(3))]) for at in middle]
    vectors = model(torch.cat(images), torch.from_numpy(np.stack(asked)).to(images[0]))
    cosines = (vectors[:, 1:] @ vectors[0, 0]).clamp_min(0).float().cpu().numpy()
    found = []
    for crop, at, values in zip(crops, middle, cosines):
        cuts = [_slice(crop, axis, at) for axis in range(3)]
        ends = np.cumsum([cut[..., 0].size for cut in cuts])
        heats = [part.reshape(*cut.shape[:2], 1) for part, cut in zip(np.split(values, ends[:-1]), cuts)]
        axial, coronal, sagittal = ((1 - heat) * cut + heat * np.array(HEAT) for cut, heat in zip(cuts, heats))
        found.append((axial, coronal, sagittal))
    return found


def _slice(volume: np.ndarray, axis: int, at: np.ndarray) -> np.ndarray:
    """Copy of the slice of a volume (z, y, x, ...) across an axis that is nearest to a place."""
    return np.take(volume, int(np.rint(at[axis]).clip(0, volume.shape[axis] - 1)), axis=axis)
