"""Pictures of volumes: orthogonal slices side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nnssl_ext.core.files import atomic_path

PLANES = ("axial", "coronal", "sagittal")


def draw_volumes(rows: Sequence[Mapping[str, np.ndarray]], path: Path, title: str = "") -> None:
    """One row per sample, for each named volume (z, y, x) its three middle slices; all of a row on one grey scale.

    Args:
        rows: volumes of each sample by caption; the first one sets the grey scale (1-99 %).
        path: PNG file.
        title: above the picture.
    """
    captions = list(rows[0])
    figure = Figure(figsize=(1.7 * 3 * len(captions), 1.9 * len(rows) + 0.6), dpi=80, layout="constrained")
    axes = figure.subplots(len(rows), 3 * len(captions), squeeze=False)
    for row, volumes in zip(axes, rows):
        low, high = np.percentile(volumes[captions[0]], (1, 99))
        for place, caption in enumerate(captions):
            for plane in range(3):
                axis, volume = row[3 * place + plane], volumes[caption]
                cut = np.take(volume, volume.shape[plane] // 2, axis=plane)
                axis.imshow(cut, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="upper" if plane == 0 else "lower")
                axis.set_axis_off()
                axis.set_title(f"{caption}, {PLANES[plane]}" if plane == 0 else PLANES[plane], fontsize=8)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
