"""Pictures of what a method sees and makes of it: orthogonal middle slices of crops, masks, reconstructions and features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from nnssl_ext.core.files import atomic_path
from nnssl_ext.data.loader import Batch
from nnssl_ext.nn.backbones.base import feature_level as feature_level
from nnssl_ext.nn.tokens import voxel_mask
from nnssl_ext.trainers.colours import pca_rgb

if TYPE_CHECKING:
    from nnssl_ext.trainers.base import SSLTrainer

PLANES = ("axial", "coronal", "sagittal")
TILE, GAP, MARGIN, LINE = 150, 4, 92, 18  # pixels: a slice's longest edge, between slices, captions at the left, a line of text
SAMPLES, VIEWS = 2, 4  # that are shown, at most

Slices = tuple[np.ndarray, np.ndarray, np.ndarray]
Rows = Sequence[Mapping[str, np.ndarray | Slices | str]]


def draw_run(trainer: SSLTrainer, batch: Batch, path: Path) -> None:
    """Picture of a batch: what the method shows of it, or its views; below, the features of the backbone that is handed over.

    No random number is drawn, and every module stays in its mode.
    """
    backbone = trainer.transferred()
    with torch.no_grad(), evaluating(trainer.model, backbone):
        rows = [dict(row) for row in trainer.picture(batch) or view_rows(batch)]
        shape = (backbone.channels, *trainer.config_plan.patch_size)
        view = next((v for v in batch.values() if v.image.shape[1:] == shape), None)
        if view is not None and "pyramid" in backbone.supports:
            colours = pca_rgb(backbone.dense(view.image[: len(rows)]).float())
            for row, image, colour in zip(rows, view.image.float().cpu().numpy(), colours):
                row["features (PCA)"] = blend(image[0], colour)
    draw_volumes(rows, path, f"{type(trainer).__name__}, {trainer.family}, step {trainer.next_step}", trainer.config_plan.spacing_for((1.0, 1.0, 1.0)))


def view_rows(batch: Batch) -> list[dict[str, np.ndarray]]:
    """First channel of the first views of some samples, and what of them is visible where a mask hides voxels."""
    views = list(batch.items())[:VIEWS]
    rows = []
    for sample in range(min(SAMPLES, len(views[0][1].image))):
        row: dict[str, np.ndarray] = {}
        for name, view in views:
            row[name] = view.image[sample, 0].float().cpu().numpy()
            if view.mask is not None:
                row[f"{name}, visible"] = _hidden_dark(row[name], view.mask[sample].cpu().numpy())
        rows.append(row)
    return rows


def volume_rows(volumes: Mapping[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """First channel of volumes (B, C, z, y, x) by caption, sample by sample."""
    count = len(next(iter(volumes.values())))
    return [{caption: volume[i, 0].float().cpu().numpy() for caption, volume in volumes.items()} for i in range(count)]


def masked_rows(image: Tensor, mask: Tensor, reconstruction: Tensor, caption: str = "reconstruction") -> list[dict[str, np.ndarray]]:
    """First channel of crops (B, C, z, y, x), of what a mask (B, d, h, w) leaves visible, and of that with the hidden voxels reconstructed."""
    hidden = voxel_mask(mask, image.shape[2:])
    return volume_rows({"crop": image, "visible": image.masked_fill(hidden, image.min()), caption: torch.where(hidden, reconstruction.float(), image)})


def _hidden_dark(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    colours = np.repeat(_grey(image)[..., None], 3, axis=-1)
    colours[enlarge(mask, image.shape)] = (0.05, 0.1, 0.3)
    return colours


def _grey(image: np.ndarray) -> np.ndarray:
    """Intensities in [0, 1] between the 1 % and 99 % percentiles."""
    low, high = np.percentile(image, (1, 99))
    grey: np.ndarray = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return grey


def enlarge(grid: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cells (d, h, w, ...) as voxels (z, y, x, ...), nearest neighbour; cells have equal edges but for the last of an axis."""
    for axis, size in enumerate(shape):
        edge = -(-size // grid.shape[axis])
        grid = np.take(grid, np.arange(size) // edge, axis=axis)
    return grid


def blend(image: np.ndarray, colours: np.ndarray, amount: float = 0.6) -> np.ndarray:
    """Colours of cells (d, h, w, 3) over a grey image (z, y, x), as (z, y, x, 3) in [0, 1]."""
    grey = _grey(image)[..., None]
    return amount * enlarge(colours, image.shape) * (0.35 + 0.65 * grey) + (1 - amount) * grey


def draw_volumes(rows: Rows, path: Path, title: str = "", spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    """Three slices of every volume, the middle ones: a line per caption, three columns per sample; lengths in proportion to mm.

    Where all volumes are a single slice, it alone is shown.

    Args:
        rows: what is shown of each sample, by caption: grey (z, y, x), all of a sample on the scale of its first one (1-99 %), colours
            (z, y, x, 3) in [0, 1], three slices of either (axial, coronal, sagittal), or a text, which stands above the sample.
        path: PNG file.
        title: above the picture.
        spacing: mm, (z, y, x).
    """
    captions = [caption for caption, shown in rows[0].items() if not isinstance(shown, str)]
    texts = [", ".join(f"{name} {text}" for name, text in row.items() if isinstance(text, str)) for row in rows]
    head = (3 if any(texts) else 2) * LINE + 2
    planes = _planes(rows[0])
    width = MARGIN + len(rows) * (len(planes) * (TILE + GAP) + GAP)
    canvas = Image.new("RGB", (width, head + 2 + len(captions) * (TILE + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    pen.text((4, 2), title, fill="black", font=font)
    for sample, (volumes, text) in enumerate(zip(rows, texts)):
        left = MARGIN + sample * (len(planes) * (TILE + GAP) + GAP)
        pen.text((left, LINE + 1), text, fill="black", font=font)
        grey = next((volume for volume in volumes.values() if isinstance(volume, np.ndarray) and volume.ndim == 3), np.zeros((1, 1, 1)))
        low, high = np.percentile(grey, (1, 99))
        for line, caption in enumerate(captions):
            top = head + line * (TILE + GAP)
            if sample == 0:
                pen.multiline_text((4, top + 4), caption.replace(" (", "\n(").replace(", ", ",\n"), fill="black", font=font)
            for column, plane in enumerate(planes):
                x = left + column * (TILE + GAP)
                if line == 0:
                    pen.text((x, head - LINE - 1), PLANES[plane], fill="black", font=font)
                tile = _slice(volumes[caption], plane, spacing, low, high)
                canvas.paste(tile, (x + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="png", optimize=True)


def _planes(row: Mapping[str, np.ndarray | Slices | str]) -> list[int]:
    """The axes across which slices are shown."""
    shapes = [volume.shape[:3] for volume in row.values() if isinstance(volume, np.ndarray)]
    thin = [axis for axis in range(3) if shapes and all(shape[axis] == 1 for shape in shapes)]
    return thin if len(thin) == 1 else list(range(len(PLANES)))


def _slice(volume: np.ndarray | Slices | str, plane: int, spacing: Sequence[float], low: float, high: float) -> Image.Image:
    """The slice across an axis, the middle one of a volume, head up, enlarged to fit a tile."""
    assert not isinstance(volume, str)
    shape = (volume[1].shape[0], *volume[0].shape[:2]) if isinstance(volume, tuple) else volume.shape[:3]
    cut = volume[plane] if isinstance(volume, tuple) else np.take(volume, shape[plane] // 2, axis=plane)
    if cut.ndim == 2:
        cut = (cut - low) / max(high - low, 1e-6)
    pixels = (255 * np.clip(cut if plane == 0 else cut[::-1], 0, 1)).round().astype(np.uint8)
    edges = np.array([n * mm for axis, (n, mm) in enumerate(zip(shape, spacing)) if axis != plane])
    longest = max(n * mm for n, mm in zip(shape, spacing))
    height, wide = np.maximum(1, np.round(TILE * edges / longest)).astype(int)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB").resize((int(wide), int(height)), Image.Resampling.BICUBIC)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode; afterwards every module is in its former one."""
    former = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in former.items():
            module.training = training
