"""A picture of one test case: image, reference and prediction, in the slice that shows most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nnssl_ext.core.files import atomic_path
from nnssl_ext.evaluation.segmentation_metrics import read_labels
from nnssl_ext.io.case import ENDINGS, stem
from nnssl_ext.io.readers import read_volume


def draw_overlay(path: Path, predictions: Path, raw: Path) -> str:
    """Draw the first test case; its caption."""
    file = sorted(one for one in (raw / "labelsTs").iterdir() if one.name.endswith(ENDINGS))[0]
    case = stem(file.name)
    image, geometry = read_volume(next((raw / "imagesTs").glob(f"{case}_0000.*")))
    reference = read_labels(file)[0]
    predicted = read_labels(predictions / file.name)[0]
    place = int((reference > 0).sum((0, 2)).argmax())
    low, high = np.percentile(image, (1, 99))
    top = max(1, int(max(reference.max(), predicted.max())))
    figure = Figure(figsize=(6, 2.3), layout="constrained")
    for axis, (title, labels) in zip(figure.subplots(1, 3), {"image": None, "reference": reference, "prediction": predicted}.items()):
        axis.imshow(image[:, place], cmap="gray", origin="lower", vmin=low, vmax=high, aspect=geometry.spacing[0] / geometry.spacing[2])
        if labels is not None:
            shown = np.ma.masked_equal(labels[:, place], 0)
            axis.imshow(shown, cmap="tab10" if top <= 10 else "tab20", origin="lower", alpha=0.55, vmin=1, vmax=max(10, top), interpolation="nearest",
                        aspect=geometry.spacing[0] / geometry.spacing[2])  # fmt: skip
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    return f"test case {case}: image, reference, prediction; coronal slice {place}"
