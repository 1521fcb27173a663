"""Registration by features against known displacements."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.control_grids import LegacyGrids
from nnssl_ext.evaluation.coupled_convex import convex_registration, coupled_convex, dissimilarity
from nnssl_ext.evaluation.feature_files import write_npz
from nnssl_ext.evaluation.features import FeatureMap
from nnssl_ext.evaluation.mind import mind_ssc
from nnssl_ext.evaluation.registration import PRESETS, Settings, common_components, register_features
from nnssl_ext.evaluation.registration_features import Describer, Images
from nnssl_ext.evaluation.registration_pairs import Pair
from nnssl_ext.nn.registration_losses import end_point_error
from nnssl_ext.nn.warp import warp

SMALL = Settings(step=4, reach=3, iterations=60, regularisation=0.3)
SHIFT = (3, -2, 4)


def texture(shape, seed=0, sigma=2.0):
    """Smooth noise of unit variance, (z, y, x) float32."""
    image = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return torch.from_numpy((image / image.std()).astype(np.float32))


def shifted_pair(edge=36, channels=1):
    """Features (C, z, y, x) of two crops of one image, so that the true displacement is SHIFT everywhere."""
    image = torch.stack([texture((edge + 10,) * 3, seed) for seed in range(channels)])
    return image[:, 5 : 5 + edge, 5 : 5 + edge, 5 : 5 + edge], image[:, 2 : 2 + edge, 7 : 7 + edge, 1 : 1 + edge]


def deformed_pair(edge=36, longest=5.0):
    """Features of two images and the true displacement (3, z, y, x), at most `longest` voxels."""
    moving = texture((edge,) * 3)[None]
    true = torch.stack([texture((edge,) * 3, seed, 6.0) for seed in (1, 2, 3)])
    true = true * longest / torch.linalg.vector_norm(true, dim=0).max()
    return warp(moving[None], true[None])[0], moving, true


def error(found, true):
    return float(end_point_error(found[None], true.expand_as(found)[None]))


@pytest.mark.parametrize("settings", [SMALL, PRESETS["mind_default"]])
def test_equal_images_stay_where_they_are(settings):
    image = texture((24, 26, 28))
    for features in (image[None], mind_ssc(image)):
        assert register_features(features, features, settings).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["features", "mind"])
def test_a_translation_is_found_without_bias(kind):
    fixed, moving = (mind_ssc(features[0]) if kind == "mind" else features for features in shifted_pair(channels=4))
    found = register_features(fixed, moving, replace(SMALL, regularisation=1.25))
    true = torch.tensor(SHIFT).view(3, 1, 1, 1)
    assert (found.mean((1, 2, 3)) - true.flatten()).abs().max() < 0.05


def test_the_legacy_convention_shortens_translations_and_the_present_one_does_not():
    fixed, moving = shifted_pair(channels=4)
    true = torch.tensor(SHIFT).view(3, 1, 1, 1)
    inside = (slice(None), *[slice(8, -8)] * 3)  # away from the faces, where zeros are counted
    lengths, errors = [], []
    for legacy in (False, True):
        found = register_features(fixed, moving, replace(SMALL, regularisation=1.25, legacy=legacy))
        lengths.append(float((found[inside].mean((1, 2, 3)) * true.flatten()).sum() / true.square().sum()))
        errors.append(error(found, true))
    assert abs(lengths[0] - 1) < 0.01 and 0.93 < lengths[1] < 0.965  # 18 control points an axis: 1 / 18 = 5.6 %
    assert errors[1] > 4 * errors[0]


def test_a_smooth_deformation_of_five_voxels_is_found():
    fixed, moving, true = deformed_pair()
    zero = torch.zeros_like(true)
    found = register_features(fixed, moving, SMALL)
    assert error(found, true) < 0.5 * error(zero, true)


def test_a_permutation_of_the_axes_permutes_the_displacement():
    fixed, moving, _ = deformed_pair(24)
    fixed, moving = (torch.cat((x, x.square()))[:, :, :20].double() for x in (fixed, moving))
    found = register_features(fixed, moving, replace(SMALL, reach=2, iterations=20))
    for order in ((1, 2, 0), (2, 1, 0)):
        turned = [x.permute(0, *(1 + axis for axis in order)) for x in (fixed, moving)]
        expected = found[list(order)].permute(0, *(1 + axis for axis in order))
        torch.testing.assert_close(register_features(*turned, replace(SMALL, reach=2, iterations=20)), expected, rtol=0, atol=1e-6)


def test_a_permutation_of_the_axes_permutes_what_precomputed_features_find(tmp_path):
    rng, geometry = np.random.default_rng(0), Geometry((12, 11, 10), (3.0, 2.0, 2.5))
    values = [ndimage.gaussian_filter(rng.standard_normal((5, *geometry.shape)), (0, 2, 2, 2)).astype(np.float32) for _ in range(2)]
    settings = replace(SMALL, step=3, reach=1, iterations=0)

    def found(order):
        where = Geometry(tuple(geometry.shape[axis] for axis in order), tuple(geometry.spacing[axis] for axis in order))
        for number, array in enumerate(values):
            write_npz(tmp_path / f"{number}.npz", FeatureMap(array.transpose(0, *(1 + axis for axis in order)), where, (1, 1, 1)))
        pair = Pair("pair", (Path("a"), Path("b")), features=(tmp_path / "0.npz", tmp_path / "1.npz"))
        images = Images((values[0][0], values[1][0]), (where, where), None)
        return register_features(*Describer()("precomputed", pair, images, where), settings)

    straight = found((0, 1, 2))
    for order in ((1, 2, 0), (2, 1, 0)):
        expected = straight[list(order)].permute(0, *(1 + axis for axis in order))
        torch.testing.assert_close(found(order), expected, rtol=0, atol=1e-3)  # components of single precision, summed in another order


def plain_convex(fixed, moving, reach):
    """Coupled convex optimisation with zeros outside, cell by cell in double precision, in the legacy convention; (3, d, h, w)."""
    channels, *shape = fixed.shape
    options = [np.array(k) - reach for k in np.ndindex(*[2 * reach + 1] * 3)]
    padded = np.pad(moving, [(0, 0)] + [(reach, reach)] * 3)
    apart = np.zeros((len(options), *shape))
    for number, k in enumerate(options):
        for p in np.ndindex(*shape):
            q = np.array(p) + k + reach
            apart[(number, *p)] = ((fixed[(slice(None), *p)] - padded[(slice(None), *q)]) ** 2).sum()

    def mean(volume):
        ends = np.pad(volume, 1)
        return np.array([ends[tuple(slice(i, i + 3) for i in p)].sum() / 27 for p in np.ndindex(*shape)]).reshape(shape)

    apart = np.stack([mean(mean(volume)) for volume in apart])
    smooth = np.zeros((3, *shape))
    for coupling in (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        chosen = np.zeros((3, *shape))
        for p in np.ndindex(*shape):
            cost = [apart[(number, *p)] + coupling * ((k - smooth[(slice(None), *p)]) ** 2).sum() for number, k in enumerate(options)]
            chosen[(slice(None), *p)] = options[int(np.argmin(cost))]
        smooth = np.stack([mean(component) for component in chosen])
    return smooth


def cells(channels, shape, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((1, channels, *shape))) for _ in range(2)]


def test_the_convex_step_is_that_of_plain_loops():
    fixed, moving = cells(3, (5, 4, 6))
    grids = LegacyGrids()
    found = coupled_convex(dissimilarity(fixed, moving, 1, grids), 1, grids)
    np.testing.assert_allclose(found[0].numpy(), plain_convex(fixed[0].numpy(), moving[0].numpy(), 1), atol=1e-9)


def test_the_convex_step_is_that_of_convexadam():
    utilities = pytest.importorskip("convexAdam.convex_adam_utils", reason="pip install convexadam==0.2.0")
    shape, step, reach = (8, 8, 8), 6, 2
    fixed, moving = (features.float() for features in cells(12, shape))
    grids, size = LegacyGrids(), [n * step for n in shape]
    width = 2 * reach + 1
    mesh = (
        torch.nn.functional.affine_grid(reach * torch.eye(3, 4)[None], (1, 1, width, width, width), align_corners=True).permute(0, 4, 1, 2, 3).reshape(3, -1, 1)
    )
    fields = [utilities.coupled_convex(*utilities.correlate(*pair, reach, step, size, 12), mesh, step, size) for pair in ((fixed, moving), (moving, fixed))]
    ours = [coupled_convex(dissimilarity(*pair, reach, grids), reach, grids) for pair in ((fixed, moving), (moving, fixed))]
    for one, other in zip(ours, fields):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    scale = (torch.tensor(shape).view(1, 3, 1, 1, 1) - 1) / 2
    expected = utilities.inverse_consistency(*[(field / scale).flip(1) for field in fields], iter=15)[0].flip(1) * scale
    torch.testing.assert_close(convex_registration(fixed, moving, reach, grids), expected, rtol=0, atol=1e-4)


def test_registration_gives_the_same_bits_twice():
    fixed, moving, _ = deformed_pair(24)
    settings = replace(SMALL, reach=2, iterations=10)
    assert torch.equal(register_features(fixed, moving, settings), register_features(fixed, moving, settings))


def test_the_number_of_channels_does_not_change_the_balance():
    fixed, moving, _ = deformed_pair(24)
    settings = replace(SMALL, reach=2, iterations=10)
    many = register_features(fixed.repeat(5, 1, 1, 1).double(), moving.repeat(5, 1, 1, 1).double(), settings)
    torch.testing.assert_close(many, register_features(fixed.double(), moving.double(), settings), rtol=0, atol=1e-6)


def test_presets_have_the_published_figures():
    dinoreg, medssl = PRESETS["dinoreg"], PRESETS["medssl"]
    assert (dinoreg.step, dinoreg.reach, dinoreg.adam_step, dinoreg.lr, dinoreg.iterations, dinoreg.regularisation) == (6, 4, 2, 3.0, 1000, 2.0)
    assert (dinoreg.window, dinoreg.passes, medssl.window, medssl.passes) == (7, 5, 3, 3)
    assert (medssl.scale, medssl.lr, medssl.reach, medssl.step, medssl.adam_step) == (0.1, 0.2, 1, 6, 4) and 0.06 <= medssl.regularisation <= 0.12


def test_what_cannot_be_registered_is_refused():
    with pytest.raises(UserError, match="differ in shape"):
        register_features(torch.zeros(1, 24, 24, 24), torch.zeros(1, 24, 24, 20))
    with pytest.raises(UserError, match="10x24x24 voxels is smaller than two cells of 6 voxels"):
        register_features(torch.zeros(1, 10, 24, 24), torch.zeros(1, 10, 24, 24))


def maps(seed, channels=20, grid=(5, 6, 7)):
    rng = np.random.default_rng(seed)
    values = np.einsum("ck,kzyx->czyx", np.random.default_rng(9).standard_normal((channels, 4)) * 5, rng.standard_normal((4, *grid)))
    values = (3 + values + 0.1 * rng.standard_normal((channels, *grid))).astype(np.float32)
    return FeatureMap(values, Geometry(grid, (4.0,) * 3), (4, 4, 4)), rng.random(grid) < 0.7


def test_components_are_common_to_both_images_and_standardised():
    (a, in_a), (b, in_b) = maps(1), maps(2)
    first, second = common_components([a, b], [in_a, in_b], 4)
    together = np.concatenate([first.values[:, in_a], second.values[:, in_b]], 1)
    np.testing.assert_allclose(together.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(together.std(1), 1, atol=1e-4)
    samples = np.concatenate([a.values[:, in_a], b.values[:, in_b]], 1).astype(np.float64)
    left = np.linalg.svd(samples - samples.mean(1, keepdims=True), full_matrices=False)[0]
    expected = left[:, :4].T @ (a.values[:, in_a] - samples.mean(1, keepdims=True))
    correlation = [abs(np.corrcoef(one, other)[0, 1]) for one, other in zip(first.values[:, in_a], expected)]
    np.testing.assert_allclose(correlation, 1, atol=1e-4)
    assert first.geometry == a.geometry


def test_components_have_the_same_bits_twice():
    pairs = [maps(1, grid=(22, 22, 22)), maps(2, grid=(22, 22, 22))]  # more cells than are sampled
    one, other = (common_components([found for found, _ in pairs], [np.ones((22,) * 3, bool)] * 2) for _ in range(2))
    assert all(np.array_equal(x.values, y.values) for x, y in zip(one, other)) and len(one[0].values) == 12


def test_dead_features_are_left_out_and_equal_ones_refused():
    found, inside = maps(1)
    narrow = replace(found, values=np.concatenate([found.values[:2], found.values[:2]]))
    assert len(common_components([narrow, narrow], [inside, inside])[0].values) == 2
    flat = replace(found, values=np.ones_like(found.values))
    with pytest.raises(UserError, match="the same everywhere"):
        common_components([flat, flat], [inside, inside])
