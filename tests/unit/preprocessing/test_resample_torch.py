"""Resampling on a device equals the one on the processor."""

import numpy as np
import pytest
import torch

from nnssl_ext.preprocessing.resample import resample
from nnssl_ext.preprocessing.resample_torch import resample_on

CASES = [
    ((20, 30, 40), (31, 22, 40), (1, 1, 1), (0.7, 1.3, 1)),
    ((50, 40, 30), (20, 60, 45), (1, 1, 1), (2, 1, 1)),
    ((8, 40, 44), (20, 31, 50), (5, 1, 1), (2, 1, 1)),  # coarse z
    ((40, 9, 44), (33, 4, 50), (1, 6, 1), (1, 9, 1)),  # coarse y
    ((40, 33, 7), (33, 40, 13), (1, 1, 1), (1, 1, 4)),  # coarse x of the target
    ((12, 13, 14), (12, 13, 14), (1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("shape", "new", "spacing", "target"), CASES)
def test_a_device_gives_the_same_values(device, shape, new, spacing, target):
    data = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32) * 500
    found = resample_on(device, data, new, spacing, target)
    assert found.dtype == np.float32 and found.shape == (2, *new) and found.flags.c_contiguous
    assert np.abs(found - resample(data, new, spacing, target)).max() <= 1e-5 * np.ptp(data)


def test_the_callers_matmul_precision_is_left_as_it_was():
    torch.set_float32_matmul_precision("high")
    try:
        resample_on("cpu", np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32), (5, 5, 5), (1, 1, 1), (1, 1, 1))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
