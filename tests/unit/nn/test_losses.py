"""Losses against plain loops."""

import pytest
import torch

from nnssl_ext.nn.losses import masked_mse


@pytest.mark.parametrize("channels", [1, 4])
def test_masked_mse_equals_the_plain_loop(channels):
    prediction, target = torch.randn(2, 2, channels, 3, 4, 5, dtype=torch.float64)
    hidden = torch.rand(2, 1, 3, 4, 5) < 0.6
    squares = [
        (prediction[b, c, z, y, x] - target[b, c, z, y, x]) ** 2
        for b in range(2) for c in range(channels) for z in range(3) for y in range(4) for x in range(5) if hidden[b, 0, z, y, x]
    ]  # fmt: skip
    assert masked_mse(prediction, target, hidden).item() == pytest.approx((sum(squares) / len(squares)).item(), rel=1e-12)


def test_visible_outputs_get_no_gradient_even_when_they_are_not_finite():
    prediction = torch.randn(1, 2, 4, 4, 4)
    hidden = torch.rand(1, 1, 4, 4, 4) < 0.5
    prediction = torch.where(hidden, prediction, torch.nan).requires_grad_()
    loss = masked_mse(prediction, torch.zeros(1, 2, 4, 4, 4), hidden)
    loss.backward()
    assert torch.isfinite(loss)
    assert bool((prediction.grad[~hidden.expand_as(prediction)] == 0).all())
    assert bool((prediction.grad[hidden.expand_as(prediction)] != 0).all())


def test_half_precision_is_accumulated_in_single_precision():
    prediction, target = torch.full((1, 1, 64, 64, 64), 300.0, dtype=torch.float16), torch.zeros(1, 1, 64, 64, 64, dtype=torch.float16)
    assert masked_mse(prediction, target, torch.ones(1, 1, 64, 64, 64, dtype=torch.bool)).item() == pytest.approx(90000.0)
