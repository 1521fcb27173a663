"""Two large crops of a case with a given overlap, and small ones around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.augment import Intensity
from nnssl_ext.data.corrupted import Corruption
from nnssl_ext.data.iou_pairs import random_pair, room
from nnssl_ext.data.sampling import random_box
from nnssl_ext.data.spatial import MIRROR, Spatial
from nnssl_ext.data.views import View, cut, extent
from nnssl_ext.preprocessing.store import CaseStore


@dataclass(frozen=True)
class OverlappingCrops:
    """Two large crops whose IoU lies in an interval, and small ones around them, as views "global_0", "global_1", "local_0", ...

    The interval holds for the boxes that the crops show, before they are turned. A small crop lies anywhere in the smallest box
    that holds both large ones, as far as it belongs to the case. All crops are mirrored alike.

    Args:
        global_size, local_size: voxels of the crops, (z, y, x).
        locals: number of small crops.
        iou: lowest and highest IoU of the two large crops, in [0, 1], both included.
        global_zoom, local_zoom: range of the edge of a crop's voxel over that of a case's, uniform, one draw for all axes; above
            1 shows more. A large crop shows no more than the case, unless the lowest zoom does.
        spatial: how each crop is turned, and how all of them are mirrored (its zoom is not used).
        intensity: augmentation of each crop's values.
        body: smallest share of each crop that is body, where there is such a place; [0, 1].
    """

    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    locals: int = 0
    iou: tuple[float, float] = (0.3, 0.6)
    global_zoom: tuple[float, float] = (1.0, 1.0)
    local_zoom: tuple[float, float] = (1.0, 1.0)
    spatial: Spatial = MIRROR
    intensity: Intensity = Intensity()
    body: float = 0.25

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        shape, body = store.shape(case), store.body(case) if self.body else None
        sizes = {f"global_{i}": self.global_size for i in range(2)} | {f"local_{i}": self.local_size for i in range(self.locals)}
        ranges = [self._large_zoom(shape)] * 2 + [self.local_zoom] * self.locals
        zooms = [np.where(np.array(size) > 1, rng.uniform(*range_), 1.0) for size, range_ in zip(sizes.values(), ranges)]  # slices stay slices
        first, second, *small = (extent(size, zoom) for size, zoom in zip(sizes.values(), zooms))
        pair = random_pair(room(shape, first, second, self.iou), first, second, self.iou, rng, body=body, minimum=self.body)
        around = tuple((max(0, min(a[0], b[0])), min(n, max(a[1], b[1]))) for a, b, n in zip(*pair, shape))
        boxes = [*pair, *(random_box(around, own, rng, body, self.body) for own in small)]
        crops = {name: (box, size, zoom) for (name, size), box, zoom in zip(sizes.items(), boxes, zooms)}
        return cut(store, case, crops, self.spatial, self.intensity, rng)

    def _large_zoom(self, shape: Sequence[int]) -> tuple[float, float]:
        low, high = self.global_zoom
        fits = min(((n - 1) / (s - 1) for n, s in zip(shape, self.global_size) if s > 1), default=high)
        return low, min(max(low, fits), high)


@dataclass(frozen=True)
class CorruptedOverlap:
    """The views of `crops`, of which the large ones are corrupted, and "target": the first large crop as it is in the case.

    Args:
        crops: where they come from.
        corrupt: a function of (image, rng) that loader processes can be sent; see `corrupt`.
    """

    crops: OverlappingCrops
    corrupt: Corruption

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        views = self.crops.sample(store, case, rng)
        target = replace(views["global_0"], intensity=())
        corrupted = {name: replace(views[name], image=self.corrupt(views[name].image, rng)) for name in ("global_0", "global_1")}
        return {**views, **corrupted, "target": target}
