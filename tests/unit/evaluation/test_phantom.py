import numpy as np
import pytest
from scipy import ndimage

from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation.anatomy import LABELS
from nnssl_ext.evaluation.deform import diffeomorphism, jacobian_determinant, resize, warp
from nnssl_ext.evaluation.phantom import ALIKE, make_pair, make_phantom


@pytest.mark.parametrize("modality", ["CT", "MR", "MRFS"])
def test_a_phantom_is_a_function_of_seed_and_index(modality):
    first, again, other = (make_phantom(3, index, modality=modality) for index in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes() and first.labels.tobytes() == again.labels.tobytes()
    assert first.image.dtype == np.float32 and first.labels.dtype == np.uint8
    assert np.isfinite(first.image).all() and (first.labels != other.labels).any()


def test_every_label_is_present_inside_the_body_of_every_phantom():
    for index in range(12):
        phantom = make_phantom(0, index)
        counts = np.bincount(phantom.labels.ravel(), minlength=len(LABELS))
        assert counts.min() >= 80, (index, counts)
        assert phantom.body[phantom.labels > 0].all()


def test_the_anatomy_does_not_depend_on_modality_or_scan():
    ct, mr, follow_up = make_phantom(0, 1), make_phantom(0, 1, modality="MR"), make_phantom(0, 1, scan=1)
    assert (ct.labels == mr.labels).all() and (ct.labels == follow_up.labels).all()
    assert (ct.image != follow_up.image).any()


def test_organ_pairs_share_mean_and_deviation():
    # Voxels two or more away from the organ's surface: the partial volume of the rim depends on the neighbours.
    differences, ratios = {pair: [] for pair in ALIKE}, {pair: [] for pair in ALIKE}
    for index in range(8):
        phantom = make_phantom(0, index, (96, 96, 96), (2.0, 2.0, 2.0))
        for pair in ALIKE:
            a, b = (phantom.image[ndimage.binary_erosion(phantom.labels == LABELS[name], iterations=2)] for name in pair)
            if min(len(a), len(b)) > 50:
                differences[pair].append(float(a.mean() - b.mean()))
                ratios[pair].append(float(a.std() / b.std()))
    assert sum(len(v) > 0 for v in differences.values()) >= 3
    for pair in ALIKE:
        if differences[pair]:
            assert abs(np.mean(differences[pair])) < 8, (pair, differences[pair])  # HU; the noise has 14 to 26
            assert 0.8 < np.mean(ratios[pair]) < 1.25, (pair, ratios[pair])


def test_liver_and_spleen_differ_in_texture():
    ratios = []
    for index in range(4):
        phantom = make_phantom(0, index)
        smooth = ndimage.gaussian_filter(phantom.image, 1.0)
        liver, spleen = (ndimage.binary_erosion(phantom.labels == LABELS[name], iterations=3) for name in ("liver", "spleen"))
        ratios.append(smooth[spleen].std() / smooth[liver].std())
    assert np.mean(ratios) > 1.4  # the coarse texture of the spleen survives smoothing


def test_anisotropic_grids_hold_the_whole_anatomy():
    phantom = make_phantom(0, 0, (40, 64, 72), (5.0, 3.0, 2.5), modality="MR")
    assert phantom.image.shape == (40, 64, 72) and set(np.unique(phantom.labels)) == set(LABELS.values())


def test_lesions_match_in_size_and_mean_and_differ_in_margin_and_texture():
    surfaces, deviations, means = [], [], []
    for index in range(6):
        benign, malignant = (make_phantom(0, index, lesion=kind) for kind in ("benign", "malignant"))
        a, b = benign.lesions > 0, malignant.lesions > 0
        assert a.sum() == b.sum() > 0 and set(np.unique(malignant.lesions)) == {0, 2}
        assert (benign.labels[a] == LABELS["liver"]).all() and (malignant.labels[b] == LABELS["liver"]).all()
        surfaces.append((b & ~ndimage.binary_erosion(b)).sum() / (a & ~ndimage.binary_erosion(a)).sum())
        deviations.append(malignant.image[b].std() - benign.image[a].std())
        means.append(malignant.image[b].mean() - benign.image[a].mean())
    assert np.mean(surfaces) > 1.15 and np.mean(deviations) > 3 and abs(np.mean(means)) < 4


def _mean_dice(a, b):
    return np.mean([2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in range(1, len(LABELS))])


def test_the_known_field_of_a_pair_registers_it():
    before, after = [], []
    for index in range(4):
        pair = make_pair(0, index)
        warped = warp(pair.moving.labels, pair.displacement, pair.moving.spacing, order=0)
        before.append(_mean_dice(pair.fixed.labels, pair.moving.labels))
        after.append(_mean_dice(pair.fixed.labels, warped))
        assert jacobian_determinant(pair.displacement, pair.fixed.spacing).min() > 0 and pair.landmarks.shape == (32, 2, 3)
    assert min(after) > 0.87 and np.mean(before) < np.mean(after) - 0.15


def test_an_aligned_pair_has_no_displacement():
    pair = make_pair(0, 0, max_mm=0.0)
    assert not pair.displacement.any() and (pair.fixed.labels == pair.moving.labels).all()


def test_a_diffeomorphism_respects_its_bound_and_its_inverse_undoes_it():
    shape, spacing = (40, 48, 44), (3.0, 2.0, 2.5)
    forward, backward = diffeomorphism(np.random.default_rng(0), shape, spacing, 12.0, 40.0)
    lengths = np.sqrt((forward**2).sum(0))
    assert 5.0 < lengths.max() <= 12.0 and jacobian_determinant(forward, spacing).min() > 0
    residual = forward + np.stack([warp(component, forward, spacing) for component in backward])
    assert np.sqrt((residual**2).sum(0)).max() < 0.5  # mm


def test_spline_resizing_keeps_linear_functions():
    ramp = np.linspace(0, 1, 5)[:, None, None] + np.zeros((5, 4, 6))
    assert np.allclose(resize(ramp, (17, 9, 11)), np.linspace(0, 1, 17)[:, None, None], atol=1e-5)


def test_unknown_modalities_and_lesions_are_user_errors():
    with pytest.raises(UserError, match="modality"):
        make_phantom(0, 0, modality="PET")
    with pytest.raises(UserError, match="lesion"):
        make_phantom(0, 0, lesion="cyst")
