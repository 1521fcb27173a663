"""Drop path by leaving samples out: the library's numbers and gradients, for fewer samples computed."""

import copy

import pytest
import torch

from nnssl_ext.nn.backbones.base import build_backbone
from tests.make_data import tiny_plan


def backbones(rate):
    """Ours, and the same one with the library's blocks; double precision."""
    torch.manual_seed(0)
    ours = build_backbone(tiny_plan().configuration("3d_fullres"), "primus", 1).double().train()
    for block in ours.net.eva.blocks:
        for path in ("drop_path1", "drop_path2"):
            setattr(block, path, type(ours.net.eva.blocks[-1].drop_path1)(rate))
    theirs = copy.deepcopy(ours)
    for block in theirs.net.eva.blocks:
        del block.forward
    return ours, theirs


def run(backbone, seed, keep):
    torch.manual_seed(1)
    image = torch.randn(4, 1, 16, 16, 16, dtype=torch.float64)
    torch.manual_seed(seed)
    backbone.zero_grad()
    result = backbone.tokens(image, keep=torch.rand(4, 64).argsort(1)[:, :20] if keep else None)
    result.square().sum().backward()
    return result.detach(), {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}, torch.get_rng_state()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.95])
def test_features_gradients_and_random_numbers_are_the_librarys(rate, keep):
    ours, theirs = backbones(rate)
    for seed in range(6):
        (mine, gradients, state), (expected, others, reference) = run(ours, seed, keep), run(theirs, seed, keep)
        assert torch.allclose(mine, expected, rtol=1e-10, atol=1e-12) and torch.equal(state, reference)
        assert gradients.keys() == others.keys()  # also where all samples are dropped: a parameter without gradient would stall other ranks
        assert all(torch.allclose(gradients[name], others[name], rtol=1e-8, atol=1e-10) for name in others)


def test_dropped_samples_are_not_computed():
    ours, _ = backbones(0.5)
    seen = []
    for block in ours.net.eva.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for seed in range(20):
        run(ours, seed, True)
    assert min(seen) == 1 and 1.5 < sum(seen) / len(seen) < 2.6


def test_in_evaluation_and_in_copies_nothing_is_dropped():
    ours, theirs = backbones(0.9)
    image = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    duplicate = copy.deepcopy(ours).eval()
    assert torch.equal(duplicate.tokens(image), theirs.eval().tokens(image)) and torch.equal(ours.eval().tokens(image), theirs.tokens(image))
    with torch.no_grad():
        duplicate.net.eva.blocks[0].gamma_1.zero_()  # the copy's blocks are its own
    assert not torch.equal(duplicate.tokens(image), ours.tokens(image))
