"""Semi-synthetic cohort: volumes derived from the five real scans by random deformation and changes of appearance.

The volumes of one scan are not independent samples: they show that a pipeline works, not that a method generalises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from nnssl_ext.core.geometry import Geometry, resampled_shape
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.deform import compose, diffeomorphism, jacobian_determinant, smooth_field, warp
from nnssl_ext.evaluation.torso import ORGANS, SCANS, Scan, load_scan

MAX_DISPLACEMENT_MM = 12.0
_KNOT_MM = 45.0  # distance of the control points of the deformation
_ROTATION_DEG, _SCALE = 4.0, 0.06  # ranges of the affine part, per axis
_PSEUDO_MR = 0.25  # share of the CT-derived volumes whose contrast is remapped
_NOISY = ("spine_ct",)  # too noisy for a contrast remap
# Scans of successive volumes: the small spine crops come half as often.
_ORDER = ("abdomen_ct", "thorax_ct", "abdomen_mr", "spine_ct", "abdomen_ct", "thorax_ct", "abdomen_mr", "spine_mr")
_CT_KNOTS = (-1024.0, -850.0, -500.0, -120.0, -20.0, 40.0, 90.0, 160.0, 350.0, 1500.0)  # HU of the contrast remap
_MR_DARKEST = (0.0, 0.0, 0.0, 0.5, 0.1, 0.1, 0.2, 0.1, 0.05, 0.0)  # its values, 1 = white, are drawn between these
_MR_BRIGHTEST = (0.0, 0.05, 0.1, 1.0, 0.5, 0.6, 0.9, 0.9, 0.4, 0.2)


@dataclass(frozen=True)
class DerivedVolume:
    """A volume derived from a scan: ``image(x) = appearance(scan(affine(x + displacement(x))))``.

    Args:
        image: float32 (z, y, x); HU for CT.
        labels: uint8 (z, y, x), pseudo-labels, the values of the source; deformed with the image.
        geometry: where it lies.
        modality: "CT" or "MR".
        pseudo: True if the contrast of a CT was remapped to look like MR.
        source: key of `SCANS`.
        displacement: the diffeomorphic part, mm, float32 (3, z, y, x).
    """

    image: np.ndarray
    labels: np.ndarray
    geometry: Geometry
    modality: str
    pseudo: bool
    source: str
    displacement: np.ndarray


@dataclass(frozen=True)
class DerivedPair:
    """Two volumes derived from one scan: ``fixed(x) = moving(x + displacement(x))`` but for shading, blur and added noise, which each has for itself.

    The scan's own noise is deformed with the anatomy: such a pair is easier to register than two scans of one patient.

    Args:
        fixed, moving: the volumes, on one grid.
        displacement: mm, float32 (3, z, y, x).
    """

    fixed: DerivedVolume
    moving: DerivedVolume
    displacement: np.ndarray


def source_of(index: int) -> str:
    """The scan from which volume `index` of the cohort is derived."""
    return _ORDER[index % len(_ORDER)]


def derive_volume(seed: int, index: int, source: str | None = None, stream: str = "cohort", pseudo_mr: float = _PSEUDO_MR) -> DerivedVolume:
    """One derived volume, a pure function of its arguments.

    Args:
        seed, index: number of the volume.
        source: key of `SCANS`; None takes `source_of(index)`.
        stream: independent cohorts of one seed have different streams.
        pseudo_mr: probability that a CT-derived volume gets an MR-like contrast.
    """
    source = source_of(index) if source is None else source
    scan = _scan_at_working_spacing(source)
    shape, spacing = scan.geometry.shape, scan.geometry.spacing
    rng = sample_rng(seed, index, stream)
    displacement, _ = diffeomorphism(rng, shape, spacing, _bearable(shape, spacing, MAX_DISPLACEMENT_MM), _KNOT_MM)
    total = displacement + _affine_displacement(rng, shape, spacing)
    image, labels = warp(scan.image, total, spacing, order=1), warp(scan.labels, total, spacing, order=0)
    pseudo = scan.modality == "CT" and rng.random() < pseudo_mr and source not in _NOISY
    if pseudo:  # smoothed first: a remap with steep parts would turn the noise of the CT into speckle
        remapped = np.interp(ndimage.gaussian_filter(image, 0.8), _CT_KNOTS, rng.uniform(_MR_DARKEST, _MR_BRIGHTEST))
        image = (800.0 * remapped).astype(np.float32)
    modality = "MR" if pseudo else scan.modality
    return DerivedVolume(_appearance(rng, image, spacing, modality), labels, scan.geometry, modality, bool(pseudo), source, displacement)


def derive_pair(seed: int, index: int, source: str, max_mm: float = 24.0) -> DerivedPair:
    """A pair whose displacement is known, a pure function of its arguments.

    Args:
        seed, index: number of the pair.
        source: key of `SCANS`.
        max_mm: longest displacement, mm.
    """
    scan = _scan_at_working_spacing(source)
    shape, spacing = scan.geometry.shape, scan.geometry.spacing
    rng = sample_rng(seed, index, "derived pair")
    base = diffeomorphism(rng, shape, spacing, _bearable(shape, spacing, MAX_DISPLACEMENT_MM), _KNOT_MM)[0] + _affine_displacement(rng, shape, spacing)
    displacement, _ = diffeomorphism(rng, shape, spacing, _bearable(shape, spacing, max_mm), _KNOT_MM)

    def volume(field: np.ndarray) -> DerivedVolume:
        image, labels = warp(scan.image, field, spacing, order=1), warp(scan.labels, field, spacing, order=0)
        return DerivedVolume(_appearance(rng, image, spacing, scan.modality), labels, scan.geometry, scan.modality, False, source, field)

    return DerivedPair(volume(compose(displacement, base, spacing)), volume(base), displacement)


def merge_organs(labels: np.ndarray, source: str = "abdomen_ct") -> np.ndarray:
    """Pseudo-labels of an abdominal scan merged to the 8 classes of `ORGANS`, uint8; everything else is background."""
    table = np.zeros(256, np.uint8)
    for organ, values in SCANS[source].label_names.items():
        table[list(values)] = ORGANS[organ]
    return np.asarray(table[labels])


def least_jacobian(volume: DerivedVolume) -> float:
    """Smallest Jacobian determinant of the diffeomorphic part; positive where nothing folds."""
    return float(jacobian_determinant(volume.displacement, volume.geometry.spacing).min())


@lru_cache(maxsize=len(SCANS))
def _scan_at_working_spacing(source: str) -> Scan:
    scan = load_scan(source)
    shape = resampled_shape(scan.geometry.shape, scan.geometry.spacing, (SCANS[source].spacing,) * 3)
    if shape == scan.geometry.shape:
        return scan
    factors = [old / new for old, new in zip(scan.geometry.shape, shape, strict=True)]
    centres = np.meshgrid(*((np.arange(n, dtype=np.float32) + 0.5) * f - 0.5 for n, f in zip(shape, factors, strict=True)), indexing="ij", sparse=True)
    smooth = ndimage.gaussian_filter(scan.image, [0.35 * max(f - 1, 0) for f in factors])  # against aliasing
    image = ndimage.map_coordinates(smooth, np.broadcast_arrays(*centres), order=1, mode="nearest")
    labels = ndimage.map_coordinates(scan.labels, np.broadcast_arrays(*centres), order=0, mode="nearest")
    return Scan(image, labels, scan.geometry.resampled(shape), scan.modality)


def _affine_displacement(rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Displacement of a small random rotation and scaling about the centre, mm, (3, z, y, x)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-_ROTATION_DEG, _ROTATION_DEG, 3))):
        rotation, (i, j) = np.eye(3), [a for a in range(3) if a != axis]
        rotation[[i, j], [i, j]], rotation[i, j], rotation[j, i] = np.cos(angle), -np.sin(angle), np.sin(angle)
        matrix = matrix @ rotation
    matrix = matrix @ np.diag(np.exp(rng.uniform(-_SCALE, _SCALE, 3)))
    points = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij", sparse=True)
    change = matrix - np.eye(3)
    return np.stack([sum(change[i, j] * points[j] for j in range(3)) for i in range(3)]).astype(np.float32)


def _bearable(shape: Sequence[int], spacing: Sequence[float], max_mm: float) -> float:
    """The longest displacement, mm; thin slabs and small crops bear less."""
    return min(max_mm, 0.12 * min(n * s for n, s in zip(shape, spacing, strict=True)))


def _blur_and_noise(rng: np.random.Generator, image: np.ndarray, sigma: float) -> np.ndarray:
    blurred = ndimage.gaussian_filter(image, rng.uniform(0.0, 0.6))
    return np.asarray(blurred + np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32))


def _appearance(rng: np.random.Generator, image: np.ndarray, spacing: Sequence[float], modality: str) -> np.ndarray:
    changed = _ct_appearance(rng, image, spacing) if modality == "CT" else _mr_appearance(rng, image, spacing)
    return changed.astype(np.float32)


def _ct_appearance(rng: np.random.Generator, image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Beam-hardening-like shading of the body, blur, noise: HU stay HU."""
    view = max(n * s for n, s in zip(image.shape, spacing, strict=True))
    shading = rng.uniform(0.0, 15.0) * smooth_field(rng, image.shape, spacing, 0.6 * view)
    return np.clip(_blur_and_noise(rng, np.where(image > -500, image + shading, image), rng.uniform(3.0, 15.0)), -1024, 3071)


def _mr_appearance(rng: np.random.Generator, image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Gamma, bias field, blur, Rician noise."""
    image = np.maximum(image, 0)
    white = float(np.percentile(image, 99.5)) or 1.0
    image = white * (image / white) ** np.exp(rng.uniform(-0.3, 0.3))
    view = max(n * s for n, s in zip(image.shape, spacing, strict=True))
    image = image * np.exp(rng.uniform(0.1, 0.3) * smooth_field(rng, image.shape, spacing, 0.6 * view))
    sigma = rng.uniform(0.01, 0.03) * white
    return np.hypot(_blur_and_noise(rng, image, sigma), np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32))
