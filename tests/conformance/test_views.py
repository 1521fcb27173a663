"""Views: where a voxel of a view lies in its case."""

from dataclasses import replace

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from tests.conformance.pairs import PAIRS
from tests.make_data import TINY_SHAPE, ArrayStore

CORRUPTED = {  # views with changed intensities, by method
    "GVSLTrainer": {"image"},
    "ModelsGenesisTrainer": {"image"},
    "PixelClusterTrainer": {"first_labels", "second_labels"},
    "PCRLv2Trainer": {"global_0", "global_1"},
    "RegistrationPretextTrainer": {"fixed", "displacement"},
    "VolumeFusionTrainer": {"label"},
    **{name: {"image_0", "image_1"} for name in ("ReconContrastTrainer", "SwinUNETRPretrainTrainer")},
    **{name: {"b"} for name in ("ToyEMATrainer", "ToyPredictorTrainer", "ToyQueueTrainer", "ToyCentreTrainer")},
}
SHOWN = {"MultiMAETrainer": {"CT": [0], "MR": [1], "PET": [2]}}  # channels of a view that doesn't show all, by method
TOLERANCE = 1e-3  # voxels


class CoordinateStore(ArrayStore):
    """Cases whose three channels hold the (z, y, x) of their voxels."""

    def __init__(self) -> None:
        super().__init__(8, TINY_SHAPE, channels=3)
        self.arrays = [np.stack(np.meshgrid(*map(np.arange, TINY_SHAPE), indexing="ij")).astype(np.float32) for _ in self.arrays]


def off(view, channels=(0, 1, 2)):
    """Largest distance in voxels between where a voxel is and where the affine says, along the axes that the view shows; over the voxels inside the case."""
    grid = np.stack(np.meshgrid(*map(np.arange, view.image.shape[1:]), indexing="ij")).astype(float)
    expected = np.einsum("ij,j...->i...", view.affine[:, :3], grid) + view.affine[:, 3].reshape(3, 1, 1, 1)
    inside = np.all([(place >= 0) & (place <= size - 1) for place, size in zip(expected, TINY_SHAPE)], axis=0)
    assert inside.any()
    return float(np.linalg.norm(view.image - expected[list(channels)], axis=0)[inside].max())


def samples(pair, folder):
    store = CoordinateStore()
    spec = pair.trainer(folder, channels=3, store=store).views()
    for case in range(len(store)):
        yield from (item for item in spec.sample(store, case, sample_rng(1, case)).items() if item[0] not in CORRUPTED.get(pair.method, ()))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_affine_says_where_every_voxel_comes_from(pair, tmp_path):
    seen = list(samples(pair, tmp_path))
    assert seen
    for name, view in seen:
        assert off(view, SHOWN.get(pair.method, {}).get(name, (0, 1, 2))) <= TOLERANCE, name


@pytest.mark.parametrize("pair", PAIRS[:1], ids=str)
def test_an_affine_that_is_off_by_a_hundredth_of_a_voxel_is_found(pair, tmp_path):
    for _, view in samples(pair, tmp_path):
        assert off(replace(view, affine=view.affine + 0.01)) > TOLERANCE


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_views_are_finite_float32_and_a_function_of_seed_and_sample_alone(pair, tmp_path):
    trainer = pair.trainer(tmp_path)
    spec = trainer.views()
    once, again = (spec.sample(trainer.store, 2, sample_rng(0, 5)) for _ in range(2))
    other = spec.sample(trainer.store, 2, sample_rng(0, 6))
    for name, view in once.items():
        assert view.image.dtype == np.float32 and view.image.ndim == 4 and np.isfinite(view.image).all()
        assert view.mask is None or view.mask.dtype == bool
        for part in ("image", "affine", "mask"):
            assert np.array_equal(getattr(view, part), getattr(again[name], part)), (name, part)
        assert view.intensity == again[name].intensity
    assert any(not np.array_equal(view.image, other[name].image) for name, view in once.items())
