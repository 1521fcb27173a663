"""The figure of the two grid conventions: errors of a translation by position, and found against true displacements of a smooth field.

``python -m benchmarks.registration_figure FILE.png``: four channels of smooth noise in 36^3 voxels, one thread, a minute. Prints the figures shown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor

from nnssl_ext.core.files import atomic_path
from nnssl_ext.evaluation.registration import Settings, register_features
from nnssl_ext.nn.warp import warp

EDGE, MARGIN, SHIFT, LONGEST = 36, 6, (3, -2, 4), 5.0  # voxels
SETTINGS = Settings(step=4, reach=3, iterations=60)
CONVENTIONS = {"present": False, "legacy": True}


def noise(edge: int, seeds: range, sigma: float) -> Tensor:
    """Channels of smooth noise of unit variance."""
    channels = [ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((edge,) * 3), sigma) for seed in seeds]
    return torch.from_numpy(np.stack([channel / channel.std() for channel in channels]).astype(np.float32))


def translation() -> tuple[Tensor, Tensor, Tensor]:
    """Fixed and moving features, cut out of larger ones, and the true displacement."""
    whole = noise(EDGE + 2 * MARGIN, range(4), 2.0)
    fixed, moving = (whole[(slice(None), *[slice(MARGIN - by, MARGIN - by + EDGE) for by in shift])] for shift in ((0, 0, 0), SHIFT))
    return fixed, moving, torch.tensor(SHIFT).view(3, 1, 1, 1).expand(3, EDGE, EDGE, EDGE).float()


def smooth_field() -> tuple[Tensor, Tensor, Tensor]:
    moving, field = noise(EDGE, range(4), 2.0), noise(EDGE, range(10, 13), 6.0)
    field = field * LONGEST / torch.linalg.vector_norm(field, dim=0).max()
    return warp(moving[None], field[None])[0], moving, field


def draw(path: Path) -> dict[str, Any]:
    """Write the figure; gives the mean end-point error in voxels by what is registered, and the length found over the true one of each convention."""
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    figures: dict[str, Any] = {}
    for name, legacy in CONVENTIONS.items():
        for task, (fixed, moving, true) in (("translation", translation()), ("smooth field", smooth_field())):
            found = register_features(fixed, moving, replace(SETTINGS, legacy=legacy))
            away = torch.linalg.vector_norm(found - true, dim=0)
            length = float((found * true).sum() / true.square().sum())
            figures[f"{task}, {name}"] = {"error": round(float(away.mean()), 3), "length": round(length, 3)}
            label = f"{name}: mean error {away.mean():.2f}, length {length:.3f}"
            if task == "translation":
                depth = np.minimum.reduce(np.meshgrid(*[np.minimum(np.arange(EDGE), EDGE - 1 - np.arange(EDGE))] * 3))
                left.plot([float(away[torch.from_numpy(depth == d)].mean()) for d in range(EDGE // 2)], label=label)
            else:
                inside = (slice(None), *[slice(MARGIN, -MARGIN)] * 3)
                t, f = true[inside].flatten().numpy(), found[inside].flatten().numpy()
                edges = np.linspace(-3.5, 3.5, 15)
                bins = [f[(t >= low) & (t < high)].mean() if ((t >= low) & (t < high)).any() else np.nan for low, high in zip(edges, edges[1:])]
                right.plot((edges[1:] + edges[:-1]) / 2, bins, "o-", markersize=4, label=label)
    left.set(xlabel="distance from the nearest face, voxels", ylabel="mean end-point error, voxels", ylim=(0, None))
    left.set_title(f"translation by {SHIFT} voxels", fontsize=10)
    right.plot([-3.5, 3.5], [-3.5, 3.5], color="0.7", zorder=0)
    right.set(xlabel="true component, voxels", ylabel="mean component found, voxels")
    right.set_title(f"smooth field of up to {LONGEST:g} voxels, {MARGIN} or more from the faces", fontsize=10)
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.registration_figure", description=__doc__)
    parser.add_argument("path", type=Path, metavar="FILE.png")
    torch.set_num_threads(1)
    print(json.dumps(draw(parser.parse_args().path)))


if __name__ == "__main__":
    main()
