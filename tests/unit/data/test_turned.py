"""Turned pairs: quarter turns that the affines know, in a plane that allows them, and boxes."""

import numpy as np
import pytest
import torch

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.spatial import NONE, to_case
from nnssl_ext.data.turned import TurnedPair, Turning, boxes, choose_turning, turn, turns
from nnssl_ext.data.views import Crop
from nnssl_ext.nn.corruption import turn as turn_tensor
from tests.make_data import ArrayStore

PLANES = [(1, 2), (0, 2), (0, 1)]
CUBE = (12, 12, 12)


class CoordinateStore(ArrayStore):
    """One case whose three channels hold the (z, y, x) of their voxels."""

    def __init__(self) -> None:
        super().__init__(1, (20, 24, 22), channels=3)
        self.arrays = [np.stack(np.meshgrid(*map(np.arange, (20, 24, 22)), indexing="ij")).astype(np.float32)]


def samples(count, **options):
    spec = TurnedPair(Crop(CUBE, NONE), Turning(CUBE, (1, 2), (0, 1, 2, 3)), **options)
    return [spec.sample(CoordinateStore(), 0, sample_rng(0, i)) for i in range(count)]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("times", range(4))
def test_the_affine_of_a_turned_crop_says_where_its_voxels_come_from_and_how_often_it_is_turned(plane, times):
    clean = Crop(CUBE, NONE).sample(CoordinateStore(), 0, sample_rng(0, 0))["image"]
    image, affine = turn(clean.image, clean.affine, times, plane)
    places = np.stack(np.meshgrid(*map(np.arange, CUBE), indexing="ij"), -1)
    assert np.allclose(np.moveaxis(image, 0, -1), to_case(affine, places))
    assert turns(torch.tensor(affine[None]), torch.tensor(clean.affine[None]), plane).tolist() == [times]
    back = np.rot90(image, -times, (plane[0] + 1, plane[1] + 1))
    assert np.array_equal(back, clean.image)
    assert np.array_equal(turn_tensor(torch.from_numpy(clean.image[None]), torch.tensor([times]), plane)[0].numpy(), image)


def test_half_a_turn_keeps_the_size_of_any_crop():
    clean = Crop((6, 12, 10), NONE).sample(CoordinateStore(), 0, sample_rng(0, 0))["image"]
    image, affine = turn(clean.image, clean.affine, 2, (0, 1))
    places = np.stack(np.meshgrid(*map(np.arange, (6, 12, 10)), indexing="ij"), -1)
    assert image.shape == (3, 6, 12, 10) and np.allclose(np.moveaxis(image, 0, -1), to_case(affine, places))


def test_label_and_crop_agree_in_every_sample_and_all_turns_are_equally_frequent():
    counts = np.zeros((2, 4))
    for views in samples(300, noise=0.0, hidden=0.0):
        target = views["target"]
        for i in range(2):
            view = views[f"image_{i}"]
            label = int(turns(torch.tensor(view.affine[None]), torch.tensor(target.affine[None]), (1, 2)))
            assert np.array_equal(np.rot90(view.image, -label, (2, 3)), target.image)
            counts[i, label] += 1
    assert (((counts - 75) ** 2 / 75).sum(1) < 16.3).all()  # chi-square, 3 degrees of freedom, p = 0.001


def test_noise_and_hidden_boxes_cover_up_to_their_share_and_the_rest_is_untouched():
    noisy, hidden = [], []
    for views in samples(100, noise=0.3, hidden=0.2):
        target = views["target"]
        for i in range(2):
            view = views[f"image_{i}"]
            label = int(turns(torch.tensor(view.affine[None]), torch.tensor(target.affine[None]), (1, 2)))
            changed = (view.image != np.rot90(target.image, label, (2, 3))).any(0)
            noisy.append(changed.mean())
            hidden.append(view.mask.mean())
            low, high = target.image.min((1, 2, 3)), target.image.max((1, 2, 3))
            assert (view.image.min((1, 2, 3)) >= low).all() and (view.image.max((1, 2, 3)) <= high).all()
    assert max(noisy) <= 0.3 and max(hidden) <= 0.2
    assert np.mean(noisy) == pytest.approx(0.15, abs=0.03) and np.mean(hidden) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("shape", [(16, 16, 16), (4, 40, 33), (1, 2, 3)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1e-9, 0.9])
def test_boxes_never_exceed_their_share_and_come_near_it(shape, share):
    rng = np.random.default_rng(0)
    found = [boxes(shape, share, rng) for _ in range(10)]
    largest = np.prod([max(1, n // 4) for n in shape])
    for chosen in found:
        assert chosen.shape == shape and share - largest / chosen.size <= chosen.mean() <= share


STRIDE = (8, 8, 8)
EVEN = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("patch", "spacing", "stride", "expected"),
    [
        ((64, 64, 64), EVEN, STRIDE, ((64, 64, 64), (1, 2))),  # about z where all are alike
        ((96, 96, 64), EVEN, STRIDE, ((96, 96, 64), (0, 1))),  # an equal-sided plane before any cropping
        ((32, 96, 96), (3.0, 1.0, 1.0), STRIDE, ((32, 96, 96), (1, 2))),
        ((32, 96, 80), (3.0, 1.0, 1.0), STRIDE, ((32, 80, 80), (1, 2))),  # cropped to a square
        ((64, 64, 48), (1.5, 1.0, 1.0), STRIDE, ((64, 48, 48), (1, 2))),  # equal edges of unequal spacing are no square
        ((64, 96, 80), EVEN, (4, 8, 8), ((64, 80, 80), (1, 2))),  # what is left is largest
        ((24, 40, 24), (1.0, 1.0, 2.0), (8, 5, 8), None),  # no edge of a square is a multiple of 40
        ((64, 64, 64), (3.0, 1.0, 0.9), STRIDE, None),
        ((64, 64, 64), None, STRIDE, None),
        ((1, 96, 80), (None, 1.0, 1.0), (1, 16, 16), ((1, 80, 80), (1, 2))),  # slices are turned in their plane
        ((96, 1, 80), (1.0, None, 1.0), (16, 1, 16), ((80, 1, 80), (0, 2))),
    ],
)
def test_the_plane_has_equal_spacing_and_equal_sides_that_the_strides_divide(patch, spacing, stride, expected):
    turning = choose_turning(patch, spacing, stride)
    if expected is None:
        assert turning == Turning(patch, (1, 2), (0, 2))
    else:
        assert turning == Turning(*expected, (0, 1, 2, 3))
        assert all(edge % step == 0 for edge, step in zip(turning.size, stride))


def test_slices_of_unequal_spacing_are_turned_by_half_a_turn_in_their_plane():
    assert choose_turning((96, 96, 1), (1.0, 0.8, None), (16, 16, 1)) == Turning((96, 96, 1), (0, 1), (0, 2))


def test_nearly_equal_spacing_counts_as_equal():
    assert choose_turning((64, 64, 64), (3.0, 0.78125, 0.7813), STRIDE).turns == (0, 1, 2, 3)
