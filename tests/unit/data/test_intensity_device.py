"""The intensity operations in torch."""

import numpy as np
import pytest
import torch

from nnssl_ext.data import intensity_cpu, intensity_device

NUMBERS = {
    "noise": (0.4, 2**63 - 2),
    "blur": (0.5, 1.0, 0.8),
    "brightness": (1.2,),
    "contrast": (1.25,),
    "low_resolution": (0.6,),
    "gamma": (0.7,),
    "gamma_inverted": (1.5,),
}


def test_both_files_hold_the_same_operations():
    assert list(intensity_device.OPERATIONS) == list(intensity_cpu.OPERATIONS) == list(NUMBERS)


@pytest.mark.parametrize("name", list(NUMBERS))
@pytest.mark.parametrize("shape", [(16, 24, 33), (3, 5, 7), (1, 2, 9)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_operation_equals_the_compiled_one(name, shape, device):
    expected = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 2 + 1
    x = torch.tensor(expected, device=device)
    intensity_cpu.OPERATIONS[name](expected, *NUMBERS[name])
    intensity_device.OPERATIONS[name](x, *NUMBERS[name])
    assert np.abs(x.cpu().numpy() - expected).max() < 2e-5
