"""Corruptions of a crop that a network has to undo: pure functions of (image, rng) to a new image.

An image is (C, z, y, x) float32. Which voxels are replaced or moved is the same for all channels: what is hidden in one can't be
read off another. Edges of boxes are at least one voxel and at most two thirds of the crop's, so that every size of crop works.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnssl_ext.data.compiled import compiled

Edge = int | Sequence[int] | np.ndarray  # voxels: one number, or one for each axis

_PERCENTILES = (0.5, 99.5)  # of a channel: single bright voxels don't set its range
_ENOUGH = 2**15  # voxels for an estimate of percentiles
_CELLS = 2**12  # of the table of a curve
_MORE = 0.95  # probability of another box in `paint_in` and `paint_out`


def value_range(image: np.ndarray) -> np.ndarray:
    """Low and high end (2, C) of the values of each channel: its 0.5 % and 99.5 % percentiles, in large crops over evenly spaced voxels."""
    values = image.reshape(len(image), -1)
    return np.percentile(values[:, :: values.shape[1] // _ENOUGH | 1], _PERCENTILES, axis=1).astype(np.float32)


def drop_holes(image: np.ndarray, rng: np.random.Generator, holes: int = 6, edges: tuple[Edge, Edge] = (5, 32)) -> np.ndarray:
    """Random boxes become noise.

    Args:
        holes: number of boxes; they may overlap.
        edges: smallest and largest edge, uniform for each axis by itself.
    """
    result, limits = image.copy(), value_range(image)
    for box in map(_slices, *_boxes(image.shape[1:], holes, edges, rng)):
        result[box] = _noise(result[box].shape, limits, rng)
    return result


def keep_holes(image: np.ndarray, rng: np.random.Generator, holes: int = 6, edges: tuple[Edge, Edge] = (20, 64)) -> np.ndarray:
    """Everything but random boxes becomes noise; arguments as in `drop_holes`."""
    result = _noise(image.shape, value_range(image), rng)
    for box in map(_slices, *_boxes(image.shape[1:], holes, edges, rng)):
        result[box] = image[box]
    return result


def paint_in(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to five boxes of 1/6 to 1/3 of each axis become noise: the inside of the crop has to be filled in.

    Source: Zhou et al. 2021, arXiv:2004.07882, section 2.1.
    """
    shape = np.array(image.shape[1:])
    return drop_holes(image, rng, _one_to_five(rng), (shape // 6, shape // 3))


def paint_out(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Everything but one to five boxes of 3/7 to 4/7 of each axis becomes noise: the outside has to be guessed.

    Source: as `paint_in`.
    """
    shape = np.array(image.shape[1:])
    return keep_holes(image, rng, _one_to_five(rng), (shape * 3 // 7, shape * 4 // 7))


def shuffle(image: np.ndarray, rng: np.random.Generator, windows: int = 10, edges: tuple[Edge, Edge] = (8, 8)) -> np.ndarray:
    """The voxels of random windows are permuted, one window after the other; a voxel moves with all of its channels.

    Args:
        windows: their number; they may overlap.
        edges: smallest and largest edge, uniform for each axis by itself.
    """
    result = image.copy()
    starts, sizes = _boxes(image.shape[1:], windows, edges, rng)
    _permute(result, starts, sizes, rng.random(sizes.prod(1).sum(), np.float32))
    return result


def bezier(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The values of each channel go through a random monotonic curve of its own, which falls half of the time.

    The curve maps the channel's range (`value_range`) onto itself. Values beyond either end keep their distance to it, on its
    other side where the curve falls: nothing is clipped.

    Source: Zhou et al. 2021, arXiv:2004.07882, section 2.1.
    """
    result = image.copy()
    for channel, low, high in zip(result, *value_range(image)):
        bend(channel, low, high, bezier_curve(rng.random((2, 2)), bool(rng.random() < 0.5)))
    return result


def bezier_curve(points: np.ndarray, falling: bool) -> np.ndarray:
    """Table of a cubic Bezier curve from (0, 0) to (1, 1): y at evenly spaced x from 0 to 1.

    Both coordinates rise with the parameter wherever the points lie in the unit square, so y is a function of x.

    Args:
        points: the two points in the middle, ((x, y), (x, y)), in [0, 1].
        falling: y runs from 1 to 0, by the parameter in reverse.
    """
    t = np.linspace(0, 1, _CELLS + 1)[:, None]
    x, y = (3 * t * (1 - t) ** 2 * points[0] + 3 * t**2 * (1 - t) * points[1] + t**3).T
    return np.interp(np.linspace(0, 1, _CELLS + 1), x, y[::-1] if falling else y).astype(np.float32)


def bend(x: np.ndarray, low: float, high: float, curve: np.ndarray) -> None:
    """Map the values of one channel between `low` and `high` by a curve (`bezier_curve`), in place."""
    _look_up(x, np.float32(low), np.float32(high), curve * np.float32(high - low) + np.float32(low), np.sign(curve[-1] - curve[0]))


@compiled
def _look_up(x: np.ndarray, low: float, high: float, table: np.ndarray, direction: float) -> None:
    flat, cells = x.reshape(-1), len(table) - 1
    scale = np.float32(cells) / max(high - low, np.float32(1e-12))
    for i in range(len(flat)):
        inside = min(max(flat[i], low), high)
        place = (inside - low) * scale
        cell = min(np.int32(place), np.int32(cells - 1))
        part = place - np.float32(cell)
        flat[i] = table[cell] + part * (table[cell + 1] - table[cell]) + direction * (flat[i] - inside)


@compiled
def _permute(image: np.ndarray, starts: np.ndarray, sizes: np.ndarray, uniform: np.ndarray) -> None:
    """Fisher's and Yates's shuffle of every window, with one uniform number for each of its voxels."""
    flat, (_, _, height, width) = image.reshape(len(image), -1), image.shape
    places, used = np.empty(sizes[:, 0].max() * sizes[:, 1].max() * sizes[:, 2].max(), np.int64), 0
    for window in range(len(starts)):
        count = 0
        for z in range(starts[window, 0], starts[window, 0] + sizes[window, 0]):
            for y in range(starts[window, 1], starts[window, 1] + sizes[window, 1]):
                for x in range(starts[window, 2], starts[window, 2] + sizes[window, 2]):
                    places[count] = (z * height + y) * width + x
                    count += 1
        for i in range(count):
            a, b = places[i], places[i + int(uniform[used + i] * (count - i))]
            for channel in range(len(flat)):
                flat[channel, a], flat[channel, b] = flat[channel, b], flat[channel, a]
        used += count


def _one_to_five(rng: np.random.Generator) -> int:
    """Boxes until no further one is drawn, at most five."""
    return int(min(rng.geometric(1 - _MORE), 5))


def _boxes(shape: Sequence[int], count: int, edges: tuple[Edge, Edge], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and edges of random boxes inside a crop, both (count, 3)."""
    low, high = (np.clip(edge, 1, np.maximum(1, np.array(shape) * 2 // 3)) for edge in edges)
    sizes = rng.integers(low, high, (count, 3), endpoint=True)
    return rng.integers(0, np.array(shape) - sizes, endpoint=True), sizes


def _slices(start: np.ndarray, size: np.ndarray) -> tuple[slice, ...]:
    return (slice(None), *(slice(low, low + edge) for low, edge in zip(start.tolist(), size.tolist())))


def _noise(shape: Sequence[int], limits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform within the range of each channel."""
    low, high = limits[:, :, None, None, None]
    noise = rng.random(shape, np.float32)
    noise *= high - low
    noise += low
    return noise
