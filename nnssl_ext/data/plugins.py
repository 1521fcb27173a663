"""Transforms of other libraries as part of a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.data.views import View, ViewSpec, of_batch
from nnssl_ext.preprocessing.store import CaseStore


@dataclass(frozen=True)
class Transformed:
    """The views of another specification after a transform in the form of batchgeneratorsv2.

    NumPy's and torch's global generators, from which such transforms draw, are seeded for each view and restored. Only
    intensities may change: a view's affine wouldn't follow a spatial transform. (batchgeneratorsv2's blur with
    ``benchmark=True`` chooses its algorithm by the clock; switch that off for reproducible batches.)

    Args:
        spec: whose views are transformed.
        transform: ``transform(image=(C, z, y, x) tensor)`` -> dictionary with the new "image".

    Raises:
        UserError: the transform changed the image's shape.
    """

    spec: ViewSpec
    transform: Callable[..., dict[str, Any]]

    def of_batch(self, count: int, rng: np.random.Generator) -> list[Transformed]:
        return [replace(self, spec=spec) for spec in of_batch(self.spec, count, rng)]

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        return {name: replace(view, image=self._image(view.image, int(rng.integers(0, 2**32)))) for name, view in self.spec.sample(store, case, rng).items()}

    def _image(self, image: np.ndarray, seed: int) -> np.ndarray:
        state = np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[]):
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
                changed: np.ndarray = self.transform(image=torch.from_numpy(image.copy()))["image"].numpy()
        finally:
            np.random.set_state(state)  # noqa: NPY002
        if changed.shape != image.shape:
            raise UserError(f"a transform changed the shape {image.shape} to {changed.shape}", str(self.transform), "use transforms of intensities only")
        return np.ascontiguousarray(changed, np.float32)
