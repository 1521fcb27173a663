"""One place of a visit in every modality, most of it hidden."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from nnssl_ext.data.masking import block_grid
from nnssl_ext.data.sessions import SHARED, Sessions, affine_between, inside
from nnssl_ext.data.views import Crop, View, read_crops
from nnssl_ext.preprocessing.store import CaseStore


def dirichlet_split(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Whole numbers that sum to `total`, in shares that are uniform over all there are; each is `total / parts` on average.

    Source: Bachmann et al. 2022, arXiv:2204.01678, section 3.3 (concentration 1).
    """
    shares = rng.dirichlet(np.ones(parts))
    ends = np.floor(np.cumsum(shares) * total + rng.random()).astype(int)  # one random offset for all: no mean moves
    ends[-1] = total
    return np.diff(ends, prepend=0).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MaskedVisit:
    """One random crop of a case and the same place of the world in its visit's other modalities, one view (1, z, y, x) each, by the modality's name.

    `visible` tokens of all views together are visible. A modality that the visit lacks, or of which less than half of the
    crop is inside the image, has a view with nothing but background, all of it hidden, whose `case` is the crop's own one:
    it doesn't show that modality.

    Args:
        crop: where it comes from.
        sessions: of the store's cases.
        modalities: names of the views.
        token: voxels of a cell of the masks, (z, y, x).
        visible: tokens, fewer than a view has.
    """

    crop: Crop
    sessions: Sessions
    modalities: tuple[str, ...]
    token: tuple[int, ...]
    visible: int

    def sample(self, store: CaseStore, case: int, rng: np.random.Generator) -> dict[str, View]:
        own = self.crop.sample(store, case, rng)["image"]
        found = {name: self._view(store, case, own, name, rng) for name in self.modalities}
        shown = [name for name, view in found.items() if view is not None]
        counts = dict(zip(shown, dirichlet_split(self.visible, len(shown), rng)))
        grid, views = block_grid(self.crop.patch_size, self.token), {}
        for name, view in found.items():
            hidden = np.ones(math.prod(grid), bool)
            hidden[rng.permutation(hidden.size)[: counts.get(name, 0)]] = False
            views[name] = replace(view or self._missing(store, case, own), mask=hidden.reshape(grid))
        return views

    def _view(self, store: CaseStore, case: int, own: View, name: str, rng: np.random.Generator) -> View | None:
        """One modality's crop; None without one."""
        images, size, geometries = self.sessions.images(case).get(name, []), self.crop.patch_size, self.sessions.geometries
        if not images:
            return None
        image = images[int(rng.integers(len(images)))]
        channels = slice(image.channel, image.channel + 1)
        if image.case == case:
            return replace(own, image=own.image[channels])
        affine = affine_between(own.affine, size, geometries[case], geometries[image.case])
        if inside(affine, size, store.shape(image.case)) < SHARED:
            return None
        return View(read_crops(store, image.case, [affine], [size])[0][channels], affine, case=image.case)

    @staticmethod
    def _missing(store: CaseStore, case: int, own: View) -> View:
        return View(np.full_like(own.image[:1], store.fill(case)[0]), own.affine)
