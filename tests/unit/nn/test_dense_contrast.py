"""Contrast of places against plain loops, and what is done with the other side of the body."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl_ext.nn.dense_contrast import CONTRALATERAL, PlaceProjection, contralateral, place_contrast, values_at


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def plain(first, second, valid, partners, temperature, handling, weight):
    """One place after the other, with exponentials."""
    samples = []
    for a, b, counts, pairs in zip(first, second, valid.tolist(), partners.tolist()):
        places = [i for i in range(len(a)) if counts[i]]
        terms = []
        for asked, told in ((a, b), (b, a)):
            for i in places:
                others = [k for k in places if pairs[i][k] and k != i]
                compared = [k for k in places if handling != "exclude" or k not in others]
                total = sum(((asked[i] * told[k]).sum() / temperature).exp() for k in compared)
                target = {i: 1.0} | ({k: weight / len(others) for k in others} if handling == "positive" else {})
                costs = [share * -(((asked[i] * told[k]).sum() / temperature).exp() / total).log() for k, share in target.items()]
                terms.append(sum(costs) / sum(target.values()))
        samples.append(sum(terms) / len(terms))
    return sum(samples) / len(samples)


@pytest.mark.parametrize("handling", CONTRALATERAL)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_and_its_gradients_are_those_of_a_plain_loop(handling, temperature):
    first, second = unit(3, 7, 5).requires_grad_(), unit(3, 7, 5, seed=1).requires_grad_()
    partners = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.2
    partners = partners | partners.mT
    valid = torch.tensor([[True] * 7, [True, False, True, True, False, True, True], [False] * 6 + [True]])
    arguments = (first, second, valid, partners, temperature, handling, 0.3)
    found, expected = place_contrast(*arguments), plain(*arguments)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(found, (first, second)), torch.autograd.grad(expected, (first, second))):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_places_that_do_not_count_change_nothing():
    first, second, partners = unit(1, 6, 4), unit(1, 6, 4, seed=1), torch.rand(1, 6, 6) < 0.3
    valid = torch.tensor([[True, True, False, True, False, True]])
    kept = valid[0].nonzero()[:, 0]
    for handling in CONTRALATERAL:
        whole = place_contrast(first, second, valid, partners | partners.mT, 0.1, handling)
        part = place_contrast(first[:, kept], second[:, kept], valid[:, kept], (partners | partners.mT)[:, kept][:, :, kept], 0.1, handling)
        assert whole.item() == pytest.approx(part.item(), rel=1e-12)


def test_a_single_place_costs_nothing_and_has_a_gradient_of_zeros():
    first = unit(2, 1, 4).requires_grad_()
    loss = place_contrast(first, unit(2, 1, 4, seed=1), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1, 1, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == 0 and not first.grad.any()


def test_random_vectors_cost_the_logarithm_of_what_they_are_compared_with():
    ones, valid, nobody = torch.ones(1, 50, 2), torch.ones(1, 50, dtype=torch.bool), torch.zeros(1, 50, 50, dtype=torch.bool)
    assert place_contrast(ones, ones, valid, nobody, 0.1).item() == pytest.approx(math.log(50), rel=1e-6)
    assert place_contrast(ones, ones, valid, torch.eye(50).flip(0).bool()[None], 0.1).item() == pytest.approx(math.log(49), rel=1e-6)


def symmetric_body():
    """64 places of a symmetric body: their partners, and vectors that tell all of them apart, or all but for the side."""
    x, y = torch.meshgrid(torch.arange(-3.5, 4) * 10, torch.arange(8.0) * 10, indexing="ij")
    positions = torch.stack((x, y, torch.zeros_like(x)), -1).reshape(1, -1, 3).double()
    number = (x.abs() * 10 + y).long().flatten()
    told_apart, alike = torch.eye(64, dtype=torch.float64)[None], F.one_hot(torch.unique(number, return_inverse=True)[1]).double()[None]
    return contralateral(positions, 1.0), told_apart, alike, torch.ones(1, 64, dtype=torch.bool)


def test_vectors_that_are_alike_on_both_sides_pay_for_it_only_where_the_other_side_is_a_negative():
    partners, apart, alike, valid = symmetric_body()
    assert partners.sum().item() == 64 and not partners.diagonal(dim1=1, dim2=2).any()
    cost = {h: [place_contrast(z, z, valid, partners, 0.1, h, 1.0).item() for z in (apart, alike)] for h in CONTRALATERAL}
    assert cost["negative"][1] == pytest.approx(math.log(2), abs=0.01) and cost["negative"][0] < 0.01
    assert cost["exclude"][1] < 0.01 and cost["exclude"][0] < 0.01  # free to be alike or not
    assert cost["positive"][1] == pytest.approx(math.log(2), abs=0.01) and cost["positive"][0] > 2  # which is what two equal targets cost at least


def test_a_partner_lies_about_the_mirror_image_and_near_the_plane_a_place_is_its_own():
    positions = torch.tensor([[[-20.0, 5, 7], [21, 5, 7], [20, 14, 7], [20, 15.1, 7], [3, 0, 0], [-20, 5, -20], [20, 5, -20]]]).double()
    expected = torch.zeros(7, 7, dtype=torch.bool)
    for i, k in ((0, 1), (0, 2), (4, 4), (5, 6)):
        expected[i, k] = expected[k, i] = True
    found = contralateral(torch.cat((positions, positions + torch.tensor([500.0, 0, 0]))), 10.0)
    assert torch.equal(found[0], expected) and not found[1].any()
    distances = [[math.dist((-a[0], *a[1:]), b) for b in positions[0].tolist()] for a in positions[0].tolist()]
    assert torch.equal(found[0], torch.tensor(distances) <= 10)
    assert contralateral(torch.tensor([[[-5.0, 0, 0], [2.0, 4, 0]]]).double(), 5.0)[0, 0, 1]  # at that very distance


def test_values_between_cells_are_those_of_grid_sample_and_beyond_the_border_that_of_the_border():
    maps = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    places = torch.rand(2, 40, 3, dtype=torch.float64) * torch.tensor([6, 7, 8.0]) - 1
    places[0, 0], places[0, 1] = torch.tensor([3.0, 4, 5]), torch.zeros(3)
    scaled = (places * 2 / torch.tensor([3, 4, 5.0]) - 1).flip(2)[:, :, None, None]
    expected = F.grid_sample(maps, scaled, padding_mode="border", align_corners=True)[..., 0, 0].mT
    found = values_at(maps, places)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), maps)[0] for x in (found, expected)))
    torch.testing.assert_close(found[0, :2], maps[0, :, (3, 0), (4, 0), (5, 0)].T)


def test_a_map_of_one_cell_along_an_axis_and_one_in_half_precision_are_read_in_single_precision():
    maps = torch.randn(1, 2, 1, 3, 3).bfloat16()
    found = values_at(maps, torch.tensor([[[0.0, 1, 1], [0.4, 1, 2]]]))
    assert found.dtype == torch.float32 and torch.equal(found[0], maps[0, :, 0, (1, 1), (1, 2)].float().T)


class Ramps(nn.Module):
    """Maps that hold averages of the input, of 2^3 and 4^3 voxels; `decode` gives it back, as often as there are channels."""

    strides, widths = ((2, 2, 2), (4, 4, 4)), (3, 3)

    def __init__(self, supports, decoded=3):
        super().__init__()
        self.supports, self.decoded = supports, decoded

    def pyramid(self, x):
        return [x] if "decoder" in self.supports else [F.avg_pool3d(x, stride) for stride in self.strides]

    def project(self, maps, layer):
        return layer(maps[0].repeat(1, self.decoded // 3, 1, 1, 1))


@pytest.mark.parametrize("supports", [{"pyramid"}, {"pyramid", "decoder"}], ids=len)
def test_features_are_read_at_the_same_place_of_every_map(supports):
    ramp = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (16, 24, 32)), indexing="ij"))[None]
    places, seen = torch.rand(1, 30, 3) * torch.tensor([12, 20, 28.0]) + 1.5, []
    model = PlaceProjection(Ramps(supports), 8, 4)
    model.projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vectors = model(ramp, places)
    torch.testing.assert_close(seen[0], places.repeat(1, 1, 1 if "decoder" in supports else 2))  # ramps are ramps at any resolution
    assert vectors.shape == (1, 30, 4)
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(1, 30))


def test_a_decoder_with_many_channels_is_narrowed_before_its_map_has_all_voxels():
    wide, narrow = (PlaceProjection(Ramps({"pyramid", "decoder"}, decoded), 8, 4) for decoded in (96, 63))
    assert wide.narrow(torch.zeros(1, 96, 1, 1, 1)).shape[1] == wide.projector[0].in_features == 64
    assert narrow.projector[0].in_features == 63 and not list(narrow.narrow.parameters())
    assert wide(torch.randn(1, 3, 4, 4, 4), torch.ones(1, 2, 3)).shape == (1, 2, 4)
