"""The intensity operations on the CPU: each changes one volume (z, y, x), float32 and contiguous, in place; compiled.

One thread, so the number of threads changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nnssl_ext.data.compiled import compiled

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's constants
_LN2 = np.float32(math.log(2))


def gaussian(sigma: float, size: int) -> np.ndarray:
    """Weights of a Gaussian 0, 1, ... voxels from its centre, cut at four standard deviations (and at `size`); over both sides they sum to 1."""
    weights = np.exp(-0.5 * (np.arange(min(math.ceil(4 * sigma), size - 1) + 1) / sigma) ** 2)
    return (weights / (2 * weights.sum() - 1)).astype(np.float32)  # type: ignore[no-any-return]


def coarse_grid(size: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """An axis at low resolution: its kept voxels; for each voxel the numbers of the kept ones around it, and how far it lies between them, [0, 1]."""
    kept = max(1, round(size * share))
    place = ((np.arange(size) + 0.5) * kept / size - 0.5).clip(0, kept - 1)
    before = place.astype(int)
    return ((np.arange(kept) + 0.5) * size / kept).astype(int), before, np.minimum(before + 1, kept - 1), (place - before).astype(np.float32)


def noise(x: np.ndarray, std: float, seed: int) -> None:
    """Add Gaussian noise: number i + 1 of SplitMix64 gives two normal numbers by Box's and Muller's formula, for voxel i of the first and of the second half.

    Source: Steele et al. 2014, doi:10.1145/2660193.2660195; Box & Muller 1958, doi:10.1214/aoms/1177706645.
    """
    _noise(x, np.float32(std), np.uint64(seed))


@compiled
def _noise(x: np.ndarray, std: float, seed: int) -> None:
    flat, half = x.reshape(-1), (x.size + 1) // 2
    first, second = flat[:half], flat[half:]
    for i in range(half):
        cosine, sine = _normal(std, seed + np.uint64(i + 1) * np.uint64(GOLDEN))
        first[i] += cosine
        if i < len(second):
            second[i] += sine


@compiled
def _normal(std: float, state: int) -> tuple[float, float]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX_2)
    state ^= state >> np.uint64(31)
    uniform = np.float32(np.int32(state >> np.uint64(40)) + np.int32(1)) * np.float32(2**-24)  # (0, 1]
    angle = np.float32(np.int32(state & np.uint64(0xFFFFFF)) - np.int32(2**23)) * np.float32(math.pi * 2**-24)  # a quarter turn to both sides
    radius = std * np.sqrt(np.float32(-2) * _LN2 * _log2(uniform))
    if state & np.uint64(0x1000000):
        radius = -radius
    q = angle * angle  # Taylor series
    cosine = np.float32(1 / 40320) + q * (np.float32(-1 / 3628800) + q * np.float32(1 / 479001600))
    cosine = np.float32(1) + q * (np.float32(-1 / 2) + q * (np.float32(1 / 24) + q * (np.float32(-1 / 720) + q * cosine)))
    sine = np.float32(-1 / 5040) + q * (np.float32(1 / 362880) + q * np.float32(-1 / 39916800))
    sine = angle * (np.float32(1) + q * (np.float32(-1 / 6) + q * (np.float32(1 / 120) + q * sine)))
    return radius * cosine, radius * sine


@compiled
def _log2(x: float) -> float:
    """Of a positive float32, by the series of the inverse hyperbolic tangent; of 0 it is -127."""
    bits = np.float32(x).view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    mantissa = np.int32(bits - (exponent << np.int32(23))).view(np.float32)  # between the roots of 1/2 and 2
    s = (mantissa - np.float32(1)) / (mantissa + np.float32(1))
    q = s * s
    series = np.float32(2) + q * (np.float32(2 / 3) + q * (np.float32(2 / 5) + q * np.float32(2 / 7)))
    return np.float32(exponent) + s * series / _LN2  # type: ignore[no-any-return]


@compiled
def _exp2(x: float) -> float:
    """Of a float32 between -126 and 127, by its Taylor series about the nearest whole number."""
    whole = np.floor(x + np.float32(0.5))
    t = (x - whole) * _LN2
    series = np.float32(1 / 6) + t * (np.float32(1 / 24) + t * (np.float32(1 / 120) + t * np.float32(1 / 720)))
    series = np.float32(1) + t * (np.float32(1) + t * (np.float32(1 / 2) + t * series))
    return np.int32(np.float32(series).view(np.int32) + (np.int32(whole) << np.int32(23))).view(np.float32)  # type: ignore[no-any-return]


def blur(x: np.ndarray, *sigmas: float) -> None:
    """Gaussian blur with a standard deviation (voxels) for each axis, mirrored at the edges."""
    weights = [gaussian(sigma, size) for size, sigma in zip(x.shape, sigmas)]
    edges = [len(side) - 1 for side in weights]
    source = np.pad(x, [(edge, edge) for edge in edges], mode="reflect")
    other = np.empty_like(source)
    for side, step in zip(weights, (source[0].size, source.shape[2], 1)):
        _weigh(source.reshape(-1), side, step, other.reshape(-1))
        source, other = other, source
    x[:] = source[tuple(slice(edge, edge + size) for edge, size in zip(edges, x.shape))]


@compiled
def _weigh(source: np.ndarray, weights: np.ndarray, step: int, out: np.ndarray) -> None:
    """The weighted sum of neighbours `step` apart, except where some are missing; piece by piece, so that a piece stays in the cache."""
    margin, piece = (len(weights) - 1) * step, 4096
    for start in range(margin, len(source) - margin, piece):
        stop = min(start + piece, len(source) - margin)
        target, center = out[start:stop], source[start:stop]
        for i in range(len(target)):
            target[i] = weights[0] * center[i]
        for k in range(1, len(weights)):
            before, after = source[start - k * step : stop - k * step], source[start + k * step : stop + k * step]
            for i in range(len(target)):
                target[i] += weights[k] * (before[i] + after[i])


def brightness(x: np.ndarray, factor: float) -> None:
    """Multiply."""
    x *= np.float32(factor)


def contrast(x: np.ndarray, factor: float) -> None:
    """Stretch about the mean, within the range of before."""
    mean, _, low, high = _statistics(x)
    _stretch(x, np.float32(factor), np.float32(mean - factor * mean), low, high)


def low_resolution(x: np.ndarray, share: float) -> None:
    """Keep the nearest of `share` of the voxels along each axis and interpolate linearly between them."""
    (kept_z, *in_z), (kept_y, *in_y), (kept_x, before, after, part) = (coarse_grid(size, share) for size in x.shape)
    wide = np.empty((len(kept_z), len(kept_y), x.shape[2]), np.float32)
    _along_rows(x, kept_z, kept_y, kept_x[before].astype(np.uint32), kept_x[after].astype(np.uint32), part, wide)
    _across_rows(wide, *in_z, *in_y, x)


@compiled
def _along_rows(x: np.ndarray, kept_z: np.ndarray, kept_y: np.ndarray, before: np.ndarray, after: np.ndarray, part: np.ndarray, out: np.ndarray) -> None:
    for j, z in enumerate(kept_z):
        for k, y in enumerate(kept_y):
            row, target = x[z, y], out[j, k]
            for i in range(len(target)):
                target[i] = row[before[i]] + part[i] * (row[after[i]] - row[before[i]])


@compiled
def _across_rows(
    rows: np.ndarray,
    before_z: np.ndarray,
    after_z: np.ndarray,
    part_z: np.ndarray,
    before_y: np.ndarray,
    after_y: np.ndarray,
    part_y: np.ndarray,
    out: np.ndarray,
) -> None:
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            a, b, c, d = rows[before_z[z], before_y[y]], rows[before_z[z], after_y[y]], rows[after_z[z], before_y[y]], rows[after_z[z], after_y[y]]
            target, v, u = out[z, y], part_y[y], part_z[z]
            for i in range(len(target)):
                front = a[i] + v * (b[i] - a[i])
                target[i] = front + u * (c[i] + v * (d[i] - c[i]) - front)


def gamma(x: np.ndarray, exponent: float) -> None:
    """Raise the volume, scaled to [0, 1], to a power; scale back to its mean and standard deviation."""
    _gamma(x, exponent, 1.0)


def gamma_inverted(x: np.ndarray, exponent: float) -> None:
    """`gamma` of the inverted volume, inverted back."""
    _gamma(x, exponent, -1.0)


def _gamma(x: np.ndarray, exponent: float, sign: float) -> None:
    mean, std, low, high = _statistics(x)
    scale = sign / max(high - low, 1e-7)
    _power(x, np.float32(scale), np.float32(low if sign > 0 else high), np.float32(exponent))
    curved_mean, curved_std, _, _ = _statistics(x)
    factor = sign * std / max(curved_std, 1e-7)
    _stretch(x, np.float32(factor), np.float32(mean - factor * curved_mean), np.float32(-np.inf), np.float32(np.inf))


@compiled
def _power(x: np.ndarray, scale: float, zero: float, exponent: float) -> None:
    flat = x.reshape(-1)
    for i in range(len(flat)):
        flat[i] = _exp2(max(exponent * _log2((flat[i] - zero) * scale), np.float32(-126)))


@compiled
def _stretch(x: np.ndarray, factor: float, shift: float, low: float, high: float) -> None:
    flat = x.reshape(-1)
    for i in range(len(flat)):
        flat[i] = min(max(flat[i] * factor + shift, low), high)


def _statistics(x: np.ndarray) -> tuple[float, float, np.float32, np.float32]:
    """Mean, standard deviation, minimum and maximum."""
    mean, squares = _moments(x)
    return mean, math.sqrt(squares / x.size), x.min(), x.max()


@compiled
def _moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and sum of squares about it; rows are merged by Chan's formula in double precision.

    Source: Chan et al. 1983, doi:10.1080/00031305.1983.10483115.
    """
    rows, mean, squares = x.reshape(-1, x.shape[2]), 0.0, 0.0
    for count in range(len(rows)):
        row, total, around = rows[count], np.float32(0), np.float32(0)
        for i in range(len(row)):
            total += row[i]
        center = total / np.float32(len(row))
        for i in range(len(row)):
            around += (row[i] - center) * (row[i] - center)
        apart = np.float64(center) - mean
        mean += apart / (count + 1)
        squares += around + apart * apart * len(row) * count / (count + 1)
    return mean, squares


OPERATIONS: dict[str, Callable[..., None]] = {f.__name__: f for f in (noise, blur, brightness, contrast, low_resolution, gamma, gamma_inverted)}
