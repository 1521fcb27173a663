"""Procedural torso phantom: CT-like and MR-like volumes with labels, made offline from (seed, index) alone.

Several organs share mean and standard deviation exactly and differ in texture and context only (`ALIKE`), and decoys
(stomach, heart, ribs, pelvis) look like organs without being labelled, so that intensities alone do not solve the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation import anatomy
from nnssl_ext.evaluation.anatomy import LABELS
from nnssl_ext.evaluation.deform import compose, diffeomorphism, smooth_field

MODALITIES = ("CT", "MR", "MRFS")  # MRFS: fat-suppressed MR, a contrast held out from pretraining
ALIKE = (("liver", "spleen"), ("kidney_right", "kidney_left"), ("aorta", "vena_cava"), ("bowel", "muscles"))
LESIONS = {"none": 0, "benign": 1, "malignant": 2}

# Tissue classes: CT mean and spread over subjects (HU), standard deviation of the texture (HU), MR range of the mean (1 = white).
_CLASSES = {
    "air": (-1000.0, 0.0, 2.0, (0.0, 0.02)),
    "fat": (-100.0, 8.0, 10.0, (0.60, 1.00)),
    "lung": (-790.0, 40.0, 45.0, (0.03, 0.12)),
    "parenchyma": (62.0, 14.0, 16.0, (0.25, 0.60)),
    "kidney": (88.0, 26.0, 18.0, (0.25, 0.75)),
    "blood": (104.0, 40.0, 12.0, (0.05, 0.85)),
    "muscle": (46.0, 7.0, 15.0, (0.12, 0.40)),
    "bone": (330.0, 60.0, 75.0, (0.10, 0.45)),
    "fluid": (15.0, 6.0, 8.0, (0.15, 0.90)),
}
# Class and texture of each tissue: standard deviation of the Gaussian kernel (z, y, x) in mm.
_FINE, _MEDIUM, _COARSE, _STRIPED = (1.2, 1.2, 1.2), (2.8, 2.8, 2.8), (5.0, 5.0, 5.0), (9.0, 1.2, 1.8)
_TISSUES = {
    anatomy.AIR: ("air", _FINE),
    LABELS["lungs"]: ("lung", _MEDIUM),
    LABELS["liver"]: ("parenchyma", _FINE),
    LABELS["spleen"]: ("parenchyma", _COARSE),
    LABELS["kidney_right"]: ("kidney", _MEDIUM),
    LABELS["kidney_left"]: ("kidney", _MEDIUM),
    LABELS["spine"]: ("bone", _MEDIUM),
    LABELS["aorta"]: ("blood", _FINE),
    LABELS["vena_cava"]: ("blood", _MEDIUM),
    LABELS["bowel"]: ("muscle", _COARSE),
    LABELS["muscles"]: ("muscle", _STRIPED),
    anatomy.FAT: ("fat", _MEDIUM),
    anatomy.BONE: ("bone", _MEDIUM),
    anatomy.STOMACH: ("parenchyma", _MEDIUM),
    anatomy.HEART: ("blood", _COARSE),
    anatomy.DISC: ("muscle", _FINE),
    anatomy.CORD: ("fluid", _FINE),
}
_NOISE_HU = (14.0, 26.0)  # standard deviation of the CT noise, drawn per subject
_NOISE_MR = (0.02, 0.05)  # of the Rician noise, in units of white
_LESION_CONTRAST = 2.0  # lesion mean below the organ's, in standard deviations of the organ's texture


@dataclass(frozen=True)
class Phantom:
    """One phantom.

    Args:
        image: float32 (z, y, x); HU for CT, arbitrary units for MR.
        labels: uint8 (z, y, x), names in `LABELS`.
        body: bool (z, y, x).
        lesions: uint8 (z, y, x), 1 benign, 2 malignant (`LESIONS`); the organ keeps its label there.
        spacing: mm, (z, y, x).
        modality: "CT", "MR" or "MRFS".
    """

    image: np.ndarray
    labels: np.ndarray
    body: np.ndarray
    lesions: np.ndarray
    spacing: tuple[float, float, float]
    modality: str


@dataclass(frozen=True)
class PhantomPair:
    """Two phantoms of one subject with the known field: ``fixed(x) = moving(x + displacement(x))`` up to texture and noise.

    Args:
        fixed, moving: the two phantoms on one grid.
        displacement: mm, float32 (3, z, y, x).
        landmarks: n corresponding points, mm from the centre of the first voxel, (n, 2, 3): [:, 0] in fixed, [:, 1] in moving.
    """

    fixed: Phantom
    moving: Phantom
    displacement: np.ndarray
    landmarks: np.ndarray


def make_phantom(
    seed: int,
    index: int,
    shape: Sequence[int] = (64, 64, 64),
    spacing: Sequence[float] = (3.0, 3.0, 3.0),
    modality: str = "CT",
    lesion: str = "none",
    scan: int = 0,
) -> Phantom:
    """One phantom, a pure function of its arguments.

    Args:
        seed, index: the subject; its anatomy depends on these two (and on the grid) only.
        shape: voxels, (z, y, x).
        spacing: mm, (z, y, x).
        modality: "CT", "MR" (contrast drawn per subject and scan) or "MRFS" (fat-suppressed).
        lesion: "none", "benign" or "malignant": one lesion in the liver; both kinds have the same volume and the same
            mean and differ in margin (smooth, spiculated) and texture (homogeneous, heterogeneous).
        scan: number of the acquisition: new contrast, texture and noise of the same anatomy.

    Raises:
        UserError: unknown modality or lesion.
    """
    grid, size = _checked(shape, spacing, modality, lesion)
    displacement = _subject_field(seed, index, grid, size)
    return _render(seed, index, displacement, grid, size, modality, lesion, scan)


def make_pair(
    seed: int,
    index: int,
    shape: Sequence[int] = (64, 64, 64),
    spacing: Sequence[float] = (3.0, 3.0, 3.0),
    modalities: tuple[str, str] = ("CT", "MR"),
    max_mm: float = 24.0,
) -> PhantomPair:
    """A registration pair of one subject with its true displacement field and landmarks.

    Args:
        seed, index, shape, spacing: as in `make_phantom`.
        modalities: of the fixed and of the moving phantom.
        max_mm: longest displacement, mm; 0 gives an aligned pair.
    """
    for modality in modalities:
        grid, size = _checked(shape, spacing, modality, "none")
    base = _subject_field(seed, index, grid, size)
    rng = sample_rng(seed, index, "phantom pair")
    if max_mm > 0:
        view = min(n * s for n, s in zip(grid, size, strict=True))
        displacement = diffeomorphism(rng, grid, size, max_mm, knot_mm=0.3 * view, fixed_border=False)[0]
    else:
        displacement = np.zeros((3, *grid), np.float32)
    fixed = _render(seed, index, compose(displacement, base, size), grid, size, modalities[0], "none", 0)
    moving = _render(seed, index, base, grid, size, modalities[1], "none", 1)
    voxels = np.argwhere(fixed.labels > 0)
    voxels = voxels[rng.permutation(len(voxels))[:32]]
    points = voxels * np.asarray(size)
    return PhantomPair(fixed, moving, displacement, np.stack([points, points + displacement[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T], axis=1))


def _checked(shape: Sequence[int], spacing: Sequence[float], modality: str, lesion: str) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    if modality not in MODALITIES:
        raise UserError(f"unknown modality '{modality}'", "phantom", did_you_mean(modality, MODALITIES))
    if lesion not in LESIONS:
        raise UserError(f"unknown lesion '{lesion}'", "phantom", did_you_mean(lesion, LESIONS))
    a, b, c = (int(n) for n in shape)
    d, e, f = (float(s) for s in spacing)
    return (a, b, c), (d, e, f)


def _subject_field(seed: int, index: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    view = min(n * s for n, s in zip(shape, spacing, strict=True))
    return diffeomorphism(sample_rng(seed, index, "phantom field"), shape, spacing, max_mm=0.07 * view, knot_mm=0.28 * view, fixed_border=False)[0]


def _render(
    seed: int, index: int, displacement: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, float, float], modality: str, lesion: str, scan: int
) -> Phantom:
    axes = np.meshgrid(*((2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in shape), indexing="ij", sparse=True)
    half = [0.5 * n * s for n, s in zip(shape, spacing, strict=True)]
    z, y, x = (axis + u / np.float32(h) for axis, u, h in zip(axes, displacement, half, strict=True))
    tissues, body = anatomy.draw_tissues(sample_rng(seed, index, "phantom shape"), (z, y, x))
    lesions = np.zeros(shape, np.uint8)
    if lesion != "none":
        lesions = _lesion_mask(sample_rng(seed, index, "phantom lesion"), tissues, spacing, lesion)
    image = _appearance(sample_rng(seed, index, f"phantom {modality} {scan}"), tissues, lesions, spacing, modality)
    return Phantom(image, anatomy.labels_of(tissues), body, lesions, spacing, modality)


def _contrast(rng: np.random.Generator, modality: str) -> dict[str, tuple[float, float]]:
    """Mean and texture standard deviation of every tissue class for one acquisition."""
    drawn: dict[str, tuple[float, float]] = {}
    for name, (mean, spread, deviation, mr_range) in _CLASSES.items():
        normal, uniform = rng.standard_normal(), rng.uniform(*mr_range)
        drawn[name] = (mean + spread * float(np.clip(normal, -2, 2)), deviation) if modality == "CT" else (uniform, 0.02 + 0.07 * uniform)
    if modality == "MRFS":
        drawn["fat"] = (0.1 * drawn["fat"][0], 0.02)
    return drawn


def _appearance(rng: np.random.Generator, tissues: np.ndarray, lesions: np.ndarray, spacing: Sequence[float], modality: str) -> np.ndarray:
    contrast = _contrast(rng, modality)
    present = np.flatnonzero(np.bincount(tissues.ravel(), minlength=len(_TISSUES)))
    means, texture = np.zeros(len(_TISSUES), np.float32), np.zeros(tissues.shape, np.float32)
    fields = {kernel: _white(rng, tissues.shape, kernel, spacing) for kernel in (_FINE, _MEDIUM, _COARSE, _STRIPED)}
    for tissue in present:
        name, kernel = _TISSUES[int(tissue)]
        means[tissue], deviation = contrast[name]
        inside = tissues == tissue
        texture[inside] = deviation * _standardised(fields[kernel][inside])
    if lesions.any():
        mean, deviation = contrast[_TISSUES[LABELS["liver"]][0]]
        inside = lesions > 0
        amplitude, kernel = (0.3, _FINE) if lesions.max() == LESIONS["benign"] else (1.2, _MEDIUM)
        texture[inside] = deviation * (amplitude * _standardised(fields[kernel][inside]) - _LESION_CONTRAST)
    # Only the means are blurred (partial volume): organs that share a distribution keep sharing it.
    image = ndimage.gaussian_filter(means[tissues], 0.5) + texture
    if modality == "CT":
        return np.asarray(np.clip(image + rng.uniform(*_NOISE_HU) * _noise(rng, image.shape), -1024, 3000), np.float32)
    view = max(n * s for n, s in zip(image.shape, spacing, strict=True))
    image = np.maximum(image, 0) * np.exp(0.30 * smooth_field(rng, image.shape, spacing, 0.55 * view))
    sigma = rng.uniform(*_NOISE_MR)
    magnitude = np.hypot(image + sigma * _noise(rng, image.shape), sigma * _noise(rng, image.shape))  # Rician
    return np.asarray(magnitude * rng.uniform(300.0, 1200.0), np.float32)


def _noise(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return rng.standard_normal(tuple(shape), dtype=np.float32)


def _white(rng: np.random.Generator, shape: Sequence[int], kernel_mm: Sequence[float], spacing: Sequence[float]) -> np.ndarray:
    return np.asarray(ndimage.gaussian_filter(_noise(rng, shape), [k / s for k, s in zip(kernel_mm, spacing, strict=True)], truncate=3.0))


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def _lesion_mask(rng: np.random.Generator, tissues: np.ndarray, spacing: Sequence[float], kind: str) -> np.ndarray:
    """A lesion well inside the liver; both kinds fill the same number of voxels for the same draw of the radius."""
    depth = ndimage.distance_transform_edt(tissues == LABELS["liver"], sampling=spacing)
    radius = rng.uniform(0.45, 0.6) * depth.max()
    candidates = np.argwhere(depth >= 0.8 * depth.max())
    centre = candidates[rng.integers(len(candidates))]
    offset = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) - c for n, c in zip(tissues.shape, centre, strict=True)), indexing="ij"))
    distance = np.sqrt(((offset * np.asarray(spacing, np.float32)[:, None, None, None]) ** 2).sum(0))
    voxels = int(np.count_nonzero(distance < radius))
    rough = _white(rng, tissues.shape, (radius / 4,) * 3, spacing)
    near = distance < 1.8 * radius
    if kind == "malignant":
        distance = distance * np.exp(0.35 * rough / max(float(rough[near].std()), 1e-6))
    distance[tissues != LABELS["liver"]] = np.inf
    lesion = np.zeros(tissues.shape, np.uint8)
    lesion.ravel()[np.argpartition(distance, voxels, axis=None)[:voxels]] = LESIONS[kind]
    return lesion
