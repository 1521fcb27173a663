"""Perceptrons: their layers, and batch normalisation against its formula."""

import pytest
import torch
from torch import nn

from nnssl_ext.nn.projector import BatchNorm, Standardize, normalized_mlp


def test_layers_are_those_of_the_source():
    kinds = [type(layer) for layer in normalized_mlp((3, 4, 4, 5), last=True)]
    assert kinds == [nn.Linear, BatchNorm, nn.ReLU] * 2 + [nn.Linear, BatchNorm]
    projector, predictor = normalized_mlp((3, 4, 5), last=True), normalized_mlp((5, 2, 5), last=False)
    assert projector[-1].weight is None and projector[0].bias is None and projector[-2].bias is None
    assert [type(layer) for layer in predictor] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear] and predictor[-1].bias is not None


def test_batch_normalisation_is_that_of_its_formula_while_training_and_by_running_moments_afterwards():
    torch.manual_seed(0)
    norm, x = BatchNorm(3).double(), 2 * torch.randn(6, 3, dtype=torch.float64) + 1
    y = norm(x)
    for channel in range(3):
        values = x[:, channel].tolist()
        mean = sum(values) / 6
        variance = sum((value - mean) ** 2 for value in values) / 6
        assert y[:, channel].tolist() == pytest.approx([(value - mean) / (variance + 1e-5) ** 0.5 for value in values], rel=1e-9)
        assert norm.running_mean[channel].item() == pytest.approx(0.1 * mean)
        assert norm.running_var[channel].item() == pytest.approx(0.9 + 0.1 * variance * 6 / 5)
    expected = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(norm.eval()(x), expected)


def test_standardised_vectors_are_those_of_the_formula_while_training_and_afterwards():
    torch.manual_seed(0)
    norm, x = Standardize(), 2 * torch.randn(6, 3, dtype=torch.float64) + 1
    expected = [[(v - sum(column) / 6) / (sum((w - sum(column) / 6) ** 2 for w in column) / 6 + 1e-5) ** 0.5 for v in column] for column in x.T.tolist()]
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x).T.tolist(), expected)
    assert not norm.state_dict() and bool((norm(torch.ones(1, 3)) == 0).all())


def test_it_is_in_single_precision_under_autocast_and_finite_for_equal_vectors():
    norm = BatchNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(5, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert norm(torch.full((5, 4), 7.0)).abs().max() < 1e-3


def test_one_vector_alone_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm(4)(torch.ones(1, 4))
