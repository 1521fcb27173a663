"""Zero-shot registration: the displacement under which the features of two images are alike; nothing is trained.

A displacement is (3, z, y, x) in voxels: what is seen at voxel p of the fixed image is at p + u(p) in the moving one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.control_grids import ControlGrids, LegacyGrids
from nnssl_ext.evaluation.coupled_convex import convex_registration
from nnssl_ext.evaluation.features import FeatureMap, PrincipalComponents
from nnssl_ext.evaluation.instance_optimisation import optimise
from nnssl_ext.nn.precision import wide

COMPONENTS = 12  # as many as MIND-SSC has channels
SAMPLES = 8192  # cells of an image, at most, that principal components are fitted to


@dataclass(frozen=True)
class Settings:
    """How features are registered.

    Args:
        step: voxels per cell of the convex optimisation.
        reach: of its candidates, cells: displacements of up to reach * step voxels are found.
        scale: what features are multiplied by; against the regularisation it decides how stiff the displacement is.
        adam_step: voxels per control point of the instance optimisation.
        iterations: of it; 0 leaves it out.
        lr: of Adam, in control points.
        regularisation: weight of the diffusion.
        window, passes: of the means that smooth control points.
        legacy: use the convention of ConvexAdam's public code, which shortens translations.
    """

    step: int = 6
    reach: int = 4
    scale: float = 1.0
    adam_step: int = 2
    iterations: int = 80
    lr: float = 1.0
    regularisation: float = 1.25
    window: int = 3
    passes: int = 3
    legacy: bool = False


PRESETS = {
    "mind_default": Settings(),  # ConvexAdam's own, for MIND-SSC
    "dinoreg": Settings(iterations=1000, lr=3.0, regularisation=2.0, window=7, passes=5),  # Song et al. 2024, DINO-Reg, arXiv:2402.15687
    "medssl": Settings(reach=1, scale=0.1, adam_step=4, iterations=1000, lr=0.2, regularisation=0.09),
}


def register_features(fixed: Tensor, moving: Tensor, settings: Settings = PRESETS["mind_default"]) -> Tensor:
    """The displacement (3, z, y, x), in voxels, that makes the features of the moving image like those of the fixed one.

    Convex coupled optimisation between cells, consistent in both directions, then Adam. Differences of features count as if there were twelve channels,
    however many there are. Everything is computed in fp32 (fp64 for fp64); the same input gives the same bits on a CPU.

    Args:
        fixed, moving: features (C, z, y, x) at the voxels of one grid.
        settings: see `Settings`.

    Raises:
        UserError: the two differ in shape, or an axis is shorter than two cells.
    """
    if fixed.shape != moving.shape:
        raise UserError(f"the features differ in shape: {list(fixed.shape)} and {list(moving.shape)}", "registration", "bring both onto one grid")
    shape, coarsest = fixed.shape[1:], max(settings.step, settings.adam_step)
    if min(shape) < 2 * coarsest:
        what = f"an image of {'x'.join(map(str, shape))} voxels is smaller than two cells of {coarsest} voxels"
        raise UserError(what, "registration", "register at a finer spacing")
    grids = LegacyGrids() if settings.legacy else ControlGrids()
    scale = settings.scale * (COMPONENTS / len(fixed)) ** 0.5
    with torch.no_grad():
        a, b = (wide(features)[None] * scale for features in (fixed, moving))
        coarse = convex_registration(grids.pool(a, settings.step), grids.pool(b, settings.step), settings.reach, grids)
        displacement = grids.enlarge(coarse, settings.step, shape)
        if settings.iterations:
            start, step = grids.reduce(displacement, settings.adam_step), settings.adam_step
            how = settings.iterations, settings.lr, settings.regularisation, settings.window, settings.passes
            displacement = grids.enlarge(optimise(grids.pool(a, step), grids.pool(b, step), start, grids, *how), step, shape)
    return displacement[0]


def common_components(maps: Sequence[FeatureMap], foreground: Sequence[np.ndarray], count: int = COMPONENTS) -> list[FeatureMap]:
    """The first principal components of the features of all images together, each with mean 0 and standard deviation 1 over the foreground.

    Args:
        maps: of the images.
        foreground: which cells count, bool (d, h, w) of each map; all where there is none.
        count: of the components; fewer where there are fewer features.

    Raises:
        UserError: fewer foreground cells than components, or features that are the same everywhere.
    """
    samples = []
    for number, (found, inside) in enumerate(zip(maps, foreground)):
        cells = np.flatnonzero(inside if inside.any() else np.ones_like(inside))
        chosen = np.sort(sample_rng(0, number, "registration cells").permutation(cells)[:SAMPLES])
        samples.append(found.values.reshape(len(found.values), -1)[:, chosen].T)
    together = np.concatenate(samples)
    fitted = PrincipalComponents.fit(together, min(count, together.shape[1]))
    alive = int((fitted.explained > 1e-9).sum())  # what follows is rounding
    if not alive:
        raise UserError("the features are the same everywhere", "registration", "look at the images, or use another checkpoint")
    fitted = PrincipalComponents(fitted.mean, fitted.directions[:, :alive], fitted.explained[:alive])
    deviation = ((together - fitted.mean) @ fitted.directions).std(0)
    return [replace(found, values=fitted.project(found.values) / deviation.astype(np.float32)[:, None, None, None]) for found in maps]
