"""Crops beside their corrupted versions."""

import pickle
from functools import partial

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.corrupt import drop_holes
from nnssl_ext.data.corrupted import CorruptedCrop
from nnssl_ext.data.spatial import MILD
from nnssl_ext.data.views import Crop
from tests.make_data import ArrayStore

CROP = Crop((16, 24, 8), MILD)


@pytest.mark.parametrize(("versions", "names"), [(1, ["image"]), (2, ["image_0", "image_1"])])
def test_the_target_is_the_crop_bit_for_bit_and_every_version_has_its_affine(versions, names):
    store = ArrayStore(channels=2)
    for i in range(10):
        plain = CROP.sample(store, 0, sample_rng(0, i))["image"]
        views = CorruptedCrop(CROP, drop_holes, versions).sample(store, 0, sample_rng(0, i))
        assert list(views) == ["target", *names]  # features are pictured of the first view
        assert np.array_equal(views["target"].image, plain.image)
        for view in views.values():
            assert np.array_equal(view.affine, plain.affine)
        assert all(not np.array_equal(views[name].image, plain.image) for name in names)


def test_several_versions_are_corrupted_differently():
    views = CorruptedCrop(CROP, drop_holes, 2).sample(ArrayStore(), 0, sample_rng(0, 0))
    assert not np.array_equal(views["image_0"].image, views["image_1"].image)


def test_a_corruption_with_settings_can_be_sent_to_loader_processes():
    spec = CorruptedCrop(CROP, partial(drop_holes, holes=2))
    sent = pickle.loads(pickle.dumps(spec))
    first, second = (s.sample(ArrayStore(), 1, sample_rng(1, 0))["image"].image for s in (spec, sent))
    assert np.array_equal(first, second)
