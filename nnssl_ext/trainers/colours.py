"""Feature maps and cluster assignments as colours."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from torch import Tensor


def pca_rgb(features: Tensor) -> np.ndarray:
    """The three directions in which features vary most, as red, green and blue; similar tokens have similar colours.

    The components are those of all tokens of the batch together; each is signed so that its largest weight is positive,
    and scaled so that its 1-99 % percentiles span [0, 1]. What doesn't vary is 0.5.

    Args:
        features: (B, C, d, h, w).

    Returns:
        (B, d, h, w, 3) float32 in [0, 1].
    """
    tokens = features.detach().double().movedim(1, -1).flatten(0, 3).cpu()
    tokens = tokens - tokens.mean(0)
    variances, directions = torch.linalg.eigh(tokens.T @ tokens)  # ascending
    colours = torch.full((len(tokens), 3), 0.5, dtype=torch.float64)
    for colour in range(min(3, tokens.shape[1])):
        direction = directions[:, -1 - colour]
        values = tokens @ (direction * direction[direction.abs().argmax()].sign())
        low, high = np.percentile(values.numpy(), (1, 99))
        if variances[-1 - colour] > 1e-12 * variances[-1].clamp_min(1e-30) and high > low:
            colours[:, colour] = ((values - low) / (high - low)).clamp(0, 1)
    return colours.reshape(len(features), *features.shape[2:], 3).float().numpy()


def cluster_rgb(assignments: Tensor) -> np.ndarray:
    """The likeliest cluster of every token as a colour that depends on its number alone.

    Args:
        assignments: (B, K, d, h, w), probabilities or logits.

    Returns:
        (B, d, h, w, 3) float32 in [0, 1].
    """
    palette = np.array([label_colour(number) for number in range(assignments.shape[1])], np.float32)
    colours: np.ndarray = palette[assignments.argmax(1).cpu().numpy()]
    return colours


def label_rgb(labels: np.ndarray) -> np.ndarray:
    """Numbers of clusters, from 1, as colours (..., 3) float32 in [0, 1], those of `cluster_rgb`; 0 is black."""
    palette = np.array([(0.0, 0.0, 0.0), *(label_colour(number) for number in range(int(labels.max(initial=0))))], np.float32)
    colours: np.ndarray = palette[labels]
    return colours


def label_colour(number: int) -> tuple[float, float, float]:
    """Neighbouring numbers get hues far apart (golden ratio), in three brightnesses."""
    return colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.55 + 0.4 * (number % 2), (1.0, 0.75, 0.5)[number % 3])


def displacement_rgb(displacements: Tensor) -> np.ndarray:
    """Displacements (B, 3, z, y, x) as colours (B, z, y, x, 3) float32 in [0, 1]: grey for none; red, green and blue for z, y and x, by the largest of all."""
    largest = displacements.abs().amax().clamp_min(1e-6)
    return (0.5 + 0.5 * displacements / largest).movedim(1, -1).float().cpu().numpy()  # type: ignore[no-any-return]
