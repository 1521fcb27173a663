"""Two large crops with a given overlap and small ones around them."""

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import DINO
from nnssl_ext.data.overlapping import OverlappingCrops
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import NONE, bounds
from tests.make_data import ArrayStore

ZOOMED = {"iou": (0.3, 1.0), "global_zoom": (0.9, 1.25), "local_zoom": (0.5, 1.0)}


def drawn(shape, count=25, **options):
    """Boxes and views of samples of one case."""
    store, spec = ArrayStore(1, shape), OverlappingCrops((16, 12, 16), (8, 8, 8), **options)
    for number in range(count):
        views = spec.sample(store, 0, sample_rng(0, number))
        yield {name: bounds(view.affine, view.image.shape[1:]) for name, view in views.items()}, views


@pytest.mark.parametrize("shape", [(40, 48, 44), (16, 30, 20), (16, 12, 16), (10, 12, 30)], ids=str)
@pytest.mark.parametrize("options", [{}, {"iou": (0.6, 0.8)}, ZOOMED], ids=["default", "high", "zoomed"])
def test_the_iou_of_the_large_crops_lies_in_the_interval_in_cases_of_any_size(options, shape):
    low, high = options.get("iou", (0.3, 0.6))
    for boxes, views in drawn(shape, locals=2, **options):
        assert list(views) == ["global_0", "global_1", "local_0", "local_1"]
        assert [view.image.shape for view in views.values()] == [(1, 16, 12, 16)] * 2 + [(1, 8, 8, 8)] * 2
        assert low <= iou(boxes["global_0"], boxes["global_1"]) <= high


def test_small_crops_lie_around_the_large_ones_and_all_of_them_within_a_case_that_is_large_enough():
    places = []
    for boxes, _ in drawn((40, 48, 44), locals=6, **ZOOMED):
        large = [boxes.pop("global_0"), boxes.pop("global_1")]
        assert all(0 <= low and high <= n for box in [*large, *boxes.values()] for (low, high), n in zip(box, (40, 48, 44)))
        around = [(min(a, b), max(c, d)) for (a, c), (b, d) in zip(*large)]
        assert all(first <= low and high <= last for box in boxes.values() for (low, high), (first, last) in zip(box, around))
        places += [tuple((low - first) / (last - first) for (low, _), (first, last) in zip(box, around)) for box in boxes.values()]
    assert len(set(places)) == 6 * 25 and np.std(places, axis=0).min() > 0.1  # all six, in other places


def test_large_and_small_crops_show_more_or_less_of_the_case_by_their_own_factor():
    zooms = [[np.abs(np.diag(view.affine[:, :3])) for view in views.values()] for _, views in drawn((60, 60, 60), 60, locals=1, **ZOOMED)]
    assert all(np.allclose(zoom, zoom[0]) for sample in zooms for zoom in sample)  # alike along all axes
    large, small = np.array(zooms)[:, :2, 0].ravel(), np.array(zooms)[:, 2, 0]
    for found, (low, high) in ((large, (0.9, 1.25)), (small, (0.5, 1.0))):
        assert found.min() >= low and found.max() <= high and np.ptp(found) > 0.8 * (high - low)
    fitting = [zoom for _, views in drawn((18, 60, 60), **ZOOMED) for zoom in np.abs(views["global_0"].affine[:1, 0])]
    assert max(fitting) <= 17 / 15  # no more than the case


def test_crops_without_zoom_are_voxels_of_the_case_and_each_has_its_own_augmentation():
    store = ArrayStore(1, (40, 48, 44))
    for boxes, views in drawn((40, 48, 44), 5, locals=2, spatial=NONE, intensity=DINO):
        for name, view in views.items():
            assert np.array_equal(view.image, store.read(0, boxes[name]))
        assert len({view.intensity for view in views.values()}) > 1


def test_all_crops_are_mirrored_alike():
    mirrored = [{tuple(np.diag(view.affine[:, :3]) < 0) for view in views.values()} for _, views in drawn((40, 48, 44), 40, locals=2)]
    assert all(len(kinds) == 1 for kinds in mirrored) and len(set().union(*mirrored)) == 8


def test_crops_of_slices_are_of_one_slice():
    store, spec = ArrayStore(1, (20, 40, 40)), OverlappingCrops((1, 16, 16), (1, 8, 8), locals=2, **ZOOMED)
    for number in range(10):
        views = spec.sample(store, 0, sample_rng(0, number))
        assert len({float(view.affine[0, 3]) for view in views.values()}) == 1 and all(tuple(view.affine[0, :3]) == (1, 0, 0) for view in views.values())
