"""The compiled intensity operations."""

import math

import numpy as np
import pytest
import torch
from numba import TypingError
from scipy.ndimage import gaussian_filter1d
from scipy.stats import kstest
from torch.nn.functional import interpolate

from nnssl_ext.data import intensity_cpu

X = np.random.default_rng(0).standard_normal((16, 24, 33)).astype(np.float32) * 2 + 1


def changed(name: str, x: np.ndarray, *numbers: float) -> np.ndarray:
    x = x.copy()
    intensity_cpu.OPERATIONS[name](x, *numbers)
    return x


def split_mix(seed: int, number: int) -> int:
    """Output `number` (from 1) of SplitMix64."""
    state = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_blur_equals_scipy_with_mirrored_edges():
    expected, sigmas = X.astype(float), (0.5, 0.8, 1.3)
    for axis, sigma in enumerate(sigmas):
        expected = gaussian_filter1d(expected, sigma, axis, mode="mirror", radius=math.ceil(4 * sigma))
    assert np.abs(changed("blur", X, *sigmas) - expected).max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 2, 33), (3, 1, 1), (2, 40, 70)])
def test_blur_of_a_volume_smaller_than_its_kernel_keeps_a_constant(shape):
    assert np.abs(changed("blur", np.full(shape, 2.0, np.float32), 2.0, 3.0, 1.0) - 2).max() < 1e-6
    assert np.isfinite(changed("blur", X[: shape[0], : shape[1], : shape[2]], 2.0, 3.0, 1.0)).all()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.75, 1.0])
def test_low_resolution_equals_torch(share):
    small = interpolate(torch.from_numpy(X)[None, None], [max(1, round(n * share)) for n in X.shape], mode="nearest-exact")
    assert np.abs(changed("low_resolution", X, share) - interpolate(small, X.shape, mode="trilinear")[0, 0].numpy()).max() < 1e-5


def test_noise_is_box_and_mullers_of_split_mix():
    assert [split_mix(1234567, number) for number in (1, 2, 3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published values
    for x in (X[:3, :5, :7], X[:2, :5, :7]):
        expected, half, seed = np.zeros(x.size), (x.size + 1) // 2, 2**62 + 5
        for i in range(half):
            state = split_mix(seed, i + 1)
            radius = 0.3 * math.sqrt(-2 * math.log(((state >> 40) + 1) / 2**24)) * (-1) ** (state >> 24 & 1)
            angle = math.pi * (state % 2**24 - 2**23) / 2**24
            expected[i::half] = [radius * math.cos(angle), radius * math.sin(angle)][: len(expected[i::half])]
        assert np.abs(changed("noise", x, 0.3, seed) - x - expected.reshape(x.shape)).max() < 1e-5


def test_noise_is_normal_white_and_of_its_seed_alone():
    zero = np.zeros((40, 50, 61), np.float32)
    added = changed("noise", zero, 0.3, 5)
    assert kstest(added.ravel(), "norm", (0, 0.3)).pvalue > 0.01
    power = np.abs(np.fft.fftn(added / 0.3)) ** 2 / added.size
    assert np.abs([power[:20].mean() - 1, power[:, :25].mean() - 1, power[..., :30].mean() - 1]).max() < 0.03
    assert np.array_equal(changed("noise", zero, 0.3, 5), added)
    assert abs(np.corrcoef(changed("noise", zero, 0.3, 6).ravel(), added.ravel())[0, 1]) < 0.02


def test_brightness_and_contrast_equal_their_formulas():
    x = X.astype(float)
    assert np.abs(changed("brightness", X, 1.2) - x * 1.2).max() < 1e-5
    expected = np.clip((x - x.mean()) * 1.2 + x.mean(), x.min(), x.max())
    assert np.abs(changed("contrast", X, 1.2) - expected).max() < 1e-5


@pytest.mark.parametrize(("name", "sign"), [("gamma", 1), ("gamma_inverted", -1)])
@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5, 4.0])
def test_gamma_keeps_mean_and_standard_deviation(name, sign, exponent):
    x = sign * X.astype(float)
    curved = ((x - x.min()) / np.ptp(x)) ** exponent
    expected = sign * ((curved - curved.mean()) / curved.std() * x.std() + x.mean())
    assert np.abs(changed(name, X, exponent) - expected).max() < 2e-5


def test_gamma_of_a_volume_with_one_bright_voxel_keeps_its_standard_deviation():
    x = (X * 1e-3 + 5).astype(np.float32)
    x[3, 4, 5] = 2000
    assert abs(changed("gamma", x, 0.7).std(dtype=float) / x.std(dtype=float) - 1) < 1e-3


@pytest.mark.parametrize("name", list(intensity_cpu.OPERATIONS))
def test_a_constant_volume_stays_finite(name):
    numbers = {"noise": (0.1, 3), "blur": (1.0, 1.0, 1.0)}.get(name, (0.8,))
    assert np.isfinite(changed(name, np.full((4, 5, 6), 2.0, np.float32), *numbers)).all()


@pytest.mark.parametrize("name", list(intensity_cpu.OPERATIONS))
def test_a_volume_with_gaps_in_memory_is_changed_too_or_refused(name):
    numbers = {"noise": (0.1, 3), "blur": (1.0, 1.0, 1.0)}.get(name, (0.8,))
    gaps = X.repeat(2, axis=2)[..., ::2]
    try:
        intensity_cpu.OPERATIONS[name](gaps, *numbers)
    except TypingError:
        return
    assert np.array_equal(gaps, changed(name, X, *numbers))
