"""Dense features of whole volumes: overlapping windows through a frozen backbone, averaged with Gaussian weights.

Shape suffixes: C channels of the features; (z, y, x) voxels, (d, h, w) cells. A cell is one position of a feature map.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry, box_slices
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.preprocessing.normalize import percentiles
from nnssl_ext.preprocessing.resample import resample
from nnssl_ext.trainers.checkpoint import load_checkpoint

SIGMA = 1 / 8  # standard deviation of the weights over the window's edge, as in nnU-Net


@dataclass(frozen=True)
class FeatureMap:
    """Features of a volume on the grid of its cells.

    Args:
        values: (C, d, h, w) float32.
        geometry: of the cells: its spacing is a cell's edges, its origin the centre of the first cell. Cells begin with the volume's first voxel; the
            last one of an axis may reach beyond the volume.
        cell: voxels of the volume (after any zoom) per cell, (z, y, x).
    """

    values: np.ndarray
    geometry: Geometry
    cell: tuple[int, ...]


@dataclass(frozen=True)
class Extractor:
    """Gives the features of preprocessed volumes.

    Args:
        backbone: one with a "pyramid"; it is put into evaluation mode. The map is its `dense` one.
        window: voxels that the backbone sees at once, (z, y, x); None: those of its plan.
        overlap: smallest share of a window's edge that the next window sees again, in [0, 1).
        zoom: factor by which volumes are enlarged first (as preprocessing resamples them), so that cells are finer in mm.
        device: where the backbone runs.

    Raises:
        UserError: the window is no multiple of the backbone's strides, or overlap or zoom are out of range.
    """

    backbone: Backbone
    window: tuple[int, ...] | None = None
    overlap: float = 0.5
    zoom: float = 1.0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.backbone.eval().to(self.device)
        if not 0 <= self.overlap < 1:
            raise UserError(f"windows can't overlap by {self.overlap:g} of their edge", "option -overlap", "choose a share of at least 0 and below 1")
        if not 0.1 <= self.zoom <= 10:
            raise UserError(f"volumes can't be zoomed by {self.zoom:g}", "option -zoom", "choose a factor between 0.1 and 10")
        steps = self.backbone.strides[-1]
        if any(size < step or size % step for size, step in zip(self.size, steps)):
            what = f"a window of {_times(self.size)} voxels is no multiple of the network's {_times(steps)}"
            raise UserError(what, "option -size", "round each axis to a multiple")
        if self.size == steps and self.backbone.instance_norm:
            what = "the deepest feature map of a window would be one voxel, which instance normalisation cannot take"
            raise UserError(what, "option -size", "choose a larger window")

    @staticmethod
    def load(
        checkpoint: Pretrained | Path | str,
        window: tuple[int, ...] | None = None,
        overlap: float = 0.5,
        zoom: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Extractor:
        """An extractor with the backbone that a checkpoint hands over.

        Raises:
            UserError: unreadable checkpoint, or what the constructor raises.
        """
        pretrained = checkpoint if isinstance(checkpoint, Pretrained) else Pretrained.load(checkpoint)
        with torch.random.fork_rng(devices=[]):
            backbone = pretrained.backbone(pretrained.channels, pretrained.patch_size)
        weights = load_checkpoint(pretrained.path)["network_weights"]  # all of them; `Pretrained` keeps what fine-tuning takes
        outcome = backbone.net.load_state_dict(weights, strict=False)
        lost = [*outcome.unexpected_keys, *outcome.missing_keys]
        if lost:
            raise UserError(f"tensors of checkpoint and network don't fit each other: {', '.join(lost[:3])}", pretrained.path, "give another checkpoint")
        return Extractor(backbone, window, overlap, zoom, device)

    @staticmethod
    def untrained(
        pretrained: Pretrained,
        window: tuple[int, ...] | None = None,
        overlap: float = 0.5,
        zoom: float = 1.0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Extractor:
        """An extractor with the checkpoint's network before any training, for comparison; `seed` draws its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, 0, "init"))
            return Extractor(pretrained.backbone(pretrained.channels, pretrained.patch_size), window, overlap, zoom, device)

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels of the window, (z, y, x)."""
        return tuple(self.window or self.backbone.patch_size)

    @property
    def cell(self) -> tuple[int, ...]:
        """Voxels per cell, (z, y, x)."""
        return self.backbone.dense_stride

    @torch.no_grad()
    def features(self, volume: np.ndarray, geometry: Geometry, fill: Sequence[float] | None = None) -> FeatureMap:
        """The features of a volume.

        Args:
            volume: (channels, z, y, x) float32, preprocessed as for the pretraining.
            geometry: of the volume.
            fill: value of each channel beyond the volume's faces, "fill" of `Preprocessor`; None: the channel's 0.5 % percentile, as there.

        Returns:
            the features; those of a volume that is one window large are the backbone's own, bit for bit.
        """
        fill = [percentiles(channel, (0.5,))[0] for channel in volume] if fill is None else fill
        if self.zoom != 1:
            larger = geometry.resampled([max(1, round(n * self.zoom)) for n in geometry.shape])
            volume, geometry = resample(volume, larger.shape, geometry.spacing, larger.spacing), larger
        cells = [-(-n // edge) for n, edge in zip(geometry.shape, self.cell)]
        padded, before = self._padded(volume, cells, fill)
        inside = box_slices(tuple((first, first + n) for first, n in zip(before, cells)))
        return FeatureMap(self._slide(padded)[inside].numpy(), cell_geometry(geometry, self.cell), self.cell)

    def _padded(self, volume: np.ndarray, cells: Sequence[int], fill: Sequence[float]) -> tuple[Tensor, list[int]]:
        """The volume, by whole cells at its beginning, enlarged to whole cells and at least a window; and the cells before it."""
        shape = [max(n * edge, size) for n, edge, size in zip(cells, self.cell, self.size)]
        before = [(full - n * edge) // edge // 2 for full, n, edge in zip(shape, cells, self.cell)]
        padded = torch.tensor(list(fill), dtype=torch.float32)[:, None, None, None].repeat(1, *shape)
        padded[box_slices(tuple((first * edge, first * edge + n) for first, edge, n in zip(before, self.cell, volume.shape[1:])))] = torch.from_numpy(volume)
        return padded, before

    def _slide(self, volume: Tensor) -> Tensor:
        """Features (C, d, h, w) of a volume (channels, z, y, x) of whole cells."""
        window = [size // edge for size, edge in zip(self.size, self.cell)]
        cells = [n // edge for n, edge in zip(volume.shape[1:], self.cell)]
        starts = list(itertools.product(*(window_starts(n, w, self.overlap) for n, w in zip(cells, window))))
        if len(starts) == 1:
            return self._encode(volume)
        weights, total, summed = window_weights(window), torch.zeros(self.backbone.dense_width, *cells), torch.zeros(*cells)
        for start in starts:
            here = box_slices(tuple((first, first + w) for first, w in zip(start, window)))
            voxels = box_slices(tuple((first * edge, first * edge + size) for first, edge, size in zip(start, self.cell, self.size)))
            total[here] += self._encode(volume[voxels]) * weights
            summed[here[1:]] += weights
        return total / summed

    def _encode(self, crop: Tensor) -> Tensor:
        return self.backbone.dense(crop[None].to(self.device))[0].float().cpu()


def window_starts(cells: int, window: int, overlap: float) -> list[int]:
    """First cells of the windows along an axis: evenly spread, each shares at least `overlap` of its edge with the next one."""
    step = max(1, int(window * (1 - overlap)))
    count = -(-(cells - window) // step) + 1
    return [round(number * (cells - window) / max(1, count - 1)) for number in range(count)]


def window_weights(window: Sequence[int]) -> Tensor:
    """Gaussian weights of a window's cells, (d, h, w), about its middle; the largest is at most 1, none is 0."""
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (SIGMA * n)) ** 2) for n in window]
    return axes[0][:, None, None] * axes[1][:, None] * axes[2]


def cell_geometry(geometry: Geometry, cell: Sequence[int]) -> Geometry:
    """The geometry of the cells of `cell` voxels that cover a volume, the first of which begins with its first voxel."""
    shape = tuple(-(-n // edge) for n, edge in zip(geometry.shape, cell))
    spacing = tuple(mm * edge for mm, edge in zip(geometry.spacing, cell))
    return Geometry(shape, spacing, tuple(float(v) for v in geometry.to_world([(edge - 1) / 2 for edge in cell])), geometry.direction)


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions in which features vary most.

    Args:
        mean: (C,) float64.
        directions: (C, N) float64, orthonormal, most variance first; the largest weight of each is positive.
        explained: share of the variance along each, (N,).
    """

    mean: np.ndarray
    directions: np.ndarray
    explained: np.ndarray

    @staticmethod
    def fit(samples: np.ndarray, count: int) -> PrincipalComponents:
        """From samples (n, C).

        Raises:
            UserError: there are fewer samples or channels than components.
        """
        if count > min(samples.shape):
            what = f"{samples.shape[0]} cells with {samples.shape[1]} features have no {count} principal components"
            raise UserError(what, "option -pca", f"choose at most {min(samples.shape)}")
        mean = samples.mean(0, dtype=np.float64)
        centred = samples - mean
        variances, directions = np.linalg.eigh(centred.T @ centred)  # ascending
        directions = directions[:, : -count - 1 : -1]
        directions *= np.sign(directions[abs(directions).argmax(0), np.arange(count)])
        return PrincipalComponents(mean, directions, variances[: -count - 1 : -1] / max(variances.sum(), 1e-300))

    def project(self, values: np.ndarray) -> np.ndarray:
        """Components (N, d, h, w) float32 of features (C, d, h, w)."""
        centred = values.reshape(len(values), -1) - self.mean.astype(np.float32)[:, None]
        projected: np.ndarray = self.directions.T.astype(np.float32) @ centred
        return projected.reshape(-1, *values.shape[1:])


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
