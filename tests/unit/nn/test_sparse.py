"""A residual encoder on the visible part of a crop: nothing hidden has any influence, and what is visible counts as it would alone."""

import dataclasses
from itertools import product

import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn import parallel
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.sparse import Densify, active_levels, masked_instance_norm
from nnssl_ext.nn.tokens import voxel_mask
from tests.make_data import tiny_plan

PLAIN = {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_blocks_per_stage": [1, 2, 1]}  # a second block has no projection
FLAT = {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}  # anisotropic
STILL = {"strides": [[1, 1, 1], [1, 1, 1], [2, 2, 2]]}  # two levels of one size
NETWORKS = {"plain": (PLAIN, (8, 16, 12), 1), "flat": (FLAT, (4, 16, 12), 2), "still": (STILL, (8, 4, 6), 2)}
BLOCKS = {"as coarse as the deepest level": 1, "finer": 2}


def make(kwargs, patch, channels, **changed):
    config = tiny_plan(channels).configuration("3d_fullres")
    network = config.network("resenc")
    network = dataclasses.replace(network, kwargs={**network.kwargs, **kwargs, **changed})
    torch.manual_seed(0)
    backbone = build_backbone(dataclasses.replace(config, patch_size=patch, networks={"resenc": network}), "resenc", channels).double()
    for parameter in backbone.net.encoder.parameters():  # at first the residual branches are silent
        nn.init.normal_(parameter, std=0.3)
    return backbone


@pytest.fixture(params=product(NETWORKS, BLOCKS), ids=lambda value: "-".join(value))
def case(request):
    """Backbone in fp64, a batch of two crops, and a mask of each that hides different numbers of blocks."""
    name, fineness = request.param
    kwargs, patch, channels = NETWORKS[name]
    backbone = make(kwargs, patch, channels)
    grid = [size // max(1, stride // BLOCKS[fineness]) for size, stride in zip(patch, backbone.strides[-1])]
    mask = torch.rand(2, *grid) < torch.tensor([0.2, 0.6]).view(2, 1, 1, 1)
    mask[1, :2, :2, :2] = True  # a deepest cell or more
    return backbone, torch.randn(2, channels, *patch, dtype=torch.float64), voxel_mask(mask, patch)


def parameters(backbone):
    return list(backbone.net.encoder.parameters())


def test_a_cell_is_active_where_one_of_its_voxels_is_visible(case):
    backbone, image, hidden = case
    voxels, *levels = active_levels(hidden, backbone.strides)
    assert torch.equal(voxels, ~hidden) and len(levels) == len(backbone.strides)
    assert levels[-1][0].sum() != levels[-1][1].sum()
    for level, (dz, dy, dx) in zip(levels, backbone.strides):
        for b, z, y, x in product(*map(range, (2, *level.shape[2:]))):
            inside = hidden[b, 0, z * dz : (z + 1) * dz, y * dy : (y + 1) * dy, x * dx : (x + 1) * dx]
            assert level[b, 0, z, y, x] == (not inside.all())


def test_with_everything_visible_the_encoder_is_the_dense_one_and_so_are_its_gradients(case):
    backbone, image, hidden = case
    image.requires_grad_()
    found = backbone.pyramid(image, active=active_levels(torch.zeros_like(hidden), backbone.strides))
    expected = backbone.net.encoder(image)
    wanted = [image, *parameters(backbone)]
    gradients = [torch.autograd.grad(sum(m.square().sum() for m in maps), wanted) for maps in (found, expected)]
    for one, other in zip([*found, *gradients[0]], [*expected, *gradients[1]]):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def leaks(backbone, image, hidden, levels) -> list[bool]:
    """Whether some active cell of each level has a gradient at a hidden voxel; those at visible voxels are asserted to exist."""
    found = []
    for number, active in enumerate(active_levels(hidden, backbone.strides)[1:]):
        image = image.detach().requires_grad_()
        features = backbone.pyramid(image, active=levels)[number]
        (features * active * torch.randn_like(features)).sum().backward()
        assert bool((image.grad[(~hidden).expand_as(image)] != 0).any())
        found.append(bool((image.grad[hidden.expand_as(image)] != 0).any()))
    return found


def test_no_active_cell_of_any_level_has_a_gradient_at_a_hidden_voxel(case):
    backbone, image, hidden = case
    levels = active_levels(hidden, backbone.strides)
    assert leaks(backbone, image, hidden, levels) == [False] * 3
    assert leaks(backbone, image, hidden, [torch.ones_like(hidden), *levels[1:]]) == [True] * 3  # an encoder that is fed the whole crop


def test_inactive_cells_are_empty_at_every_level_also_below_the_resolution_of_the_mask(case):
    backbone, image, hidden = case
    levels = active_levels(hidden, backbone.strides)
    for features, active in zip(backbone.pyramid(image, active=levels), levels[1:]):
        shown = active.expand_as(features)
        assert bool((features[~shown] == 0).all()) and bool((features[shown] != 0).any())
    everywhere = [*levels[:-1], torch.ones_like(levels[-1])]
    deepest = backbone.pyramid(image, active=everywhere)[-1]
    assert bool((deepest[~levels[-1].expand_as(deepest)] != 0).any())  # so a level without its mask would be found


def test_hidden_voxels_may_hold_anything_even_nan(case):
    backbone, image, hidden = case
    levels, gradients, maps = active_levels(hidden, backbone.strides), [], []
    for content in (image, torch.full_like(image, torch.nan), 1e3 * torch.randn_like(image)):
        maps.append(backbone.pyramid(torch.where(hidden, content, image), active=levels))
        gradients.append(torch.autograd.grad(sum(m.square().sum() for m in maps[-1]), parameters(backbone)))
    for other in (1, 2):
        assert all(torch.equal(a, b) for pair in (maps, gradients) for a, b in zip(pair[0], pair[other]))


def test_a_sample_is_encoded_as_it_would_be_alone_whatever_the_others_hide(case):
    backbone, image, hidden = case
    levels = active_levels(hidden, backbone.strides)
    both = backbone.pyramid(image, active=levels)
    for sample in range(2):
        alone = backbone.pyramid(image[sample : sample + 1], active=[level[sample : sample + 1] for level in levels])
        for one, other in zip(both, alone):
            torch.testing.assert_close(one[sample : sample + 1], other, rtol=1e-9, atol=1e-9)


def test_no_call_leaves_a_mask_behind_not_even_for_recomputation(case):
    backbone, image, hidden = case
    wanted = parameters(backbone)

    def gradients(*masks):
        """Of several forward passes, all before the backward pass."""
        maps = [m for mask in masks for m in backbone.pyramid(image, active=active_levels(mask, backbone.strides))]
        return torch.autograd.grad(sum(m.square().sum() for m in maps), wanted)

    one, other = gradients(hidden), gradients(hidden.flip(0))
    dense = backbone.net.encoder(image)
    parallel.speed_up(backbone, torch.device("cpu"), compiled=False, recomputed=True)
    for found, a, b in zip(gradients(hidden, hidden.flip(0)), one, other):
        torch.testing.assert_close(found, a + b, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(backbone.net.encoder(image), dense))


def loop_norm(x, active, weight, bias, eps, count=None):
    """Each channel of each sample by itself; `count` = a wrong number of active cells."""
    y = torch.zeros_like(x)
    for sample, channel in product(range(x.shape[0]), range(x.shape[1])):
        shown = active[sample, 0]
        values = x[sample, channel][shown]
        n = count or len(values)
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / n
        y[sample, channel, shown] = (values - mean) / (variance + eps).sqrt() * weight[channel] + bias[channel]
    return y


@pytest.fixture
def norm():
    """Maps whose two samples have 5 and 23 active cells, weights, and NaN in what is inactive."""
    torch.manual_seed(0)
    x = 3 + torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    active = torch.zeros(2, 1, 40, dtype=torch.bool)
    active[0, 0, torch.randperm(40)[:5]] = True
    active[1, 0, torch.randperm(40)[:23]] = True
    active = active.view(2, 1, 2, 4, 5)
    return torch.where(active, x, torch.nan), active, torch.rand(3).double(), torch.randn(3).double()


def test_moments_are_those_of_the_active_cells_of_each_sample(norm):
    x, active, weight, bias = norm
    found, expected = masked_instance_norm(x, active, weight, bias, 1e-3), loop_norm(x, active, weight, bias, 1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wrong = loop_norm(x, active, weight, bias, 1e-3, count=5)  # the count of the first sample for all
    assert torch.allclose(found[0], wrong[0]) and not torch.allclose(found[1], wrong[1], atol=0.1)
    ones, zeros = torch.ones(3).double(), torch.zeros(3).double()
    torch.testing.assert_close(masked_instance_norm(x, active), loop_norm(x, active, ones, zeros, 1e-5), rtol=1e-12, atol=1e-12)


def test_gradients_of_the_norm_are_those_of_the_loop_and_zero_in_inactive_cells(norm):
    x, active, weight, bias = norm
    along, found = torch.randn_like(x), []
    for function in (masked_instance_norm, loop_norm):
        wanted = [value.clone().requires_grad_() for value in (x, weight, bias)]
        found.append(torch.autograd.grad((function(wanted[0], active, *wanted[1:], 1e-3) * along).sum(), wanted))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert bool((found[0][0][~active.expand_as(x)] == 0).all())


def test_in_half_precision_the_moments_are_still_those_of_single_precision(norm):
    x, active, weight, bias = (value.float() if value.is_floating_point() else value for value in norm)
    x = (x + 60).bfloat16()  # 63 +- 1: sums of squares in half precision would be of no use
    found, expected = masked_instance_norm(x, active, weight, bias), loop_norm(x.float(), active, weight, bias, 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_the_norm_keeps_no_more_for_the_backward_pass_than_the_dense_one(norm):
    x, active, weight, bias = (value.float() if value.is_floating_point() else value for value in norm)

    def kept(function) -> int:
        """Bytes of whole maps."""
        half, sizes = torch.nan_to_num(x).bfloat16().requires_grad_(), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            function(half)
        return sum(size for size in sizes.values() if size >= half.nbytes)

    dense = kept(lambda y: nn.functional.instance_norm(y, None, None, weight, bias))
    assert 0 < kept(lambda y: masked_instance_norm(y, active, weight, bias)) <= dense


@pytest.mark.parametrize("mixed", [True, False])
def test_a_dense_level_holds_normed_cells_and_the_token_and_mixes_them_unless_it_is_the_deepest(norm, mixed):
    x, active, _, _ = norm
    densify = Densify(3, mixed).double()
    filled = loop_norm(x, active, torch.ones(3).double(), torch.zeros(3).double(), 1e-5)
    for sample, z, y, w in (~active[:, 0]).nonzero().tolist():
        filled[sample, :, z, y, w] = densify.token[0, :, 0, 0, 0]
    expected = nn.functional.conv3d(filled, densify.mix.weight, densify.mix.bias, padding=1) if mixed else filled
    torch.testing.assert_close(densify(x, active), expected, rtol=1e-9, atol=1e-9)
    assert any(isinstance(module, nn.Conv3d) for module in densify.modules()) == mixed


def test_the_token_has_a_gradient_if_and_only_if_something_is_hidden(norm):
    x, active, _, _ = norm
    densify = Densify(3, True).double()
    for shown, moves in ((active, True), (torch.ones_like(active), False)):
        (gradient,) = torch.autograd.grad(densify(torch.nan_to_num(x), shown).square().sum(), densify.token)
        assert bool((gradient != 0).any()) == moves


def test_tokens_are_drawn_small():
    torch.manual_seed(0)
    assert Densify(4096, False).token.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_sample_with_one_active_cell_is_refused():
    hidden = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    hidden[0], hidden[1, :, :, :4, :4] = False, False
    strides = [(1, 1, 1), (4, 4, 4)]
    assert active_levels(hidden, strides)[-1].flatten(1).sum(1).tolist() == [8, 2]
    hidden[1, :, 4:] = True
    with pytest.raises(UserError, match="as few as 1 active cell of 4x4x4 voxels; InstanceNorm needs 2") as error:
        active_levels(hidden, strides)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}, "BatchNorm3d"),
        ({"norm_op_kwargs": {"affine": True, "track_running_stats": True}}, "InstanceNorm3d"),
        ({"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD", "bottleneck_channels": 4}, "BottleneckD"),
    ],
)
def test_layers_without_a_sparse_form_are_refused_by_name_and_dense_ones_work(changed, named):
    config = tiny_plan().configuration("3d_fullres")
    network = config.network("resenc")
    network = dataclasses.replace(network, kwargs={**network.kwargs, **changed}, imports=(*network.imports, *(("block",) if "block" in changed else ())))
    backbone = build_backbone(dataclasses.replace(config, networks={"resenc": network}), "resenc", 1)
    image = torch.randn(1, 1, 16, 16, 16)
    assert len(backbone.pyramid(image)) == 3
    with pytest.raises(UserError, match=f"{named} can't be run on the visible part alone"):
        backbone.pyramid(image, active=active_levels(torch.zeros(1, 1, 16, 16, 16, dtype=torch.bool), backbone.strides))
