"""Pictures of crops and of the clusters of their patches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from nnssl_ext.trainers.colours import cluster_rgb
from nnssl_ext.trainers.pictures import Rows, Slices, blend

DARK = 0.35  # of the brightness is left outside of what is shared


def cluster_rows(views: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Rows:
    """For a trainer's `picture`: crops, and the likeliest cluster of each of their cells in colour; dark where the other crops don't reach.

    The slices lie in the middle of what is shared: crops that are mirrored alike show the same place there.

    Args:
        views: by name: crops (B, C, z, y, x), of which the first channel is shown; clusters (B, K, d, h, w), probabilities or
            logits; which voxels the other crops have, too, (B, z, y, x) bool.
    """
    rows: list[dict[str, Slices]] = [{} for _ in next(iter(views.values()))[0]]
    for suffix, amount in (("", 0.0), (", clusters", 0.6)):
        for name, (images, clusters, shared) in views.items():
            for row, image, colours, light in zip(rows, images[:, 0].float().cpu().numpy(), cluster_rgb(clusters), shared.cpu().numpy()):
                row[name + suffix] = _slices(blend(image, colours, amount), light)
    return rows


def _slices(volume: np.ndarray, light: np.ndarray) -> Slices:
    """Of a volume (z, y, x, 3), through the middle of where it is light; where that is nowhere, through its own middle."""
    places = np.argwhere(light if light.any() else ~light)
    shown = volume * np.where(light, 1.0, DARK)[..., None]
    z, y, x = (places.min(0) + places.max(0)) // 2
    return shown[z], shown[:, y], shown[:, :, x]
