"""Corruptions that need a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor


def partners(count: int) -> list[int]:
    """For each sample of a batch of two or more another one of it: its neighbour in a pair, so that halves of a batch on two ranks agree with the whole."""
    return [number ^ 1 if number ^ 1 < count else number - 1 for number in range(count)]


def swap(image: Tensor, hidden: Tensor, clean: Tensor) -> Tensor:
    """Images (B, C, z, y, x) whose hidden voxels (B, z, y, x) are those of the partners' clean crops (B, C, z, y, x)."""
    return torch.where(hidden[:, None], clean[partners(len(image))], image)


def turn(images: Tensor, times: Tensor, plane: tuple[int, int]) -> Tensor:
    """Images (B, C, z, y, x), each after its own number of quarter turns (B,) in a plane of equal edges (half turns: any edges)."""
    axes = (plane[0] + 1, plane[1] + 1)
    return torch.stack([image.rot90(number, axes) for image, number in zip(images, times.tolist())])
