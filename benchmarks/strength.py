"""How strongly our augmentation and that of nnU-Net's trainer change a crop: figures for `loader_augmented`, and a picture.

``python -m benchmarks.strength FILE.png`` draws crops at one place of a phantom, augmented by both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image, ImageDraw

from nnssl_ext.core.geometry import Box
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import augment
from nnssl_ext.data.interpolate import interpolate
from nnssl_ext.data.spatial import NNUNET, make_affine
from nnssl_ext.evaluation.phantom import make_phantom

ANGLE = math.radians(30)
OPERATIONS = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")  # in the order of both
NOTHING = np.zeros(3, bool)


def peer_transforms(size: Sequence[int]) -> list:
    """What nnU-Net's trainer does to a patch of `peer_size`: spatial transform, `OPERATIONS`, mirroring (and removing a label)."""
    transforms: list = nnUNetTrainer.get_training_transforms(tuple(size), (-ANGLE, ANGLE), None, (0, 1, 2), False).transforms
    return transforms


def peer_size(size: Sequence[int]) -> tuple[int, ...]:
    """The larger patch that nnU-Net's trainer reads."""
    return tuple(int(n) for n in get_patch_size(tuple(size), (-ANGLE, ANGLE), (-ANGLE, ANGLE), (-ANGLE, ANGLE), (0.85, 1.25)))


def displacement(edge: int, draws: int) -> dict[str, dict[str, float]]:
    """How far rotation and zoom move the voxels of a patch.

    Returns:
        for both the share of draws that move any, and over these the mean distance in voxels: its mean and percentiles.
    """
    grid = np.stack(np.meshgrid(*(np.linspace(-(edge - 1) / 2, (edge - 1) / 2, 9),) * 3, indexing="ij"), -1).reshape(-1, 3)
    peer = peer_transforms((4, 4, 4))[0]
    assert isinstance(peer, SpatialTransform)
    moved: dict[str, list[float]] = {"ours": [], "peer": []}
    for index in range(draws):
        rng = sample_rng(0, index)
        zoom, rotation = NNUNET.draw_zoom(rng), NNUNET.draw_turn(rng)[0]
        other = peer.get_parameters(image=torch.zeros((1, 4, 4, 4)))["affine"]
        for name, matrix in (
            ("ours", make_affine((0, 0, 0), (1, 1, 1), (1, 1, 1), rotation, zoom, NOTHING)[:, :3]),
            ("peer", np.eye(3) if other is None else other),
        ):
            moved[name].append(float(np.linalg.norm(grid @ matrix.T - grid, axis=1).mean()))
    return {name: _summary(np.array(values)) for name, values in moved.items()}


def _summary(values: np.ndarray) -> dict[str, float]:
    some = values[values > 0]
    figures = {"share": (values > 0).mean(), "mean": some.mean(), **{f"p{q}": np.percentile(some, q) for q in (10, 50, 90)}}
    return {name: round(float(figure), 3) for name, figure in figures.items()}


def intensity(image: np.ndarray, draws: int) -> dict[str, dict[str, dict[str, float]]]:
    """How much each operation changes an image (1, z, y, x).

    Returns:
        by operation, for both: the share of draws that change the image, and over these the mean absolute change: its mean and
        percentiles.
    """
    changes: dict[str, dict[str, list[float]]] = {name: {"ours": [0.0] * draws, "peer": []} for name in OPERATIONS}
    for index in range(draws):
        for step in augment.NNUNET.draw(1, sample_rng(1, index)):
            changed = torch.from_numpy(image.copy())
            augment.apply(changed, [step])
            changes[step[0]]["ours"][index] = float(np.abs(changed.numpy() - image).mean())
    for name, transform in zip(OPERATIONS, peer_transforms(image.shape[1:])[1:]):
        for _ in range(draws):
            changes[name]["peer"].append(float(np.abs(transform(image=torch.from_numpy(image.copy()))["image"].numpy() - image).mean()))
    return {name: {side: _summary(np.array(values)) for side, values in sides.items()} for name, sides in changes.items()}


def draw(path: Path, edge: int = 96, count: int = 8) -> None:
    """Middle slices of crops with one centre, as often augmented as in training: a row of ours and a row of nnU-Net's."""
    case = make_phantom(0, 0, (160, 176, 176), (2.0, 1.6, 1.6), "CT").image.astype(np.float32)[None]
    case = (case - case.mean()) / case.std()
    size = (edge,) * 3
    read = tuple(((n - edge) // 2, (n + edge) // 2) for n, edge in zip(case.shape[1:], peer_size(size)))
    center = (np.array(case.shape[1:]) - 1) / 2
    rows = []
    for name, crops in (("nnssl_ext", _ours(case, size, center, count)), ("batchgeneratorsv2", _peers(case, size, read, count))):
        caption = Image.new("L", (count * (edge + 2), 16), 255)
        ImageDraw.Draw(caption).text((2, 2), name, 0)
        rows += [np.asarray(caption), np.hstack([_grey(crop) for crop in crops])]
    Image.fromarray(np.vstack(rows)).save(path, optimize=True)


def _ours(case: np.ndarray, size: tuple[int, ...], center: np.ndarray, count: int) -> Iterator[np.ndarray]:
    for index in range(count):
        rng = sample_rng(2, index)
        zoom = NNUNET.draw_zoom(rng)
        rotation, mirrored = NNUNET.draw_turn(rng)
        crop = torch.from_numpy(interpolate(case, make_affine(center, size, (1, 1, 1), rotation, zoom, mirrored), size))
        augment.apply(crop, augment.NNUNET.draw(1, rng))
        yield crop.numpy()


def _peers(case: np.ndarray, size: tuple[int, ...], read: Box, count: int) -> Iterator[np.ndarray]:
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    transforms = ComposeTransforms(peer_transforms(size))
    for _ in range(count):
        patch = torch.from_numpy(case[(slice(None), *(slice(low, high) for low, high in read))].copy())
        yield transforms(image=patch)["image"].numpy()


def _grey(crop: np.ndarray) -> np.ndarray:
    middle = crop[0, crop.shape[1] // 2]
    return np.pad((255 * ((middle + 0.3) / 2.3).clip(0, 1)).astype(np.uint8), 1, constant_values=255)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
