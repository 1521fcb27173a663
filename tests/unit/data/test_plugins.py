"""Transforms of batchgeneratorsv2 in a view."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.plugins import Transformed
from nnssl_ext.data.views import Crop
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
