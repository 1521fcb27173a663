"""The Primus that nnU-Net plans name."""

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnssl_ext.finetuning.networks import FULL_RESOLUTION_STRIDES, PlannedPrimus, PlannedPrimusV2

KWARGS = {"embed_dim": 48, "eva_depth": 1, "eva_numheads": 2, "patch_embed_size": (8, 8, 8), "input_shape": (16, 16, 16)}
pytestmark = pytest.mark.nnunet


BOTH = pytest.mark.parametrize(("planned", "library"), [(PlannedPrimus, Primus), (PlannedPrimusV2, PrimusV2)])


@BOTH
def test_the_state_dict_has_the_names_and_shapes_of_the_library(planned, library):
    own, expected = planned(2, 3, **KWARGS).state_dict(), library(input_channels=2, num_classes=3, **KWARGS).state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in expected.items()}


@BOTH
def test_deep_supervision_gives_one_output_for_every_scale_that_nnunet_derives(planned, library):
    scales = list(1 / np.cumprod(np.vstack(FULL_RESOLUTION_STRIDES), axis=0))[:-1]
    network = planned(1, 2, deep_supervision=True, **KWARGS).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    outputs = network(image)
    assert len(outputs) == len(scales) and all(output.shape == (1, 2, 16, 16, 16) for output in outputs)
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), outputs[0])


def test_the_loss_of_nnunet_is_finite_with_these_scales():
    weights = np.array([1 / 2**i for i in range(len(FULL_RESOLUTION_STRIDES) - 1)])
    weights[-1] = 0  # as nnUNetTrainer._build_loss does; with one scale the sum below is 0
    loss = DeepSupervisionWrapper(torch.nn.MSELoss(), weights / weights.sum())
    output = PlannedPrimus(1, 2, deep_supervision=True, **KWARGS)(torch.randn(1, 1, 16, 16, 16))
    assert torch.isfinite(loss(output, [torch.zeros_like(o) for o in output]))
