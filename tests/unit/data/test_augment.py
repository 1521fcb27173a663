"""Intensity augmentation."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from torch.nn.functional import interpolate

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import augment
from nnssl_ext.data.augment import NNUNET, Chance, Intensity, apply
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.spatial import MILD
from nnssl_ext.data.views import Crop
from tests.make_data import ArrayStore

X = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 24, 32)).astype(np.float32)) * 2 + 1
CERTAIN = Intensity(**{field.name: Chance(1.0, 0.75, 1.25) for field in fields(Intensity)})


def test_blur_equals_scipy_with_mirrored_edges():
    expected, sigmas = X.double().numpy(), (0.5, 0.8, 1.3)
    for axis, sigma in enumerate(sigmas):
        expected = gaussian_filter1d(expected, sigma, axis, mode="mirror", radius=math.ceil(4 * sigma))
    assert np.abs(augment.blur(X, *sigmas).numpy() - expected).max() < 1e-5
    assert augment.blur(X[:1, :2], 1.0, 1.0, 1.0).shape == (1, 2, 32)


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_low_resolution_equals_torch(share):
    small = interpolate(X[None, None], [round(n * share) for n in X.shape], mode="nearest-exact")
    assert (augment.low_resolution(X, share) - interpolate(small, X.shape, mode="trilinear")[0, 0]).abs().max() < 1e-5


def test_noise_has_its_standard_deviation_and_depends_on_its_seed_alone():
    added = augment.noise(X, 0.3, 5) - X
    assert abs(added.std() - 0.3) < 0.01 and abs(added.mean()) < 0.01
    torch.manual_seed(99)
    assert torch.equal(augment.noise(X, 0.3, 5) - X, added) and not torch.equal(augment.noise(X, 0.3, 6) - X, added)


def test_brightness_and_contrast_equal_their_formulas():
    x = X.double().numpy()
    assert np.abs(augment.brightness(X, 1.2).numpy() - x * 1.2).max() < 1e-5
    expected = np.clip((x - x.mean()) * 1.2 + x.mean(), x.min(), x.max())
    assert np.abs(augment.contrast(X, 1.2).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(("function", "sign"), [(augment.gamma, 1), (augment.gamma_inverted, -1)])
def test_gamma_keeps_mean_and_standard_deviation(function, sign):
    x = sign * X.double().numpy()
    curved = ((x - x.min()) / np.ptp(x)) ** 1.4
    expected = sign * ((curved - curved.mean()) / curved.std() * x.std() + x.mean())
    assert np.abs(function(X, 1.4).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("name", list(augment.OPERATIONS))
def test_a_constant_volume_stays_finite_and_the_input_is_not_changed(name):
    numbers = {"noise": (0.1, 3), "blur": (1.0, 1.0, 1.0)}.get(name, (0.8,))
    before = X.clone()
    augment.OPERATIONS[name](X, *numbers)
    assert torch.equal(X, before)
    assert augment.OPERATIONS[name](torch.full((4, 5, 6), 2.0), *numbers).isfinite().all()


def test_chances_and_strengths_of_the_preset():
    drawn = [NNUNET.draw(2, sample_rng(0, i)) for i in range(4000)]
    for field in fields(Intensity):
        chance = getattr(NNUNET, field.name)
        mine = [[step for step in steps if step[0] == field.name] for steps in drawn]
        assert abs(np.mean([len(steps) for steps in mine]) / 2 - chance.p * chance.channels) < 0.02
        values = [step[2][0] for steps in mine for step in steps]
        assert min(values) >= chance.low and max(values) <= chance.high
        if chance.low < 1 < chance.high:
            assert abs(np.mean(np.array(values) < 1) - 0.5) < 0.05


def test_the_number_of_threads_does_not_change_a_bit():
    image, steps = torch.randn((2, 64, 64, 64), generator=torch.Generator().manual_seed(0)), CERTAIN.draw(2, sample_rng(0, 0))
    assert len(steps) == 14
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(apply(image, steps))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_augmentation_left_to_the_device_is_that_of_the_loader():
    spec, store = Crop((12, 12, 12), MILD, CERTAIN), ArrayStore(channels=2)
    loaded, left = (StepDataset(store, spec, range(8), 0, 3, on_device=where)[4]["image"] for where in (False, True))
    assert not loaded.intensity and len(left.intensity) == 3 and not torch.equal(left.image, loaded.image)
    moved = left.to(torch.device("cpu"))
    assert torch.equal(moved.image, loaded.image) and not moved.intensity
