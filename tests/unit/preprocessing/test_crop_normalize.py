"""The body and its intensities."""

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import Normalization
from nnssl_ext.preprocessing.crop import body_mask, bounding_box, otsu
from nnssl_ext.preprocessing.normalize import SCHEMES, find_normalizer
from tests.make_raw import body_volume


def ball(shape=(40, 50, 60), centre=(20, 25, 30), radius=12.0):
    grids = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grids, centre)) < radius**2


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_body_is_the_largest_component_with_its_holes_filled(modality):
    body, hole, speck = ball(), ball(radius=5), ball(centre=(3, 3, 3), radius=2)
    volume = np.where(body | speck, 50.0, -1000.0 if modality == "CT" else 0.0).astype(np.float32)
    volume[hole] = volume.min()
    assert np.array_equal(body_mask(volume, modality), body)


def test_large_volumes_are_searched_on_a_coarser_grid():
    body = ball((160, 160, 160), (80, 80, 80), 50)
    found = body_mask(np.where(body, 0.0, -1000.0).astype(np.float32), "CT")
    assert np.array_equal(found, body)


def test_a_volume_without_any_body_is_all_body():
    assert body_mask(np.full((4, 5, 6), -1000.0), "CT").all()


def test_otsu_separates_two_populations():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 5000), rng.normal(10, 1, 3000)]).reshape(20, 20, 20)
    assert 3 < otsu(values) < 7


def test_the_box_is_tight_but_for_the_margin_and_stays_inside():
    mask = np.zeros((10, 20, 30), bool)
    mask[1:3, 5:9, 28:30] = True
    assert bounding_box(mask, margin=2) == ((0, 5), (3, 11), (26, 30))
    assert bounding_box(mask, margin=0) == ((1, 3), (5, 9), (28, 30))
    assert bounding_box(np.zeros((3, 4, 5), bool)) == ((0, 3), (0, 4), (0, 5))


VOLUME = body_volume().astype(np.float32)
BODY = body_mask(VOLUME, "CT")


def test_ct_is_clipped_and_standardised_with_global_statistics():
    plan = Normalization("ct", 40, 50, -100, 150)
    parameters = SCHEMES["ct"]().parameters(VOLUME, BODY, plan)
    assert np.allclose(SCHEMES["ct"].apply(VOLUME, parameters), (np.clip(VOLUME, -100, 150) - 40) / 50, atol=1e-6)


def test_zscore_gives_zero_mean_and_unit_deviation_in_the_body():
    normalized = SCHEMES["zscore"].apply(VOLUME, SCHEMES["zscore"]().parameters(VOLUME, BODY, Normalization("zscore")))
    assert normalized[BODY].mean() == pytest.approx(0, abs=1e-5) and normalized[BODY].std() == pytest.approx(1, abs=1e-5)


def test_percentile_scaling_maps_the_body_to_the_unit_interval():
    normalized = SCHEMES["percentile"].apply(VOLUME, SCHEMES["percentile"]().parameters(VOLUME, BODY, Normalization("percentile")))
    assert normalized.min() == 0 and normalized.max() == 1
    assert 0.004 < (normalized[BODY] == 1).mean() < 0.007


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme_can_be_undone_within_its_clipping_range(scheme):
    normalizer = find_normalizer(scheme)
    parameters = normalizer.parameters(VOLUME, BODY, Normalization(scheme, 40, 50, -2000, 2000))
    restored = normalizer.invert(normalizer.apply(VOLUME, parameters), parameters)
    expected = np.clip(VOLUME, parameters.get("low", -np.inf), parameters.get("high", np.inf))
    assert np.allclose(restored, expected, atol=1e-2)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_constant_body_gives_finite_values(scheme):
    constant = np.full((4, 5, 6), 3.0, np.float32)
    normalizer = find_normalizer(scheme)
    assert np.isfinite(normalizer.apply(constant, normalizer.parameters(constant, np.ones((4, 5, 6), bool), Normalization(scheme, 0, 0, 0, 0)))).all()


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="unknown Normalizer"):
        find_normalizer("Zscor")
