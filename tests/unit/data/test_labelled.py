"""Labels of views: those of the nearest voxels, whatever was done to the crop."""

import numpy as np
import pytest

from benchmarks.common import ArrayLabels
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.labelled import Labelled, read_labels
from nnssl_ext.data.spatial import MIRROR, Spatial, is_slicing, make_affine, rotation_matrix
from nnssl_ext.data.views import Crop
from tests.make_data import ArrayStore

SHAPE, SIZE = (11, 13, 12), (6, 5, 8)
NUMBERS = np.random.default_rng(0).integers(1, 9, (1, *SHAPE)).astype(np.uint8)
LABELS = ArrayLabels([NUMBERS], 8)


def by_loop(affine, size):
    """Labels of the nearest voxels, one after the other; 0 outside."""
    found = np.zeros(size, np.float32)
    for place in np.ndindex(*size):
        there = np.rint(affine[:, :3] @ place + affine[:, 3]).astype(int)
        if all(0 <= p < n for p, n in zip(there, SHAPE)):
            found[place] = NUMBERS[(0, *there)]
    return found


@pytest.mark.parametrize("mirrored", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("centre", [(5.5, 6, 5.5), (1.5, 11, 5.5), (-3.5, 6, 5.5)])
def test_a_shifted_and_mirrored_crop_has_the_labels_of_its_voxels_and_0_beyond_the_case(centre, mirrored):
    affine = make_affine(centre, SIZE, (1, 1, 1), np.eye(3), np.ones(3), mirrored)
    assert is_slicing(affine)
    found = read_labels(LABELS, 0, affine, SIZE)
    assert found.dtype == np.float32 and found.shape == (1, *SIZE) and np.array_equal(found[0], by_loop(affine, SIZE))


@pytest.mark.parametrize("centre", [(5.3, 6.1, 5.7), (0.2, 12, 9)])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (25, -14, 40)])
def test_a_turned_and_zoomed_crop_has_the_labels_of_the_nearest_voxels(degrees, centre):
    affine = make_affine(centre, SIZE, (1.0, 2.0, 1.5), rotation_matrix(np.array(degrees)), np.array([1.3, 0.8, 1.1]), (False, True, False))
    found = read_labels(LABELS, 0, affine, SIZE)
    assert found.dtype == np.float32 and np.array_equal(found[0], by_loop(affine, SIZE)) and set(np.unique(found)) <= set(range(9))


@pytest.mark.parametrize("spatial", [MIRROR, Spatial((30.0, 30.0, 30.0), 1.0)])
def test_every_view_stands_beside_its_labels_and_is_what_it_was(spatial):
    store = ArrayStore(1, SHAPE)
    for spec in (IoUPair(SIZE, (0.2, 1.0), spatial=spatial), Crop(SIZE, spatial=spatial)):
        plain, labelled = (s.sample(store, 0, sample_rng(0, 3)) for s in (spec, Labelled(spec, LABELS)))
        assert list(labelled) == [*plain, *(f"{name}_labels" for name in plain)]
        for name, view in plain.items():
            assert np.array_equal(labelled[name].image, view.image)
            beside = labelled[f"{name}_labels"]
            assert np.array_equal(beside.image[0], by_loop(view.affine, SIZE)) and np.array_equal(beside.affine, view.affine) and beside.intensity == ()
