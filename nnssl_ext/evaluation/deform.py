"""Smooth random fields and diffeomorphic deformations; displacements are in mm, axis order (z, y, x)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline

_STEPS = 6  # scaling and squaring: 2**6 compositions
_LEAST_JACOBIAN = 0.15  # a deformation that compresses more than this is damped


@lru_cache(maxsize=64)
def _spline_matrix(nodes: int, voxels: int) -> np.ndarray:
    """Matrix (voxels, nodes) of cubic spline interpolation from nodes spread over [0, voxels - 1]."""
    if nodes == 1 or voxels == 1:
        return np.full((voxels, nodes), 1.0 / nodes, np.float32)
    positions = np.linspace(0.0, nodes - 1.0, voxels)
    return CubicSpline(np.arange(nodes), np.eye(nodes), bc_type="natural" if nodes < 4 else "not-a-knot")(positions).astype(np.float32)


def resize(lattice: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cubic spline interpolation of a coarse lattice whose corner nodes lie on the corner voxels.

    Args:
        lattice: (..., a, b, c) float.
        shape: voxels of the last three axes of the result.
    """
    z, y, x = (_spline_matrix(nodes, voxels) for nodes, voxels in zip(lattice.shape[-3:], shape, strict=True))
    field = np.asarray(lattice, np.float32) @ x.T
    field = y @ field
    moved = np.moveaxis(field, -3, -2)  # (..., y, a, x): contract a with one matrix product
    return np.ascontiguousarray(np.moveaxis(z @ moved, -2, -3))


def _nodes(shape: Sequence[int], spacing: Sequence[float], step_mm: float) -> tuple[int, ...]:
    return tuple(max(2, int(np.ceil(n * s / step_mm)) + 1) for n, s in zip(shape, spacing, strict=True))


def smooth_field(rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], knot_mm: float) -> np.ndarray:
    """A smooth random field in [-1, 1], float32 (z, y, x).

    Args:
        shape: voxels.
        spacing: mm.
        knot_mm: distance of the random control points, mm.
    """
    field = resize(rng.standard_normal(_nodes(shape, spacing, knot_mm)), shape)
    return np.asarray(field / max(float(np.abs(field).max()), 1e-6))


def diffeomorphism(
    rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], max_mm: float, knot_mm: float, fixed_border: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A random diffeomorphism exp(v) of a smooth velocity v by scaling and squaring, and its inverse exp(-v).

    Args:
        shape: voxels.
        spacing: mm.
        max_mm: bound on the Euclidean length of the displacement; the longest one lies between 60 % and 100 % of it
            (or below, where the Jacobian determinant would fall under 0.15).
        knot_mm: distance of the velocity's control points, mm.
        fixed_border: keep the faces of the volume in place.

    Returns:
        displacement and displacement of the inverse, mm, float32 (3, z, y, x).

    Source: Arsigny et al. 2006, "A Log-Euclidean framework for statistics on diffeomorphisms", section 3.
    """
    grid = _nodes(shape, spacing, knot_mm / 3)
    step = [(n - 1) * s / (g - 1) for n, s, g in zip(shape, spacing, grid, strict=True)]
    lattice = rng.standard_normal((3, *_nodes(shape, spacing, knot_mm)))
    if fixed_border:
        inside = np.zeros(lattice.shape[1:], bool)
        inside[tuple(slice(1, -1) if nodes > 2 else slice(None) for nodes in lattice.shape[1:])] = True
        lattice *= inside
    velocity = resize(lattice, grid)
    target = max_mm * rng.uniform(0.6, 1.0)
    velocity *= target / max(_longest(velocity), 1e-6)
    for _ in range(20):
        forward = resize(_exponential(velocity, step), shape)
        length = _longest(forward)
        if length <= max_mm and jacobian_determinant(forward, spacing).min() >= _LEAST_JACOBIAN:
            return forward, resize(_exponential(-velocity, step), shape)
        velocity *= min(0.85, 0.98 * max_mm / max(length, 1e-6))
    return np.zeros((3, *shape), np.float32), np.zeros((3, *shape), np.float32)


def _longest(field: np.ndarray) -> float:
    return float(np.sqrt((field**2).sum(0)).max())


def _exponential(velocity: np.ndarray, step: Sequence[float]) -> np.ndarray:
    displacement = velocity / 2**_STEPS
    for _ in range(_STEPS):
        displacement = compose(displacement, displacement, step)
    return displacement


def compose(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Displacement of x -> g(f(x)) for f(x) = x + first(x) and g(x) = x + second(x); mm, (3, z, y, x)."""
    return first + np.stack([warp(component, first, spacing) for component in second])


def warp(array: np.ndarray, displacement: np.ndarray, spacing: Sequence[float], order: int = 1) -> np.ndarray:
    """``array(x + displacement(x))``; outside the array its nearest voxel counts.

    Args:
        array: (z, y, x).
        displacement: mm, (3, z, y, x).
        spacing: mm.
        order: 0 for labels, 1 linear, 3 cubic.
    """
    grid = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in array.shape), indexing="ij", sparse=True)
    positions = [g + u / np.float32(s) for g, u, s in zip(grid, displacement, spacing, strict=True)]
    return np.asarray(ndimage.map_coordinates(array, positions, order=order, mode="nearest"))


def jacobian_determinant(displacement: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """det(I + grad u) at every voxel (central differences), (z, y, x).

    Args:
        displacement: mm, (3, z, y, x).
        spacing: mm.
    """
    rows = [np.gradient(component, *spacing) for component in displacement]
    (a, b, c), (d, e, f), (g, h, i) = [[d + (j == k) for k, d in enumerate(row)] for j, row in enumerate(rows)]
    return np.asarray(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
