"""Several modalities in one transformer: which stem, which place, which gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.core.plan import NetworkPlan
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.multimodal import MultiModalTransformer, hidden_error, normalised_patches, patches
from nnssl_ext.nn.tokens import patchify
from tests.make_data import tiny_plan

PATCH, GRID, N = (8, 12, 16), (2, 3, 4), 24


def backbone_of(channels=1, **kwargs):
    config = tiny_plan(channels, PATCH).configuration("3d_fullres")
    network = config.networks["primus"]
    config.networks["primus"] = NetworkPlan(network.size, network.class_name, {**network.kwargs, **kwargs}, network.imports, 2, 0.001)
    torch.manual_seed(0)
    return build_backbone(config, "primus", channels)


def model_of(channels=1, modalities=2):
    model = MultiModalTransformer(backbone_of(channels), modalities, 1, 48).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def a_batch(modalities=2, visible=9, samples=2):
    torch.manual_seed(1)
    hidden = torch.ones(samples, modalities * N, dtype=torch.bool)
    for row in hidden:
        row[torch.randperm(modalities * N)[:visible]] = False
    return torch.randn(samples, modalities, *PATCH), hidden.view(samples, modalities, N)


def voxels_of(hidden):
    """(B, M, N) as voxels (B, M, z, y, x), place by place."""
    found = torch.zeros(*hidden.shape[:2], *PATCH, dtype=torch.bool)
    for b, m, n in hidden.nonzero().tolist():
        z, y, x = np.unravel_index(n, GRID)
        found[b, m, 4 * z : 4 * z + 4, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = True
    return found


def test_patches_are_those_of_each_modality_by_itself_and_normalised_by_itself():
    image, _ = a_batch(3)
    for m in range(3):
        own = patchify(image[:, [m]], (4, 4, 4))
        assert torch.equal(patches(image, (4, 4, 4))[:, m], own)
        expected = (own - own.mean(2, keepdim=True)) / (own.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(normalised_patches(image, GRID, (4, 4, 4))[:, m], expected, atol=1e-5)


def test_the_error_is_the_mean_over_hidden_tokens_of_each_sample_and_modality():
    prediction, target = torch.randn(2, 3, N, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, N, 5, dtype=torch.float64)
    hidden = torch.rand(2, 3, N) < 0.5
    found = hidden_error(prediction, target, hidden)
    for b in range(2):
        for m in range(3):
            terms = [(prediction[b, m, n, p] - target[b, m, n, p]).item() ** 2 for n in range(N) if hidden[b, m, n] for p in range(5)]
            assert found[b, m].item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    found.sum().backward()
    assert not prediction.grad[~hidden].any() and prediction.grad[hidden].all()


def test_what_is_not_finite_in_visible_tokens_of_the_target_does_not_matter():
    prediction, hidden = torch.zeros(1, 1, N, 5, requires_grad=True), torch.arange(N)[None, None] < 6
    target = torch.ones(1, 1, N, 5).masked_fill(~hidden[..., None], float("nan"))
    hidden_error(prediction, target, hidden).sum().backward()
    assert torch.isfinite(prediction.grad).all() and prediction.grad[0, 0, :6].all()


@pytest.mark.parametrize(("channels", "modalities"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_a_token_is_embedded_by_the_stem_of_its_modality(channels, modalities):
    model = model_of(channels, modalities)
    values, modality = torch.randn(2, 7, 64), torch.randint(modalities, (2, 7))
    found, projection = model.embed(values, modality), model.backbone.net.down_projection.proj
    for b in range(2):
        for k in range(7):
            m = int(modality[b, k])
            if m < channels:
                expected = channels**0.5 * projection.weight[:, m].flatten(1) @ values[b, k] + projection.bias + (0 if channels == 1 else model.offsets[m])
            else:
                expected = model.further[m - channels](values[b, k])
            assert torch.allclose(found[b, k], expected, atol=1e-5)


def test_one_modality_alone_is_encoded_as_the_backbone_does_it():
    model, (image, _) = model_of(), a_batch()
    keep = torch.tensor([[3, 0, 17], [5, 23, 1]])
    values = torch.stack([patchify(image[:, :1], (4, 4, 4))[b, keep[b]] for b in range(2)])
    found = model.backbone.tokens(model.embed(values, torch.zeros(2, 3, dtype=torch.long)), keep=keep)
    assert torch.allclose(found, model.backbone.tokens(image[:, :1], keep=keep), atol=1e-5)


def test_a_tokenizer_of_several_channels_gives_about_as_large_tokens_as_a_stem():
    model = MultiModalTransformer(backbone_of(4, embed_dim=192), 5, 1, 48)
    values = torch.randn(1, 500, 64)
    sizes = [model.embed(values, torch.full((1, 500), m)).std().item() for m in range(5)]
    whole = model.backbone.net.down_projection(torch.randn(8, 4, *PATCH)).std().item()
    assert all(size == pytest.approx(whole, rel=0.1) for size in sizes)


def test_a_token_without_a_place_is_what_a_register_is():
    plain, with_register = backbone_of().eval(), backbone_of(num_register_tokens=1).eval()
    weights = with_register.net.state_dict()
    positions = weights["eva.pos_embed"]
    plain.net.load_state_dict({**{k: v for k, v in weights.items() if k != "register_tokens"}, "eva.pos_embed": positions[:, 1:]})
    token = torch.randn(1, 1, 48)
    with torch.no_grad():
        with_register.net.register_tokens.copy_(token)
    image, keep = torch.randn(2, 1, *PATCH), torch.tensor([[3, 0, 17], [5, 23, 1]])
    for chosen in (None, keep):
        expected = with_register.tokens(image, keep=chosen, registers=True)
        assert torch.allclose(plain.tokens(image, keep=chosen, placeless=token + positions[:, :1]), expected, atol=1e-5)


def test_a_decoder_knows_which_token_of_which_modality_it_reads():
    model, (image, hidden) = model_of(modalities=3), a_batch(3)
    before = model(image, hidden)
    assert before.shape == (2, 3, N, 64)
    moved = image.roll(4, -1), hidden.view(2, 3, *GRID).roll(1, -1).flatten(2)  # the same voxels one token further
    swapped = image[:, [1, 0, 2]], hidden[:, [1, 0, 2]]  # the same voxels as another modality
    assert not torch.allclose(model(*moved).view(2, 3, *GRID, 64), before.view(2, 3, *GRID, 64).roll(1, -2), atol=1e-3)
    assert not torch.allclose(model(*swapped)[:, [1, 0, 2]], before, atol=1e-3)


@pytest.mark.parametrize("modality", [0, 1])
def test_each_modality_is_predicted_from_all_visible_voxels_and_no_hidden_one(modality):
    model, (image, hidden) = model_of(), a_batch()
    image.requires_grad_()
    target = normalised_patches(image.detach(), GRID, (4, 4, 4))
    hidden_error(model(image, hidden), target, hidden)[:, modality].sum().backward()
    masked = voxels_of(hidden)
    assert not image.grad[masked].any() and (image.grad[~masked] != 0).float().mean() > 0.99
    assert all((image.grad[:, m][~masked[:, m]] != 0).any() for m in range(2))


def test_hidden_voxels_may_be_anything():
    model, (image, hidden) = model_of(), a_batch()
    other = torch.where(voxels_of(hidden), float("nan"), image)
    assert torch.equal(model(image, hidden), model(other, hidden))


def test_every_parameter_has_a_gradient_also_where_a_modality_is_all_hidden():
    model, (image, hidden) = model_of(modalities=3), a_batch(3)
    hidden = torch.cat((hidden[:, :1], torch.ones_like(hidden[:, 1:])), 1)
    hidden[:, 0, :9], hidden[:, 0, 9:] = False, True
    hidden_error(model(image, hidden), torch.zeros(2, 3, N, 64), hidden)[:, 0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and not name.startswith("decoders")] == []


def test_a_reconstruction_has_the_predicted_voxels_in_their_places():
    model, (image, hidden) = model_of(modalities=3), a_batch(3)
    values, volume = model(image, hidden), model.reconstruct(image, hidden.view(2, 3, *GRID))
    assert volume.shape == image.shape and torch.equal(patches(volume, (4, 4, 4)), values)


def test_in_bfloat16_losses_and_gradients_are_about_those_of_fp32():
    found = []
    for on in (False, True):
        model, (image, hidden) = MultiModalTransformer(backbone_of(), 2, 1, 48), a_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = hidden_error(model.eval()(image, hidden), normalised_patches(image, GRID, (4, 4, 4)), hidden).sum()
        loss.backward()
        assert loss.dtype == torch.float32
        found.append((loss.item(), model.backbone.net.down_projection.proj.weight.grad.norm().item()))
    assert found[1] == pytest.approx(found[0], rel=0.05)
