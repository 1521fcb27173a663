"""The features that a registration is evaluated with: MIND-SSC, intensities, a backbone's, or those of files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.feature_files import extract, find_cases, read_npz
from nnssl_ext.evaluation.features import Extractor, FeatureMap
from nnssl_ext.evaluation.mind import mind_ssc
from nnssl_ext.evaluation.placement import place
from nnssl_ext.evaluation.registration import common_components
from nnssl_ext.evaluation.registration_pairs import Pair
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.preprocessing.crop import body_mask

KINDS = ("mind", "intensity", "random", "checkpoint", "precomputed")
LEARNED = ("random", "checkpoint")


@dataclass(frozen=True)
class Images:
    """The two images of a pair as read, (fixed, moving): arrays (z, y, x), where they lie, and masks on the same grids."""

    arrays: tuple[np.ndarray, np.ndarray]
    geometries: tuple[Geometry, Geometry]
    masks: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class Describer:
    """Gives the features of pairs.

    Args:
        pretrained: the checkpoint; needed for "random", the same network before any training, and "checkpoint".
        window, overlap, zoom, device: of `Extractor`.
    """

    pretrained: Pretrained | None = None
    window: tuple[int, ...] | None = None
    overlap: float = 0.5
    zoom: float = 1.0
    device: torch.device | str = "cpu"

    def __call__(self, kind: str, pair: Pair, images: Images, grid: Geometry) -> tuple[Tensor, Tensor]:
        """Features (C, z, y, x) of the fixed and of the moving image at the voxels of `grid`, float32.

        Raises:
            UserError: what reading, preprocessing and the network raise; missing files.
        """
        if kind in ("mind", "intensity"):
            values = [torch.from_numpy(array)[None] for array in (images.arrays if kind == "mind" else self._standardised(pair, images))]
            fixed, moving = (place(value, where, grid).to(self.device) for value, where in zip(values, images.geometries))
            return (mind_ssc(fixed[0]), mind_ssc(moving[0])) if kind == "mind" else (fixed, moving)
        maps, foreground = self._maps(kind, pair)
        if images.masks is not None:
            masks = [torch.from_numpy((mask > 0).astype(np.float32))[None] for mask in images.masks]
            placed = [place(mask, where, found.geometry, mode="nearest", padding="zeros") for mask, where, found in zip(masks, images.geometries, maps)]
            foreground = [mask[0].numpy() > 0 for mask in placed]
        first, second = (place(torch.from_numpy(found.values).to(self.device), found.geometry, grid) for found in common_components(maps, foreground))
        return first, second

    @staticmethod
    def _standardised(pair: Pair, images: Images) -> list[np.ndarray]:
        """Each image with mean 0 and standard deviation 1 over its mask, or its body."""
        modalities = pair.modalities or ("", "")
        inside = images.masks or tuple(body_mask(array, modality) for array, modality in zip(images.arrays, modalities))
        chosen = [array[mask > 0] if (mask > 0).any() else array for array, mask in zip(images.arrays, inside)]
        return [((array - values.mean()) / max(float(values.std()), 1e-12)).astype(np.float32) for array, values in zip(images.arrays, chosen)]

    def _maps(self, kind: str, pair: Pair) -> tuple[list[FeatureMap], list[np.ndarray]]:
        """Features of cells and which of them are body."""
        if kind == "precomputed":
            if pair.features is None:
                raise UserError(f"pair {pair.name} has no precomputed features", "features", 'name the files of nnssl_features under "features"')
            maps = [_read(path) for path in pair.features]
            if len(maps[0].values) != len(maps[1].values):
                raise UserError("the features of the two images differ in number", pair.features[1], "write both with one checkpoint")
            return maps, [np.ones(found.values.shape[1:], bool) for found in maps]
        assert self.pretrained is not None
        extractor = self._random if kind == "random" else self._trained
        modalities = [[modality] * self.pretrained.channels for modality in pair.modalities] if pair.modalities else [[], []]
        cases = [find_cases([image], self.pretrained, modality)[0] for image, modality in zip(pair.images, modalities)]
        found = [extract(case, self.pretrained, extractor) for case in cases]
        return [values for values, *_ in found], [body for _, body, *_ in found]

    @cached_property
    def _trained(self) -> Extractor:
        assert self.pretrained is not None
        return Extractor.load(self.pretrained, self.window, self.overlap, self.zoom, self.device)

    @cached_property
    def _random(self) -> Extractor:
        assert self.pretrained is not None
        return Extractor.untrained(self.pretrained, self.window, self.overlap, self.zoom, self.device)


def _read(path: Path) -> FeatureMap:
    try:
        return read_npz(path)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"the features can't be read: {error}", path, "write them again with nnssl_features") from None
