"""The anchor of a late training, and which tokens it is compared at."""

import pytest
import torch

from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.gram import TOKENS, GramAnchor, visible_tokens
from nnssl_ext.nn.losses import gram_loss
from tests.make_data import tiny_plan


@pytest.mark.parametrize(("tokens", "share", "count"), [(64, 0.6, 26), (10, 0.6, 4), (100, 0.29, 71), (2000, 0.6, TOKENS), (8, 1.0, 1), (8, 0.0, 8)])
def test_only_visible_tokens_are_compared_each_once_as_many_as_every_crop_has(tokens, share, count):
    hidden = round(share * tokens + 1e-9) if share < 1 else tokens - 1
    hidden = min(hidden, tokens - count)
    mask = torch.stack([torch.randperm(tokens) < n for n in (hidden, 0, hidden // 2)])
    index = visible_tokens(mask, share)
    assert index.shape == (3, count)
    assert not bool(mask.gather(1, index).any()) and all(len(set(row)) == count for row in index.tolist())


def test_tokens_are_drawn_evenly_and_by_torchs_generator():
    mask = torch.zeros(4000, 12, dtype=torch.bool)
    mask[:, 3] = True
    torch.manual_seed(0)
    index = visible_tokens(mask, 0.75)
    counts = index.flatten().bincount(minlength=12)
    assert counts[3] == 0 and bool(((counts[counts > 0] - 12000 / 11).abs() < 150).all())
    torch.manual_seed(0)
    assert torch.equal(visible_tokens(mask, 0.75), index)


def test_an_anchor_keeps_what_was_taken_sees_the_whole_crop_and_gives_no_gradient_to_itself():
    config = tiny_plan().configuration("3d_fullres")
    backbone, later = (build_backbone(config, "primus", 1).eval() for _ in range(2))
    anchor = GramAnchor(backbone)
    anchor.update(later, 0.0)
    assert all(torch.equal(value, later.state_dict()[name]) for name, value in anchor.net.state_dict().items())
    image, mask = torch.randn(2, 1, 16, 16, 16), torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    tokens = backbone.tokens(image, mask=mask.flatten(1), mask_token=torch.zeros(48))
    torch.manual_seed(3)
    loss = anchor.loss(tokens, image, mask, 0.5)
    torch.manual_seed(3)
    expected = gram_loss(tokens, later.tokens(image), visible_tokens(mask.flatten(1), 0.5))
    assert loss.item() == expected.item() > 0
    loss.backward()
    assert backbone.net.down_projection.proj.weight.grad is not None and all(p.grad is None for p in [*anchor.parameters(), *later.parameters()])
