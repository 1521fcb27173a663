"""Views: what a method reads of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nnssl_ext.core.geometry import Box, box_slices
from nnssl_ext.data.augment import Intensity, Step
from nnssl_ext.data.interpolate import interpolate
from nnssl_ext.data.sampling import iou, random_box, whole
from nnssl_ext.data.spatial import MILD, MIRROR, Spatial, bounds, is_slicing, make_affine
from nnssl_ext.preprocessing.store import CaseStore

_TRIES = 64  # pairs drawn for a wanted overlap


@dataclass(frozen=True)
class View:
    """One view of a case.

    Args:
        image: (C, z, y, x) float32.
        affine: (3, 4) float64; voxel of the stored case = affine @ (z, y, x, 1) of the view, see `spatial`.
        mask: bool grid (d, h, w), True = hidden; None when nothing is hidden.
        intensity: augmentation that is drawn but not yet applied, see `augment`.
        case: index in the store of the case it was read from; None = the one that was asked for.
    """

    image: np.ndarray
    affine: np.ndarray
    mask: np.ndarray | None = None
    intensity: tuple[Step, ...] = ()
    case: int | None = None


class ViewSpec(Protocol):
    """What a method asks the loader for; a pure function of (store, case, rng).

    A specification may also have ``of_batch(count, rng)``, see `of_batch`.
    """

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]: ...


def of_batch(spec: ViewSpec, count: int, rng: np.random.Generator) -> Sequence[ViewSpec]:
    """The specification of every sample of a batch, where the samples of a batch depend on each other; the same for all where they don't."""
    drawn: Sequence[ViewSpec] = spec.of_batch(count, rng) if hasattr(spec, "of_batch") else [spec] * count
    return drawn


def read_box(store: CaseStore, case: int, box: Box) -> np.ndarray:
    """Voxels of `box`, (C, z, y, x) float32; outside the case the stored fill value of each channel (its background)."""
    inside = tuple((min(max(0, low), n), max(0, min(n, high))) for (low, high), n in zip(box, store.shape(case)))
    inside = tuple((low, max(low, high)) for low, high in inside)
    crop = store.read(case, inside)
    if inside == box:
        return crop
    padded = np.empty((len(crop), *(high - low for low, high in box)), np.float32)
    padded[:] = np.asarray(store.fill(case), np.float32)[:, None, None, None]
    padded[box_slices(tuple((i - low, j - low) for (low, _), (i, j) in zip(box, inside)))] = crop
    return padded


def read_crops(store: CaseStore, case: int, affines: Sequence[np.ndarray], sizes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Crops of one case, each (C, *size) float32, from one read of the box that holds them all.

    A crop that is only shifted and mirrored is sliced, bit for bit; any other is interpolated once (trilinear).
    """
    boxes = [bounds(affine, size) for affine, size in zip(affines, sizes)]
    box = tuple((min(low for low, _ in edges), max(high for _, high in edges)) for edges in zip(*boxes))
    source = read_box(store, case, box)
    origin = np.array([low for low, _ in box])
    crops = []
    for affine, size, own in zip(affines, sizes, boxes):
        if is_slicing(affine):
            mirrored = tuple(axis + 1 for axis in range(3) if affine[axis, axis] < 0)
            inside = box_slices(tuple((low - start, high - start) for (low, high), start in zip(own, origin.tolist())))
            crops.append(np.ascontiguousarray(np.flip(source[inside], mirrored)))
        else:
            crops.append(interpolate(source, np.column_stack((affine[:, :3], affine[:, 3] - origin)), size))
    return crops


def extent(size: Sequence[int], zoom: np.ndarray) -> tuple[int, ...]:
    """Voxels of the case between whose centres those of a zoomed crop fit."""
    return tuple(int(np.ceil((s - 1) * z)) + 1 for s, z in zip(size, zoom))


def place(store: CaseStore, case: int, box: Box, size: Sequence[int], zoom: np.ndarray, rotation: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """The affine of a crop in the middle of a box; a slice is not zoomed across itself."""
    spacing = (1.0, 1.0, 1.0) if np.array_equal(rotation, np.eye(3)) else store.geometry(case).spacing  # it cancels without rotation
    return make_affine([(low + high - 1) / 2 for low, high in box], size, spacing, rotation, np.where(np.equal(size, 1), 1.0, zoom), mirrored)


def cut(
    store: CaseStore,
    case: int,
    crops: Mapping[str, tuple[Box, Sequence[int], np.ndarray]],
    spatial: Spatial,
    intensity: Intensity,
    rng: np.random.Generator,
) -> dict[str, View]:
    """Several crops of one case as views, all mirrored alike: a network that has to say the same of mirrored anatomy may not see what is left and what is up.

    Args:
        crops: by name the box that each shows (before it is turned), its voxels (z, y, x), and its zoom (3,).
        spatial: how each crop is turned, and how all of them are mirrored (its zoom is not used).
        intensity: augmentation of each crop's values.
    """
    spatial = spatial.within(next(iter(crops.values()))[1])
    mirrored = spatial.draw_mirror(rng)
    affines = [place(store, case, box, size, zoom, spatial.draw_rotation(rng), mirrored) for box, size, zoom in crops.values()]
    images = read_crops(store, case, affines, [size for _, size, _ in crops.values()])
    return {name: View(image, affine, intensity=intensity.draw(len(image), rng)) for name, image, affine in zip(crops, images, affines)}


@dataclass(frozen=True)
class Crop:
    """One random crop, as view "image".

    Args:
        patch_size: voxels, (z, y, x).
        spatial: how it is turned, zoomed and mirrored.
        intensity: augmentation of its values.
        body: smallest share of the crop (before it is turned) that is body, where the case has such a place; [0, 1].
    """

    patch_size: tuple[int, ...]
    spatial: Spatial = MIRROR
    intensity: Intensity = Intensity()
    body: float = 0.25

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        spatial = self.spatial.within(self.patch_size)
        zoom = spatial.draw_zoom(rng)
        body = store.body(case) if self.body else None
        box = random_box(whole(store.shape(case)), extent(self.patch_size, zoom), rng, body, self.body)
        affine = place(store, case, box, self.patch_size, zoom, *spatial.draw_turn(rng))
        image = read_crops(store, case, [affine], [self.patch_size])[0]
        return {"image": View(image, affine, intensity=self.intensity.draw(len(image), rng))}


@dataclass(frozen=True)
class MultiCrop:
    """Large and small crops of one neighbourhood, as views "global_0", "global_1", "local_0", ...

    A sampling box is placed at random in the case; each crop shows a random share of its volume and is resized to its own
    number of voxels in the same interpolation that turns it. All axes are zoomed alike. In a case smaller than the sampling
    box the shares are smaller, and a crop of the smallest share that still doesn't fit is padded. All crops are mirrored alike:
    a network that has to say the same of mirrored anatomy may not see what is left and what is up.

    Args:
        global_size, local_size: voxels of the crops, (z, y, x).
        locals: number of small crops.
        global_share, local_share: range of a crop's share of the sampling box, by volume; uniform.
        box: edge of the sampling box over that of a global crop; clipped to the case.
        spatial: how each crop is turned, and how all of them are mirrored (its zoom is not used).
        intensity: augmentation of each crop's values.
        body: smallest share of body in the sampling box and in each crop, where there is such a place; [0, 1].
        overlap: interval of the IoU of the two large crops (before they are turned); None: as it comes. In 64 tries; after
            that the pair that came nearest.

    Source: Caron et al. 2020, arXiv:2006.09882 (multi-crop).
    """

    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    locals: int = 8
    global_share: tuple[float, float] = (0.25, 1.0)
    local_share: tuple[float, float] = (0.03, 0.25)
    box: float = 1.5
    spatial: Spatial = MILD
    intensity: Intensity = Intensity()
    body: float = 0.25
    overlap: tuple[float, float] | None = None

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        body = store.body(case) if self.body else None
        shape = store.shape(case)
        edges = [1 if s == 1 else min(n, round(self.box * s)) for n, s in zip(shape, self.global_size)]  # of slices all crops are of one
        around = random_box(whole(shape), edges, rng, body, self.body)

        def draw(size: Sequence[int], share: tuple[float, float]) -> tuple[Box, Sequence[int], np.ndarray]:
            zoom = np.full(3, self._zoom(size, share, edges, rng))
            return random_box(around, extent(size, zoom), rng, body, self.body), size, zoom

        globals_ = {f"global_{i}": crop for i, crop in enumerate(self._pair(lambda: draw(self.global_size, self.global_share)))}
        return cut(
            store, case, globals_ | {f"local_{i}": draw(self.local_size, self.local_share) for i in range(self.locals)}, self.spatial, self.intensity, rng
        )

    def _pair(self, draw: Callable[[], tuple[Box, Sequence[int], np.ndarray]]) -> list[tuple[Box, Sequence[int], np.ndarray]]:
        """Box, size and zoom of the two large crops: the first draw within the wanted overlap, or the one nearest to it."""
        low, high = self.overlap or (0.0, 1.0)
        best, least = [], np.inf
        for _ in range(_TRIES):
            pair = [draw(), draw()]
            shared = iou(pair[0][0], pair[1][0])
            off = max(low - shared, shared - high)
            if off < least:
                best, least = pair, off
            if off <= 0:
                break
        return best

    def _zoom(self, size: Sequence[int], share: tuple[float, float], edges: Sequence[int], rng: np.random.Generator) -> float:
        """One factor for all axes; as large as fits into the clipped box at most, but never below that of the smallest share."""
        axes = sum(s > 1 for s in size)  # two of slices
        full = self.box**axes * np.prod(self.global_size) / np.prod(size)
        fits = min((e - 1) / (s - 1) if s > 1 else np.inf for e, s in zip(edges, size)) ** axes / full
        return float((rng.uniform(share[0], np.clip(fits, *share)) * full) ** (1 / axes))
