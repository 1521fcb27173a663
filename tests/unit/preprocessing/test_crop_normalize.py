"""The body and its intensities."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import Normalization
from nnssl_ext.preprocessing import crop
from nnssl_ext.preprocessing.crop import body_mask, bounding_box, otsu
from nnssl_ext.preprocessing.normalize import SCHEMES, find_normalizer, percentiles
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


def plain_body_mask(volume, threshold, step):
    """The definition step by step: components and holes on a subsampled grid, the surface from the threshold."""
    mask = volume > threshold
    coarse = mask[::step, ::step, ::step]
    labels, _ = ndimage.label(coarse)
    coarse = labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1
    for axis in range(3):
        for index in range(coarse.shape[axis]):
            at = (slice(None),) * axis + (index,)
            coarse[at] = ndimage.binary_fill_holes(coarse[at])
    if step == 1:
        return coarse
    index = np.ix_(*(np.arange(n) // step for n in volume.shape))
    corners = np.ones((3, 3, 3), bool)
    sure, near = ndimage.binary_erosion(coarse, corners, border_value=1), ndimage.binary_dilation(coarse, corners)
    return sure[index] | (near[index] & mask)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("voxels", [2_000_000, 4000, 500])
def test_the_mask_equals_its_definition_step_by_step(seed, voxels, monkeypatch):
    rng = np.random.default_rng(seed)
    shape = rng.integers(9, 40, 3)
    volume = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0.5, 2))
    volume *= 800 / volume.std()
    monkeypatch.setattr(crop, "_COARSE", voxels)
    step = max(1, int(np.ceil((volume.size / voxels) ** (1 / 3))))
    before = volume.copy()
    assert np.array_equal(body_mask(volume, "CT"), plain_body_mask(volume, -500.0, step))
    assert np.array_equal(body_mask(volume, "MR"), plain_body_mask(volume, otsu(volume[::step, ::step, ::step]), step))
    assert np.array_equal(volume, before)


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30])
def test_a_constant_volume_has_a_threshold_and_is_all_body(value):
    volume = np.full((4, 5, 6), value, np.float32)
    assert np.isfinite(otsu(volume)) and body_mask(volume, "MR").all()


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


finite = st.one_of(st.floats(-3000, 3000, width=32), st.floats(-float(np.float32(1e30)), float(np.float32(1e30)), width=32))
volumes = arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=6), elements=finite)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@settings(max_examples=80, deadline=None)
@given(volume=volumes, seed=st.integers(0, 1000), statistics=st.tuples(finite, st.floats(0, 1e4), finite, finite))
def test_any_finite_volume_stays_finite_and_can_be_undone(scheme, volume, seed, statistics):
    mean, std, *limits = statistics
    body = np.random.default_rng(seed).random(volume.shape) < (0.0, 0.05, 0.7, 1.0)[seed % 4]
    normalizer = SCHEMES[scheme]()
    parameters = normalizer.parameters(volume, body, Normalization(scheme, mean, std, min(limits), max(limits)))
    assert all(np.isfinite(value) for value in parameters.values()) and parameters["scale"] > 0
    normalized = normalizer.apply(volume, parameters)
    assert np.isfinite(normalized).all() and normalized.dtype == np.float32
    clipped = np.clip(volume.astype(np.float64), parameters.get("low"), parameters.get("high"))
    assume(np.abs(clipped - parameters["shift"]).max() / parameters["scale"] < 1e37)  # beyond it quotients are cut off
    size = np.abs(clipped).max() + abs(parameters["shift"]) + parameters["scale"] * 1e-30
    assert np.abs(normalizer.invert(normalized, parameters).astype(np.float64) - clipped).max() <= 1e-6 * size


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("value", [0.0, 3.0, -1024.0, 1e-20, 1e30])
def test_a_constant_body_is_moved_but_not_blown_up(scheme, value):
    volume = np.full((4, 5, 6), value, np.float32)
    volume[0] += np.float32(1)
    body = np.zeros(volume.shape, bool)
    body[1:] = True
    normalizer = find_normalizer(scheme)
    normalized = normalizer.apply(volume, normalizer.parameters(volume, body, Normalization(scheme, value, 0, value, value)))
    assert np.isfinite(normalized).all()
    if scheme != "none":
        assert np.abs(normalized).max() <= 1 and not normalized[1:].any()


@pytest.mark.parametrize("scheme", ["zscore", "percentile"])
def test_without_a_body_the_whole_volume_counts(scheme):
    normalizer = find_normalizer(scheme)
    nothing, everything = np.zeros(VOLUME.shape, bool), np.ones(VOLUME.shape, bool)
    assert normalizer.parameters(VOLUME, nothing, Normalization(scheme)) == normalizer.parameters(VOLUME, everything, Normalization(scheme))


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint16, np.int64, np.float64])
def test_the_ends_of_integer_types_are_normalised_without_overflow(kind):
    ends = (np.iinfo(kind).min, np.iinfo(kind).max) if np.issubdtype(kind, np.integer) else (-1e38, 1e38)
    volume = np.array(ends, kind).reshape(1, 1, 2)
    body = np.ones(volume.shape, bool)
    normalizer = find_normalizer("zscore")
    normalized = normalizer.apply(volume, normalizer.parameters(volume, body, Normalization("zscore")))
    assert np.allclose(normalized, [[[-1, 1]]], atol=1e-5)


def test_zscore_statistics_equal_those_in_double_precision():
    volume = np.random.default_rng(0).normal(1e4, 2, (40, 90, 100)).astype(np.float32)
    found = SCHEMES["zscore"]().parameters(volume, volume > 9999, Normalization("zscore"))
    inside = volume[volume > 9999].astype(np.float64)
    assert found["shift"] == pytest.approx(inside.mean(), rel=1e-10) and found["scale"] == pytest.approx(inside.std(), rel=1e-8)


def test_percentiles_of_few_values_are_exact_and_of_many_close():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=1000), rng.normal(size=(3, 1000, 1000)).astype(np.float32)
    assert percentiles(few, (0.5, 50, 99.5)) == list(np.percentile(few, (0.5, 50, 99.5)))
    ranks = [100 * (many < value).mean() for value in percentiles(many, (0.5, 50, 99.5))]
    assert np.allclose(ranks, (0.5, 50, 99.5), atol=(0.03, 0.2, 0.03))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="unknown Normalizer"):
        find_normalizer("Zscor")
