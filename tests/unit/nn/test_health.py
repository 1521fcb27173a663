"""Health figures against closed forms and plain loops."""

import math

import pytest
import torch

from nnssl_ext.nn import health

FIGURES = {
    "spread": health.spread,
    "mean_cosine": health.mean_cosine,
    "rank_me": lambda x: health.rank_me(health.singular_values(x)),
    "dimension_share": lambda x: health.dimension_share(health.singular_values(x)),
    "directions": health.directions,
    "dead_share": health.dead_share,
    "position_r2": lambda x: health.position_r2(x, torch.zeros(len(x), 3)),
    "patch_variances": lambda x: torch.stack(health.patch_variances(x[None])),
    "conditional_entropy": health.conditional_entropy,
    "divergence": lambda x: health.divergence(x, x),
}


def gaussian(n=256, d=128, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("x", [torch.zeros(8, 5), torch.full((8, 5), 3.0), torch.ones(1, 5), torch.full((8, 5), 1e-30), torch.full((8, 5), 1e18)], ids=str)
def test_no_figure_is_nan_for_constant_or_extreme_vectors(name, x):
    assert torch.isfinite(FIGURES[name](x)).all()


def test_isotropic_vectors_are_healthy():
    x = gaussian()
    assert health.spread(x).item() == pytest.approx(1, abs=0.01)
    assert abs(health.mean_cosine(x).item()) < 0.01
    assert 110 < health.rank_me(health.singular_values(x)).item() < 125


def test_collapsed_vectors_are_not():
    x = gaussian()[:1] + 1e-4 * gaussian(seed=1)
    assert health.spread(x).item() < 0.01
    assert health.mean_cosine(x).item() > 0.999
    assert health.rank_me(health.singular_values(x)).item() < 1.5


def test_vectors_of_rank_four_have_effective_rank_four():
    x = gaussian(256, 4) @ gaussian(4, 128, 1)
    assert 3.3 < health.rank_me(health.singular_values(x)).item() <= 4.001
    assert health.spread(x).item() > 0.8


def test_orthogonal_vectors_in_closed_form():
    x = torch.eye(6).repeat(4, 1) * torch.arange(1, 25)[:, None]
    values = health.singular_values(x)
    assert health.rank_me(values).item() == pytest.approx(6, rel=1e-5)
    assert health.dimension_share(values).item() == pytest.approx(1, rel=1e-5)
    assert health.mean_cosine(x).item() == pytest.approx(6 * 4 * 3 / (24 * 23), rel=1e-5)
    assert health.spread(x).item() == pytest.approx(math.sqrt(1 / 6 - 1 / 36) * math.sqrt(6), rel=1e-5)


def test_two_unequal_singular_values_in_closed_form():
    x = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 1.0]])  # singular values 3 and 1
    values = health.singular_values(x)
    assert torch.allclose(values, torch.tensor([3.0, 1.0]), rtol=1e-5)
    assert health.rank_me(values).item() == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-5)
    assert health.dimension_share(values).item() == pytest.approx(100 / 82 / 2, rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_directions_are_the_participation_ratio_of_the_variances_along_the_principal_axes(shape):
    x = gaussian(*shape) + 2 * gaussian(1, shape[1], 1)
    unit = torch.stack([row / row.norm() for row in x.double()])
    variances = torch.linalg.svdvals(unit - unit.mean(0)).square()
    assert health.directions(x).item() == pytest.approx((variances.sum() ** 2 / (variances**2).sum()).item(), rel=1e-5)


def test_directions_are_one_on_a_line_two_on_a_circle_and_none_at_a_point_whatever_the_width_and_the_mean():
    angle = torch.linspace(0, 2 * math.pi, 101)[:-1]
    circle = torch.stack((angle.cos(), angle.sin()), 1)
    for width in (4, 512):
        basis = torch.linalg.qr(gaussian(width, 4)).Q.T
        assert health.directions(circle @ basis[:2]).item() == pytest.approx(2, rel=1e-4)
        assert health.directions(circle @ basis[:2] + 3 * basis[2]).item() == pytest.approx(2, rel=1e-4)
        assert health.directions(circle[:, :1].sign() * basis[:1]).item() == pytest.approx(1, rel=1e-4)
        assert health.directions(basis[:1].repeat(100, 1)).item() == 0


@pytest.mark.parametrize("shape", [(20, 7), (7, 20)])
def test_singular_values_equal_those_of_the_decomposition(shape):
    x = gaussian(*shape)
    assert torch.allclose(health.singular_values(x), torch.linalg.svdvals(x / x.norm(dim=1, keepdim=True)), rtol=1e-4)


def test_mean_cosine_equals_the_double_loop():
    x = gaussian(9, 4) + 0.5
    cosines = [torch.cosine_similarity(x[i], x[j], 0).item() for i in range(9) for j in range(9) if i != j]
    assert health.mean_cosine(x).item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_patch_variances_equal_plain_loops_and_add_up_to_the_total():
    x = gaussian(5 * 7, 6).reshape(5, 7, 6) + 1
    within, between = (value.item() for value in health.patch_variances(x))
    unit = [[patch / patch.norm() for patch in image] for image in x]
    means = [sum(image) / 7 for image in unit]
    overall = sum(means) / 5
    assert within == pytest.approx(sum(((p - m) ** 2).sum().item() for image, m in zip(unit, means) for p in image) / 35, rel=1e-4)
    assert between == pytest.approx(sum(((m - overall) ** 2).sum().item() for m in means) / 5, rel=1e-4)


def test_position_explains_all_of_a_linear_map_and_nothing_of_noise():
    position = torch.cartesian_prod(*[torch.arange(8.0)] * 3)
    linear = position @ gaussian(3, 16) + 5
    noise = gaussian(512, 16, 1)
    assert health.position_r2(linear, position).item() == pytest.approx(1, abs=1e-5)
    assert health.position_r2(noise, position).item() == pytest.approx(3 / 511, abs=0.01)
    flat = position * torch.tensor([1.0, 1.0, 0.0])  # a slice: one axis does not vary
    assert health.position_r2(flat @ gaussian(3, 16), flat).item() == pytest.approx(1, abs=1e-5)


def test_position_r2_equals_least_squares():
    position, x = torch.rand(50, 3), gaussian(50, 4)
    x = x + 2 * position @ gaussian(3, 4, 2)
    design = torch.cat((position, torch.ones(50, 1)), 1)
    residual = x - design @ torch.linalg.lstsq(design, x).solution
    assert health.position_r2(x, position).item() == pytest.approx(1 - (residual.square().sum() / (x - x.mean(0)).square().sum()).item(), abs=1e-5)


def test_dead_dimensions_are_counted():
    x = gaussian(64, 10)
    x[:, :3] = 7.0
    assert health.dead_share(x).item() == pytest.approx(0.3)
    assert health.dead_share(torch.ones(8, 4)).item() == 1


def test_background_is_the_darkest_twentieth_of_the_range():
    image = torch.linspace(0, 1, 1000).reshape(1, 1, 10, 10, 10)
    assert health.background_share(image).item() == pytest.approx(0.05, abs=0.002)
    assert health.background_share(torch.full((2, 1, 4, 4, 4), -1.0)).item() == 1


@pytest.mark.parametrize(("case", "conditional", "marginal"), [("uniform", 1, 1), ("one-hot collapse", 0, 0), ("one class each", 0, 1)])
def test_entropies_of_known_distributions(case, conditional, marginal):
    k = 16
    logits = {"uniform": torch.zeros(k, k), "one-hot collapse": 1000 * torch.eye(k)[:1].repeat(k, 1), "one class each": 1000 * torch.eye(k)}[case]
    assert health.conditional_entropy(logits).item() / math.log(k) == pytest.approx(conditional, abs=1e-6)
    assert health.marginal_entropy(logits.softmax(1).mean(0)).item() / math.log(k) == pytest.approx(marginal, abs=1e-6)


def test_entropies_and_divergence_equal_plain_loops():
    a, b = gaussian(6, 5), gaussian(6, 5, 1)
    p, q = a.softmax(1).tolist(), b.softmax(1).tolist()
    assert health.conditional_entropy(a).item() == pytest.approx(-sum(v * math.log(v) for row in p for v in row) / 6, rel=1e-5)
    kl = sum(v * math.log(v / w) for r, s in zip(p, q) for v, w in zip(r, s)) / 6
    assert health.divergence(a, b).item() == pytest.approx(kl, rel=1e-4)
    assert health.divergence(a, a).item() == 0


def test_half_precision_is_computed_in_single():
    x = (1000 * gaussian()).half()
    assert health.spread(x).dtype == torch.float32 and torch.isfinite(health.spread(x))
