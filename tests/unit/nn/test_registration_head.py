"""Velocities: where they come from and what they do."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.core.plan import ConfigPlan
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.registration_head import RegistrationNet, correlation, directions, offsets, rescale, vote
from nnssl_ext.nn.registration_losses import end_point_error
from nnssl_ext.nn.warp import compose, exponential, jacobian_determinant, warp
from tests.make_data import tiny_plan


def network(family="resenc", patch=(8, 24, 16), channels=2):
    torch.manual_seed(0)
    plan: ConfigPlan = tiny_plan(channels, patch).configuration("3d_fullres")
    return RegistrationNet(build_backbone(plan, family, channels))


def volumes(patch=(8, 24, 16), channels=2, count=1):
    return torch.randn(2, count, channels, *patch)


@pytest.mark.parametrize("radius", [1, 2])
def test_a_correlation_is_the_dot_product_with_each_neighbour(radius):
    a, b = torch.randn(2, 2, 3, 4, 3, 5, dtype=torch.float64)
    found = correlation(a, b, radius)
    assert found.shape == (2, (2 * radius + 1) ** 3, 4, 3, 5)
    for number, offset in enumerate(offsets(radius).int().tolist()):
        for place in product(range(4), range(3), range(5)):
            there = [p + o for p, o in zip(place, offset)]
            inside = all(0 <= p < n for p, n in zip(there, (4, 3, 5)))
            expected = (a[(..., *place)] * b[(..., *there)]).sum(1) if inside else torch.zeros(2, dtype=torch.float64)
            torch.testing.assert_close(found[(slice(None), number, *place)], expected)


@pytest.mark.parametrize(("old", "new"), [((4, 6, 8), (8, 12, 16)), ((4, 6, 8), (4, 12, 4)), ((3, 3, 3), (5, 7, 3))])
def test_on_another_grid_a_field_leads_to_the_same_places(old, new):
    edge = torch.tensor([n / o for n, o in zip(new, old)]).view(3, 1, 1, 1)
    constant = rescale(torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1, 1).expand(1, 3, *old), new)
    torch.testing.assert_close(constant, torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1, 1).expand(1, 3, *new) * edge)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in old), indexing="ij"))[None] * 0.1  # a tenth of the way from the corner
    wanted = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in new), indexing="ij"))[None] * 0.1
    inner = (..., *(slice(-(-n // o), n - -(-n // o)) for n, o in zip(new, old)))
    torch.testing.assert_close(rescale(grid, new)[inner], wanted[inner])


def test_a_constant_velocity_moves_every_voxel_by_twice_its_cells():
    velocity = torch.tensor([0.7, -0.2, 1.3]).view(1, 3, 1, 1, 1).expand(1, 3, 8, 6, 10)
    found = rescale(exponential(velocity), (16, 12, 20))
    torch.testing.assert_close(found, (2 * velocity[..., :1, :1, :1]).expand_as(found), rtol=1e-6, atol=1e-6)


def smooth(scale, seed=0):
    torch.manual_seed(seed)
    rough = F.interpolate(torch.randn(1, 3, 4, 4, 4, dtype=torch.float64), size=(24, 24, 24), mode="trilinear", align_corners=True)
    return scale * F.avg_pool3d(F.avg_pool3d(rough, 5, 1, 2, count_include_pad=False), 5, 1, 2, count_include_pad=False)


def test_there_and_back_again_is_the_identity():
    velocity = smooth(0.6)
    there, back = exponential(velocity), exponential(-velocity)
    inner = (..., slice(3, -3), slice(3, -3), slice(3, -3))
    for both in (compose(there, back), compose(back, there)):
        assert float(both[inner].abs().max()) < 0.05 < 0.3 < float(there[inner].abs().max())
    assert float((there + there)[inner].abs().max()) > 0.5  # without the other direction it would not be


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_smooth_velocities_never_fold(scale):
    for seed in range(5):
        assert float(jacobian_determinant(rescale(exponential(smooth(scale, seed)), (48, 48, 48))).min()) > 0


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_before_training_hardly_anything_moves_and_nothing_does_where_the_last_layers_are_zero(family):
    model = network(family)
    with torch.no_grad():
        velocity, displacement = model(*volumes())
    assert velocity.shape == (1, 3, 4, 12, 8) and displacement.shape == (1, 3, 8, 24, 16)
    assert 0 < float(displacement.abs().max()) < 0.01
    for step in model.steps:
        torch.nn.init.zeros_(step.decide[-1].weight)
    with torch.no_grad():
        assert not model(*volumes())[1].any()


def test_features_of_a_shifted_copy_vote_for_the_shift():
    torch.manual_seed(0)
    whole = torch.randn(1, 8, 10, 10, 10)
    fixed, moving = directions(whole[..., 1:9, 1:9, 1:9]), directions(whole[..., 1:9, 0:8, 1:9])  # moving(p + (0, 1, 0)) = fixed(p)
    first = vote(correlation(fixed, moving))
    second = vote(correlation(fixed, warp(moving, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 8, 8, 8))))
    inner = (0, slice(None), slice(None), slice(1, -1), slice(None))
    assert float(first[inner].mean((1, 2, 3))[1]) > 0.8 and float(first[inner].mean((1, 2, 3))[[0, 2]].abs().max()) < 0.1  # towards where it is
    assert float(second[inner].mean((1, 2, 3)).abs().max()) < 0.1  # it is there
    assert float(first[0, 1, :, -1].max()) <= 0  # nothing lies outside of the map


def test_directions_are_of_length_one_about_the_mean_and_none_where_nothing_varies():
    found = directions(5 + torch.randn(2, 4, 3, 4, 5))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, 3, 4, 5))
    whole = torch.randn(1, 4, 3, 4, 5)
    torch.testing.assert_close(directions(whole), directions(3 * whole - 7), rtol=0, atol=1e-4)
    flat = torch.full((1, 4, 3, 3, 3), 2.5, requires_grad=True)
    directions(flat).square().sum().backward()
    assert not flat.grad.any()


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_a_step_is_made_at_scales_of_eight_cells_or_at_the_finest_and_all_maps_are_used(family):
    model = network(family, patch=(16, 16, 16), channels=1)
    assert len(model.steps) == 1 and len(model.lateral) == (2 if family == "resenc" else 1)  # cells of 2 and 4 voxels, of 4
    assert len(network("resenc", patch=(8, 32, 16)).steps) == 2
    model(*volumes((16, 16, 16), 1))[1].sum().backward()
    assert all(bool(layer.weight.grad.any()) for layer in model.lateral)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_end_point_errors_equal_plain_loops(kind):
    found, true = torch.randn(2, 2, 3, 2, 3, 4, dtype=kind)
    for sample, error in enumerate(end_point_error(found, true)):
        lengths = [
            sum((float(found[(sample, axis, *place)]) - float(true[(sample, axis, *place)])) ** 2 for axis in range(3)) ** 0.5
            for place in product(range(2), range(3), range(4))
        ]
        assert float(error) == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
    same = found.clone().requires_grad_()
    end_point_error(same, found).sum().backward()
    assert not same.grad.any()  # and no NaN


def test_half_precision_around_the_network_leaves_displacements_in_single_precision():
    model = network()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(field.dtype == torch.float32 for field in model(*volumes()))
