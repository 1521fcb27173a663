"""Transforms of batchgeneratorsv2 in a view."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.noise.sharpen import SharpeningTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import Chance, Intensity, apply
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.masking import MaskedMultiCrop
from nnssl_ext.data.plugins import Transformed
from nnssl_ext.data.views import Crop, MultiCrop
from tests.make_data import ArrayStore

SPEC = Transformed(Crop((8, 8, 8)), GaussianNoiseTransform((0.1, 0.5)))


def test_a_transform_is_a_pure_function_of_seed_and_index_and_leaves_the_global_generators_alone():
    store = ArrayStore()
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = np.random.random(), torch.rand(1)  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    first, again, other = (SPEC.sample(store, 0, sample_rng(0, n))["image"].image for n in (3, 3, 4))
    assert (np.random.random(), torch.rand(1)) == expected  # noqa: NPY002
    plain = Crop((8, 8, 8)).sample(store, 0, sample_rng(0, 3))["image"].image
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 0.05 < (first - plain).std() < 0.55


def test_a_transform_that_changes_the_shape_is_refused():
    spec = Transformed(Crop((8, 8, 8)), lambda image: {"image": image[:, 1:]})
    with pytest.raises(UserError, match="changed the shape"):
        spec.sample(ArrayStore(), 0, sample_rng(0, 0))


@pytest.mark.parametrize(
    "transform",
    [
        GaussianBlurTransform((0.5, 1.0)),
        GammaTransform((0.7, 1.5), p_invert_image=0.5, synchronize_channels=False, p_per_channel=1, p_retain_stats=1),
        SimulateLowResolutionTransform((0.5, 0.8), False, True, None),
        RandomTransform(SharpeningTransform((0.5, 1.0)), 0.99),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_transforms_come_before_the_drawn_intensities_and_batches_are_pure_functions_of_the_step(transform):
    store, crop = ArrayStore(channels=2), Crop((12, 12, 12), intensity=Intensity(brightness=Chance(1.0, 2.0, 3.0)))
    first, again = (StepDataset(store, Transformed(crop, transform), range(8), 0, 2)[3]["image"].image for _ in range(2))
    assert torch.equal(first, again)
    plain, left = (StepDataset(store, spec, range(8), 0, 2, on_device=True)[3]["image"] for spec in (crop, Transformed(crop, transform)))
    assert (left.image != plain.image).any() and left.intensity == plain.intensity
    for sample, steps in zip(left.image, left.intensity):
        apply(sample, steps)
    assert torch.equal(left.image, first)


def test_what_the_samples_of_a_batch_share_reaches_the_specification_within():
    spec = MaskedMultiCrop(MultiCrop((8, 8, 8), (4, 4, 4), 1), (2, 2, 2))
    plain, changed = (StepDataset(ArrayStore(), one, range(8), 0, 3)[0] for one in (spec, Transformed(spec, GaussianNoiseTransform((0.1, 0.5)))))
    for name in ("global_0", "global_1"):
        assert torch.equal(plain[name].mask, changed[name].mask) and not torch.equal(plain[name].image, changed[name].image)
