"""Shapes of the procedural torso phantom: implicit functions of deformed coordinates, one latent vector per subject.

Coordinates run from -1 to 1 over the field of view: z towards the head, y towards the back, x towards the patient's
left. The anatomy fills the field of view, whatever its size in mm.
"""

from __future__ import annotations

import numpy as np

LABELS = {
    "background": 0,
    "lungs": 1,
    "liver": 2,
    "spleen": 3,
    "kidney_right": 4,
    "kidney_left": 5,
    "spine": 6,
    "aorta": 7,
    "vena_cava": 8,
    "bowel": 9,
    "muscles": 10,
}
# Tissue of what carries no label but looks like an organ (decoys): numbers go on after the labels.
FAT, BONE, STOMACH, HEART, DISC, CORD = 11, 12, 13, 14, 15, 16
AIR = 0

_LABEL_OF = np.array([*range(len(LABELS)), 0, 0, 0, 0, LABELS["spine"], 0], np.uint8)  # discs belong to the spine

Points = tuple[np.ndarray, np.ndarray, np.ndarray]


class _Latent:
    """Draws the shape parameters of one subject: every call varies a nominal value."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def centre(self, *nominal: float, sd: float = 0.03) -> np.ndarray:
        return np.asarray(nominal) + np.clip(self.rng.standard_normal(3), -2, 2) * sd

    def radii(self, *nominal: float, sd: float = 0.09) -> np.ndarray:
        common, own = self.rng.standard_normal(), self.rng.standard_normal(3)
        return np.asarray(nominal) * np.exp(sd * np.clip(0.8 * common + 0.6 * own, -2, 2))


def _ellipsoid(p: Points, centre: np.ndarray, radii: np.ndarray, tilt_x: float = 0.0) -> np.ndarray:
    """Squared distance in units of the radii (< 1 inside); `tilt_x` shifts x with z."""
    z, y, x = p
    dz = z - centre[0]
    return (dz / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((x - centre[2] - tilt_x * dz) / radii[2]) ** 2


def _tube(p: Points, y0: np.ndarray | float, x0: np.ndarray | float, ry: float, rx: float) -> np.ndarray:
    return ((p[1] - y0) / ry) ** 2 + ((p[2] - x0) / rx) ** 2


def draw_tissues(rng: np.random.Generator, p: Points) -> tuple[np.ndarray, np.ndarray]:
    """Tissue of every point and the mask of the body.

    Args:
        rng: draws the subject's shape latent.
        p: coordinates (z, y, x), three arrays of one shape.

    Returns:
        tissues: uint8; 1-10 as in `LABELS`, further numbers for fat, ribs and pelvis, stomach, heart, discs, spinal cord.
        body: bool.
    """
    latent = _Latent(rng)
    z, y, x = p
    tissues = np.zeros(z.shape, np.uint8)
    wide, deep = latent.radii(0.9, 0.70, 1.0, sd=0.03)[:2]
    waist = 1.0 - 0.07 * np.exp(-(((z + 0.15) / 0.35) ** 2))
    radius = (np.abs(x / (wide * waist)) ** 2.4 + np.abs(y / (deep * waist)) ** 2.4) ** (1 / 2.4)
    fat, wall = rng.uniform(0.05, 0.14), rng.uniform(0.07, 0.10)
    body, cavity = radius < 1.0, radius < 1.0 - fat - wall
    tissues[body] = FAT
    tissues[(radius < 1.0 - fat) & ~cavity] = LABELS["muscles"]
    ribs = (np.abs(radius - (1.0 - fat - 0.6 * wall)) < 0.022) & (z > -0.12) & (np.sin(22.0 * (z + 0.5 * y) + rng.uniform(0, 6)) > 0.35)
    tissues[ribs] = BONE

    def put(mask: np.ndarray, tissue: int) -> None:
        tissues[mask] = tissue

    for side in (-1.0, 1.0):  # lungs first: liver, heart and spine are drawn over them
        put((_ellipsoid(p, latent.centre(0.86, 0.02, side * 0.42), latent.radii(0.80, 0.46, 0.34, sd=0.05)) < 1) & cavity, LABELS["lungs"])
    put((_ellipsoid(p, latent.centre(0.70, -0.16, 0.12), latent.radii(0.32, 0.25, 0.30)) < 1) & cavity, HEART)
    right = _ellipsoid(p, latent.centre(0.10, -0.02, -0.42), latent.radii(0.36, 0.40, 0.36))
    left = _ellipsoid(p, latent.centre(0.18, -0.24, -0.06), latent.radii(0.19, 0.20, 0.36))
    stomach = _ellipsoid(p, latent.centre(0.12, -0.17, 0.34), latent.radii(0.21, 0.23, 0.20))
    put((_ellipsoid(p, latent.centre(0.12, 0.16, 0.50), latent.radii(0.25, 0.22, 0.21)) < 1) & cavity, LABELS["spleen"])
    put((stomach < 1) & cavity, STOMACH)
    put((np.minimum(right, left) < 1) & cavity, LABELS["liver"])

    loops = latent.centre(-0.55, -0.16, 0.0)
    inside = (_ellipsoid(p, loops, latent.radii(0.42, 0.34, 0.62, sd=0.05)) < 1) & cavity & (tissues == FAT)
    k, phase = rng.uniform(13.0, 17.0), rng.uniform(0, 6.28, 3)
    a, b, c = k * z + phase[0], k * y + phase[1], k * x + phase[2]
    put(inside & (np.sin(a) * np.cos(b) + np.sin(b) * np.cos(c) + np.sin(c) * np.cos(a) > -0.15), LABELS["bowel"])  # gyroid: one coiled tube

    curve = 0.36 + 0.05 * np.cos(2.2 * z + rng.uniform(-0.5, 0.5))  # lordosis and kyphosis of the spine
    for side in (-1.0, 1.0):
        psoas = latent.centre(-0.62, 0.33, side * 0.24, sd=0.02)
        put((_ellipsoid(p, psoas, latent.radii(0.62, 0.12, 0.12), tilt_x=-0.15 * side) < 1) & cavity, LABELS["muscles"])
        ry, rx = latent.radii(0.12, 0.13, 1.0)[:2]
        put((_tube(p, curve + 0.15, side * 0.17, ry, rx) < 1) & (radius < 1.0 - fat), LABELS["muscles"])
        wing = latent.centre(-0.86, 0.20, side * 0.56, sd=0.02)
        put((_ellipsoid(p, wing, latent.radii(0.34, 0.26, 0.055), tilt_x=0.35 * side) < 1) & (radius < 1.0 - fat), BONE)
    for side, name in ((-1.0, "kidney_right"), (1.0, "kidney_left")):
        centre, radii = latent.centre(-0.20 + 0.03 * side, 0.27, side * 0.38, sd=0.025), latent.radii(0.23, 0.14, 0.13)
        hilum = _ellipsoid(p, centre + np.array([0.0, -0.02, -0.13 * side]), radii * np.array([0.4, 0.7, 0.7]), tilt_x=-0.25 * side)
        put((_ellipsoid(p, centre, radii, tilt_x=-0.25 * side) < 1) & (hilum > 1) & cavity, LABELS[name])

    pitch, start = rng.uniform(0.20, 0.24), rng.uniform(0, 1)
    level = (z / pitch + start) % 1.0  # 0-0.22 disc, then vertebral body
    trunk = _tube(p, curve, 0.0, 0.125, 0.15 * float(latent.radii(1, 1, 1, sd=0.05)[0]))
    waisted = trunk < np.where(level < 0.22, 1.0, 0.80 + 0.6 * (level - 0.61) ** 2)
    process = (np.abs(x) < 0.045) & (y > curve + 0.1) & (y < curve + 0.27) & (level > 0.35) & (level < 0.85)
    transverse = (np.abs(x) < 0.27) & (np.abs(y - curve - 0.14) < 0.035) & (level > 0.45) & (level < 0.75)
    put((waisted | process | transverse) & body, LABELS["spine"])
    put((trunk < 0.9) & (level < 0.22) & body, DISC)
    put((_tube(p, curve + 0.155, 0.0, 0.035, 0.05) < 1) & body, CORD)
    sway = 0.02 * np.sin(3.0 * z + rng.uniform(0, 6.28))
    thick = float(latent.radii(0.058, 1, 1)[0])
    put(_tube(p, curve - 0.20, 0.075 + sway, thick, thick) < 1, LABELS["aorta"])
    thick = float(latent.radii(0.058, 1, 1)[0])
    put((_tube(p, curve - 0.20, -0.085 + sway, 0.85 * thick, 1.15 * thick) < 1) & (z < 0.62), LABELS["vena_cava"])
    return tissues, body


def labels_of(tissues: np.ndarray) -> np.ndarray:
    """Label map of a tissue map, uint8: decoys become background, discs spine."""
    return np.asarray(_LABEL_OF[tissues])
