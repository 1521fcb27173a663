"""Two crops of a case whose IoU lies in an interval: drawn uniformly over all such pairs, never by rejection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, reduce

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Box
from nnssl_ext.data.augment import Intensity
from nnssl_ext.data.sampling import body_share, whole
from nnssl_ext.data.spatial import MIRROR, Spatial
from nnssl_ext.data.turned import Turning, turn
from nnssl_ext.data.views import View, place, read_crops
from nnssl_ext.preprocessing.store import CaseStore

_TRIES = 64  # pairs drawn for enough body
_MOST = 2**63 - 1  # pairs that can be counted; of crops of 96^3, those in a case of 1540^3 voxels


class _Axis:
    """All pairs of positions of two intervals along one axis, numbered so that those that overlap less come first.

    An interval that is longer than the axis has one position, about its middle. Intervals of one voxel each have the same
    position: crops of slices are of one slice.

    Args:
        length: voxels of the axis.
        first, second: voxels of the two intervals.

    Attributes:
        below: (longest overlap + 2,), number of pairs that overlap by less than 0, 1, 2, ... voxels.
    """

    def __init__(self, length: int, first: int, second: int) -> None:
        (low_a, high_a), (low_b, high_b) = _starts(length, first), _starts(length, second)
        shifts = np.zeros(1, int) if first == second == 1 else np.arange(low_b - high_a, high_b - low_a + 1)
        overlap = np.maximum(0, np.minimum(first, shifts + second) - np.maximum(0, shifts))
        order = np.argsort(overlap, kind="stable")
        self.shifts = shifts[order]
        self.lowest = np.maximum(low_a, low_b - self.shifts)  # position of the first interval
        self.before = _counted(np.minimum(high_a, high_b - self.shifts) - self.lowest + 1)
        self.below = self.before[np.searchsorted(overlap[order], np.arange(min(first, second) + 2))]

    def pair(self, number: int) -> tuple[int, int]:
        """Where the two intervals of pair `number` start."""
        row = int(np.searchsorted(self.before, number, "right")) - 1
        start = int(self.lowest[row]) + number - int(self.before[row])
        return start, start + int(self.shifts[row])


def _starts(length: int, size: int) -> tuple[int, int]:
    """Lowest and highest position of an interval."""
    return (0, length - size) if length >= size else ((length - size) // 2,) * 2


def _counted(numbers: np.ndarray) -> np.ndarray:
    """Sums of the numbers before each one, and of all."""
    return np.concatenate(([0], np.cumsum(numbers)))


class Pairs:
    """All pairs of two boxes that share at least `least` and at most `most` voxels, numbered from 0 to `count` - 1.

    The overlaps along the axes determine the shared voxels, and the positions along one axis do not depend on those along the
    others. So each combination of overlaps along all axes but the last is a cell, to which an interval of the overlaps along
    the last axis is left, and the pairs are counted by products of integers.

    Args:
        lengths: voxels of the volume, any number of axes.
        first, second: voxels of the boxes.
        least, most: voxels; `most` is 0 or more.
    """

    def __init__(self, lengths: Sequence[int], first: Sequence[int], second: Sequence[int], least: int, most: int) -> None:
        self.axes = [_Axis(*sizes) for sizes in zip(lengths, first, second, strict=True)]
        *outer, last = [axis.below for axis in self.axes]
        self.grid = tuple(len(below) - 1 for below in outer)
        shared = _products([np.arange(n) for n in self.grid])
        ways = _products([np.diff(below) for below in outer])
        longest, divisor = len(last) - 2, np.maximum(shared, 1)
        low = np.where(shared, -(-least // divisor), 0 if least <= 0 else longest + 1).clip(0, longest + 1)
        high = np.where(shared, most // divisor, longest).clip(0, longest)
        span = np.maximum(0, last[high + 1] - last[low])
        self.cells = np.flatnonzero(ways * span)
        self.span, self.skipped = span[self.cells], last[low[self.cells]]
        self.before = _counted(ways[self.cells] * self.span)
        self.count = int(self.before[-1])

    def pair(self, number: int) -> tuple[list[int], list[int]]:
        """Where the two boxes of pair `number` start."""
        row = int(np.searchsorted(self.before, number, "right")) - 1
        number, along_last = divmod(number - int(self.before[row]), int(self.span[row]))
        numbers, rest = [], int(self.cells[row])
        for axis, edge in zip(self.axes[-2::-1], self.grid[::-1]):  # a cell's number holds the overlap along the last one as its lowest digit
            rest, overlap = divmod(rest, edge)
            number, within = divmod(number, int(axis.below[overlap + 1] - axis.below[overlap]))
            numbers.append(int(axis.below[overlap]) + within)
        numbers = [*numbers[::-1], int(self.skipped[row]) + along_last]
        first, second = zip(*(axis.pair(n) for axis, n in zip(self.axes, numbers)))
        return list(first), list(second)


def _products(axes: Sequence[np.ndarray]) -> np.ndarray:
    """Of one number of each axis, in row-major order."""
    return reduce(np.multiply.outer, axes, np.ones((), np.int64)).ravel()


@lru_cache(maxsize=64)
def pairs_within(lengths: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...], iou: tuple[float, float], parts: int = 1) -> tuple[Pairs, ...]:
    """The pairs whose IoU lies in an interval, in groups: one for each of its equal parts in which there are any.

    All is counted in integers and fractions: 0.6 is 6/10, and a pair with an IoU of exactly 6/10 lies in [0.3, 0.6].

    Args:
        lengths, first, second: voxels of the volume and of the two boxes.
        iou: lowest and highest, in [0, 1], both included.
        parts: of the interval.

    Raises:
        UserError: there are more than 2^63 pairs of boxes.
    """
    if math.prod(max(0, n - size) + 1 for sizes in (first, second) for n, size in zip(lengths, sizes)) > _MOST:
        raise UserError("there are more than 2^63 pairs of crops", f"a case of {_text(lengths)} voxels", "crop it, or plan a coarser spacing")
    total = math.prod(first) + math.prod(second)
    low, high = (Fraction(str(edge)) for edge in iou)
    edges = [low + (high - low) * k / parts for k in range(parts)]
    least = [math.ceil(edge * total / (1 + edge)) for edge in edges]  # shared / (total - shared) >= edge
    most = [*(n - 1 for n in least[1:]), math.floor(high * total / (1 + high))]
    groups = [Pairs(lengths, first, second, a, b) for a, b in zip(least, most) if a <= b]
    return tuple(group for group in groups if group.count)


def random_pair(
    within: Box,
    first: Sequence[int],
    second: Sequence[int],
    iou: tuple[float, float],
    rng: np.random.Generator,
    *,
    body: np.ndarray | None = None,
    minimum: float = 0.0,
    parts: int = 1,
) -> tuple[Box, Box]:
    """Two boxes inside `within`, in any number of dimensions, whose IoU lies in an interval; along an axis where both have one voxel it is the same.

    Uniform over all such pairs, of which more have a low IoU (a mean of 0.4 in [0.3, 0.6]); or first over equal parts of the
    interval and then over the pairs of one of them: with ten parts nearly uniform over the IoU. A box that is longer than
    `within` along an axis is centred there.

    Args:
        first, second: voxels of the boxes.
        iou: lowest and highest, in [0, 1], both included.
        body: cells of the case that hold body, see `CaseStore.body`.
        minimum: share of each box's voxels that must lie in them, [0, 1]: of 64 pairs the first that has it in both boxes, or
            the one whose emptier box has most.
        parts: of the interval that are drawn equally often.

    Raises:
        UserError: there is no such pair, or there are too many to count.
    """
    lengths, sizes = tuple(high - low for low, high in within), (tuple(first), tuple(second))
    groups = pairs_within(lengths, *sizes, tuple(iou), parts)  # type: ignore[arg-type]
    if not groups:
        what = f"no crops of {_text(first)} and {_text(second)} voxels have an IoU from {iou[0]:g} to {iou[1]:g}"
        raise UserError(what, f"a volume of {_text(lengths)} voxels", "allow a wider interval of the IoU, or plan another patch size")
    best, most = None, -1.0
    for _ in range(_TRIES):
        group = groups[int(rng.integers(len(groups)))]
        starts = group.pair(int(rng.integers(group.count)))
        boxes = [tuple((low + s, low + s + n) for (low, _), s, n in zip(within, own, size)) for own, size in zip(starts, sizes)]
        held = 1.0 if body is None else min(body_share(body, box) for box in boxes)
        if held > most:
            best, most = (boxes[0], boxes[1]), held
        if held >= minimum:
            break
    assert best is not None
    return best


def room(shape: tuple[int, ...], first: Sequence[int], second: Sequence[int], iou: tuple[float, float], parts: int = 1) -> Box:
    """Where to look for pairs of crops: the case or, where it is too small for any, a box about its middle that is long enough for the lowest IoU."""
    if pairs_within(shape, tuple(first), tuple(second), iou, parts):
        return whole(shape)
    axes = sum(max(a, b) > 1 for a, b in zip(first, second))  # two of slices
    kept = (2 * iou[0] / (1 + iou[0])) ** (1 / axes)  # share of an edge in pairs of the lowest IoU that are shifted alike along all axes
    longer = [max(0, math.ceil((2 - kept) * max(a, b)) - n) if max(a, b) > 1 else 0 for n, a, b in zip(shape, first, second)]
    return tuple((-(more // 2), n + more - more // 2) for n, more in zip(shape, longer))


def _text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


@dataclass(frozen=True)
class IoUPair:
    """Two random crops of one case with a given overlap, as views "first" and "second".

    The interval holds for the crops before they are turned and mirrored. In a case that is too small for any such pair, both
    reach beyond it: it counts as long enough for the lowest IoU along all axes, and what lies outside is padded.

    Args:
        patch_size: voxels of both, (z, y, x).
        iou: lowest and highest IoU, in [0, 1], both included.
        spatial: how each crop is rotated, and how both are mirrored (its zoom is not used).
        intensity: augmentation of each crop's values.
        body: smallest share of each crop that is body, where there is such a pair (`random_pair`); [0, 1].
        apart: each crop is mirrored by itself. Else both alike: a network that has to say the same of mirrored anatomy may not
            see what is left and what is up.
        turning: how each crop is turned by quarters, in addition; its size is that of the crops.
        parts: of the interval that are drawn equally often; 1 = every pair is.
    """

    patch_size: tuple[int, ...]
    iou: tuple[float, float] = (0.3, 0.6)
    spatial: Spatial = MIRROR
    intensity: Intensity = Intensity()
    body: float = 0.25
    apart: bool = False
    turning: Turning | None = None
    parts: int = 1

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        size = self.turning.size if self.turning else self.patch_size
        body = store.body(case) if self.body else None
        boxes = random_pair(
            room(store.shape(case), size, size, self.iou, self.parts), size, size, self.iou, rng, body=body, minimum=self.body, parts=self.parts
        )
        spatial = self.spatial.within(size)
        mirrored = [spatial.draw_mirror(rng)] * 2
        if self.apart:
            mirrored[1] = spatial.draw_mirror(rng)
        affines = [place(store, case, box, size, np.ones(3), spatial.draw_rotation(rng), axes) for box, axes in zip(boxes, mirrored)]
        views = {}
        for name, image, affine in zip(("first", "second"), read_crops(store, case, affines, [size] * 2), affines):
            if self.turning:
                image, affine = turn(image, affine, int(rng.choice(self.turning.turns)), self.turning.plane)
            views[name] = View(image, affine, intensity=self.intensity.draw(len(image), rng))
        return views
