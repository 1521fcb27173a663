"""Crops, and the affines that say where they lie."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data import sampling
from nnssl_ext.data import views as data_views
from nnssl_ext.data.spatial import MIRROR, NNUNET, NONE, Spatial, between, bounds, nnunet, to_case
from nnssl_ext.data.views import Crop, MultiCrop, read_box, read_crops
from tests.make_data import ArrayStore

STRONG = Spatial((40.0, 40.0, 40.0), 1.0, ((0.6, 1.5), (0.7, 1.4), (0.8, 1.3)), 1.0)


def coordinate_store(shape=(40, 48, 44), spacing=(3.0, 3.0, 3.0)) -> ArrayStore:
    """A case whose three channels hold each voxel's own z, y and x."""
    store = ArrayStore(1, shape, spacing=spacing)
    store.arrays = [np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)]
    return store


def values_at(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Every channel at a fractional voxel."""
    return np.array([map_coordinates(channel.astype(float), place[:, None], order=1)[0] for channel in image])


def grid(size) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1)


def test_an_axis_that_is_too_short_is_centred_and_padded_with_the_background():
    store = ArrayStore(1, shape=(5, 20, 20), channels=2)
    view = Crop((9, 8, 8), NONE, body=0).sample(store, 0, sample_rng(0, 0))["image"]
    assert view.affine[0, 3] == -2
    inside = tuple(slice(int(low), int(low) + 8) for low in view.affine[1:, 3])
    assert np.array_equal(view.image[:, 2:7], store.arrays[0][(slice(None), slice(None), *inside)])
    for channel in range(2):
        assert np.all(view.image[channel, :2] == store.fill(0)[channel])
        assert np.all(view.image[channel, 7:] == store.fill(0)[channel])


def test_a_box_that_misses_the_case_is_all_background():
    store = ArrayStore(1, shape=(5, 6, 7))
    assert np.all(read_box(store, 0, ((-9, -3), (2, 4), (8, 9))) == store.fill(0)[0])


def test_a_mirrored_crop_is_a_slice_bit_for_bit():
    store = ArrayStore(channels=2)
    for i in range(20):
        view = Crop((16, 24, 12), MIRROR).sample(store, 3, sample_rng(1, i))["image"]
        voxels = to_case(view.affine, grid((16, 24, 12))).astype(int)
        assert np.array_equal(view.image, store.arrays[3][:, voxels[..., 0], voxels[..., 1], voxels[..., 2]])
        assert view.image.flags.c_contiguous


def test_each_axis_is_mirrored_half_of_the_time():
    store = ArrayStore(1, shape=(4, 4, 4))
    flips = np.array([np.diag(Crop((4, 4, 4)).sample(store, 0, sample_rng(0, i))["image"].affine) < 0 for i in range(2000)])
    assert np.abs(flips.mean(0) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(flips.T) - np.eye(3)).max() < 0.1
    axes = [Crop((4, 4, 4), Spatial(mirror=(False, True, False))).sample(store, 0, sample_rng(0, i))["image"].affine for i in range(50)]
    assert all(affine[0, 0] == 1 and affine[2, 2] == 1 for affine in axes) and {affine[1, 1] for affine in axes} == {-1, 1}


def test_crops_can_be_mirrored_more_rarely():
    flips = np.array([Spatial(p_mirror=0.4).draw_mirror(sample_rng(0, i)) for i in range(4000)])
    assert np.abs(flips.mean(0) - 0.2).max() < 0.03 and abs(flips.any(1).mean() - 0.4 * 7 / 8) < 0.03
    assert not any(Spatial(p_mirror=0.0).draw_mirror(sample_rng(0, i)).any() for i in range(50))


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (5.0, 1.0, 0.8)])
def test_every_voxel_of_a_turned_crop_lies_where_the_affine_says(spacing):
    store, spec = coordinate_store((60, 64, 70), spacing), Crop((12, 15, 10), STRONG)
    seen = 0
    for i in range(20):
        view = spec.sample(store, 0, sample_rng(2, i))["image"]
        there = to_case(view.affine, grid((12, 15, 10)))
        inside = ((there >= 0) & (there <= np.array(store.shape(0)) - 1)).all(-1)
        assert np.abs(np.moveaxis(view.image, 0, -1) - there)[inside].max() < 1e-3
        seen += inside.sum()
    assert seen > 20000


@pytest.mark.parametrize("spec", [Crop((16, 12, 14), STRONG), Crop((16, 12, 14), MIRROR), MultiCrop((16, 12, 14), (8, 6, 7), 3, spatial=STRONG)])
def test_a_landmark_of_one_view_is_found_in_another_view(spec):
    store = coordinate_store((60, 64, 70), (2.0, 1.0, 1.5))
    found = 0
    for i in range(20):
        first, second = spec.sample(store, 0, sample_rng(3, 2 * i)), spec.sample(store, 0, sample_rng(3, 2 * i + 1))
        for a, b in [(a, b) for a in first.values() for b in [*second.values(), *first.values()]]:
            size = np.array(b.image.shape[1:])
            marks = np.argwhere(np.ones(a.image.shape[1:], bool))
            there, case = to_case(between(a.affine, b.affine), marks), to_case(a.affine, marks)
            keep = ((there >= 0) & (there <= size - 1) & (case >= 4) & (case <= np.array(store.shape(0)) - 5)).all(1)  # beyond the case is background
            for mark, place in list(zip(marks[keep], there[keep]))[::97]:
                value = values_at(b.image, place)
                assert np.abs(value - a.image[(slice(None), *mark)]).max() < 1e-3
                found += 1
    assert found > 200


def test_rotation_keeps_lengths_in_mm():
    spacing = np.array([5.0, 1.0, 0.7])
    store = coordinate_store((60, 64, 70), spacing)
    for i in range(50):
        affine = Crop((8, 9, 10), Spatial((180.0, 180.0, 180.0), 1.0)).sample(store, 0, sample_rng(0, i))["image"].affine
        turn = spacing[:, None] * affine[:, :3] / spacing
        assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-12)


def test_chances_angles_and_zooms_are_those_of_the_preset():
    zooms, turned = [], []
    for i in range(4000):
        rng = sample_rng(7, i)
        zoom = NNUNET.draw_zoom(rng)
        assert len(set(zoom)) == 1
        zooms.append(zoom[0])
        turned.append(not np.array_equal(NNUNET.draw_turn(rng)[0], np.eye(3)))
    assert abs(np.mean(turned) - 0.2) < 0.02
    zoomed = np.array(zooms)[np.array(zooms) != 1]
    assert abs(len(zoomed) / 4000 - 0.2) < 0.02
    assert zoomed.min() > 0.7 and zoomed.max() < 1.4 and abs(zoomed.mean() - 1.05) < 0.02


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_angles_are_uniform_about_their_axis_and_of_the_right_sense(axis):
    spatial, (first, second) = Spatial(tuple(np.eye(3)[axis] * 25), 1.0), ((axis + 1) % 3, (axis + 2) % 3)
    angles = []
    for i in range(2000):
        matrix = spatial.draw_turn(sample_rng(0, i))[0]
        assert np.array_equal(matrix[axis], np.eye(3)[axis])
        angles.append(np.rad2deg(np.arctan2(matrix[second, first], matrix[first, first])))
    assert np.abs(np.quantile(angles, (0.1, 0.25, 0.5, 0.75, 0.9)) - [-20, -12.5, 0, 12.5, 20]).max() < 1.5


def test_thick_slices_are_turned_and_zoomed_within_their_planes():
    assert nnunet((64, 64, 64)) is NNUNET
    spatial = nnunet((16, 96, 96))
    for i in range(300):
        rng = sample_rng(0, i)
        assert spatial.draw_zoom(rng)[0] == 1
        assert np.array_equal(spatial.draw_turn(rng)[0][0], [1, 0, 0])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spec", [Crop((16, 16, 16), STRONG), MultiCrop((24, 24, 24), (12, 12, 12), 2, spatial=STRONG)], ids=["crop", "multi-crop"])
def test_crops_of_slices_are_turned_zoomed_and_mirrored_in_their_plane_and_show_one_slice(spec, axis):
    flat = {name: tuple(1 if other == axis else n for other, n in enumerate(size)) for name, size in vars(spec).items() if name.endswith("size")}
    spec, store, turned = replace(spec, **flat), coordinate_store(spacing=(2.0, 3.0, 4.0)), 0
    seen, mirrored = set(), set()
    for i in range(40):
        views = spec.sample(store, 0, sample_rng(0, i))
        (number,) = {float(view.affine[axis, 3]) for view in views.values()}  # all crops show the same slice
        assert number % 1 == 0
        for view in views.values():
            inside = view.image[axis][tuple(np.array(view.image.shape[1:]) // 2)]  # corners that are turned out of the case are padded
            assert inside == number and view.image[axis].max() <= max(number, 0)  # interpolated with no other slice
            matrix = np.delete(np.delete(view.affine[:, :3], axis, 0), axis, 1)
            assert view.affine[axis, axis] == 1 and np.count_nonzero(view.affine[axis, :3]) == np.count_nonzero(view.affine[:, axis]) == 1
            turned += abs(matrix[0, 1]) > 0.01
            mirrored.add(bool(np.linalg.det(matrix) < 0))
        seen.add(number)
    assert turned >= 36 and len(seen) > 15 and mirrored == {False, True}


def test_multi_crop_of_slices_shows_the_wanted_shares_of_the_sampling_area():
    store, spec, shares = ArrayStore(1, shape=(6, 100, 110)), MultiCrop((1, 24, 24), (1, 12, 12), 2, spatial=MIRROR), {"global": [], "local": []}
    for i in range(150):
        for name, view in spec.sample(store, 0, sample_rng(0, i)).items():
            shares[name.split("_")[0]].append(abs(np.linalg.det(view.affine[:, :3])) * np.prod(view.image.shape[1:]) / 36**2)
    assert 0.25 <= min(shares["global"]) and max(shares["global"]) <= 1 and abs(np.mean(shares["global"]) - 0.625) < 0.04
    assert 0.03 <= min(shares["local"]) and max(shares["local"]) <= 0.25 and abs(np.mean(shares["local"]) - 0.14) < 0.015


def test_a_zoomed_crop_stays_inside_the_case_before_it_is_turned():
    store = ArrayStore(1, shape=(40, 44, 36))
    spec = Crop((20, 20, 20), Spatial(zoom=((0.7, 1.6),) * 3, p_zoom=1.0))
    for i in range(200):
        for (low, high), n in zip(bounds(spec.sample(store, 0, sample_rng(0, i))["image"].affine, (20, 20, 20)), store.shape(0)):
            assert 0 <= low and high <= n


def test_interpolated_and_sliced_crops_of_one_read_equal_those_read_alone():
    store = ArrayStore(channels=2)
    affines = [Crop((10, 12, 8), spatial).sample(store, 0, sample_rng(1, i))["image"].affine for i, spatial in enumerate((MIRROR, STRONG, MIRROR, STRONG))]
    together = read_crops(store, 0, affines, [(10, 12, 8)] * 4)
    for affine, image in zip(affines, together):
        assert np.abs(read_crops(store, 0, [affine], [(10, 12, 8)])[0] - image).max() < 1e-4


def test_multi_crop_shows_the_wanted_shares_of_a_box_around_them():
    spec = MultiCrop((24, 24, 24), (12, 12, 12), 4, spatial=MIRROR)
    store = ArrayStore(1, shape=(90, 100, 110))
    shares = {"global": [], "local": []}
    for i in range(150):
        views = spec.sample(store, 0, sample_rng(0, i))
        assert list(views) == ["global_0", "global_1", "local_0", "local_1", "local_2", "local_3"]
        boxes = [bounds(view.affine, view.image.shape[1:]) for view in views.values()]
        for axis in range(3):
            assert max(box[axis][1] for box in boxes) - min(box[axis][0] for box in boxes) <= 36
        for name, view in views.items():
            shares[name.split("_")[0]].append(abs(np.linalg.det(view.affine[:, :3])) * np.prod(view.image.shape[1:]) / 36**3)
    assert 0.25 <= min(shares["global"]) and max(shares["global"]) <= 1 and abs(np.mean(shares["global"]) - 0.625) < 0.04
    assert 0.03 <= min(shares["local"]) and max(shares["local"]) <= 0.25 and abs(np.mean(shares["local"]) - 0.14) < 0.01


def test_all_crops_of_a_volume_are_mirrored_alike_and_volumes_each_in_their_way():
    store, spec, found = ArrayStore(), MultiCrop((16, 16, 16), (8, 8, 8), 3), set()
    for seed in range(64):
        axes = {tuple(np.diag(view.affine[:, :3]) < 0) for view in spec.sample(store, 0, sample_rng(seed, 0)).values()}  # turned by 10 degrees at most
        assert len(axes) == 1
        found |= axes
    assert len(found) == 8


@pytest.mark.parametrize(("shape", "inside"), [((30, 60, 50), True), ((14, 40, 30), False)])
def test_multi_crop_of_a_small_case_keeps_proportions_and_is_magnified_no_more_than_elsewhere(shape, inside):
    store, spec = ArrayStore(1, shape=shape), MultiCrop((24, 24, 24), (12, 12, 12), 2, spatial=NONE)
    for i in range(20):
        for name, view in spec.sample(store, 0, sample_rng(0, i)).items():
            zoom = np.diag(view.affine)
            assert np.allclose(zoom, zoom[0])
            assert zoom[0] >= ((0.25 if name.startswith("global") else 0.03 * 8) ** (1 / 3) * 1.5) * (1 - 1e-9)
            if inside:
                assert all(0 <= low and high <= n for (low, high), n in zip(bounds(view.affine, view.image.shape[1:]), shape))


def overlap(first, second) -> float:
    """IoU of two views that are not turned, of the whole voxels of the case that each of them spans."""
    lows, highs = [], []
    for view in (first, second):
        reach, zoom = np.array(view.image.shape[1:]) - 1, np.abs(np.diag(view.affine))
        edges = np.ceil(np.round(reach * zoom, 6)) + 1
        lows.append(np.round(to_case(view.affine, reach / 2) - (edges - 1) / 2))
        highs.append(lows[-1] + edges)
    shared = np.prod(np.maximum(0, np.minimum(*highs) - np.maximum(*lows)))
    return float(shared / (sum(np.prod(high - low) for low, high in zip(lows, highs)) - shared))


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.6), (0.5, 0.7), (0.45, 0.5)])
@pytest.mark.parametrize("size", [(24, 24, 24), (16, 24, 28)], ids=str)
def test_the_large_crops_overlap_as_much_as_wanted(low, high, size):
    store, spec = ArrayStore(1, shape=(60, 70, 80)), MultiCrop(size, (8, 8, 8), 1, spatial=MIRROR, overlap=(low, high))
    found = []
    for i in range(40):
        views = spec.sample(store, 0, sample_rng(0, i))
        found.append(overlap(views["global_0"], views["global_1"]))
    assert low <= min(found) and max(found) <= high
    free = [overlap(*list(replace(spec, overlap=None).sample(store, 0, sample_rng(0, i)).values())[:2]) for i in range(40)]
    assert min(free) < low and max(free) > high


def test_where_the_wanted_overlap_is_impossible_the_nearest_of_64_pairs_is_taken(monkeypatch):
    store, tried = ArrayStore(1, shape=(60, 70, 80)), []
    monkeypatch.setattr(data_views, "iou", lambda *boxes: tried.append(sampling.iou(*boxes)) or tried[-1])
    for i in range(10):
        for wanted, nearest in (((0.0, 0.01), min), ((1.0, 1.0), max)):
            tried.clear()
            spec = MultiCrop((16, 16, 16), (8, 8, 8), 0, spatial=MIRROR, overlap=wanted)
            found = overlap(*spec.sample(store, 0, sample_rng(1, i)).values())
            assert found == pytest.approx(nearest(tried)) and (len(tried) == 64 or wanted[0] <= found <= wanted[1])
    alone = MultiCrop((16, 16, 16), (8, 8, 8), 0, spatial=MIRROR, overlap=(0.2, 0.4)).sample(ArrayStore(1, shape=(16, 16, 16)), 0, sample_rng(0, 0))
    assert overlap(*alone.values()) == 1


def test_an_overlap_that_any_pair_has_changes_nothing():
    store, spec = ArrayStore(), MultiCrop((16, 16, 16), (8, 8, 8), 3)
    plain, wide = (one.sample(store, 0, sample_rng(2, 0)) for one in (spec, replace(spec, overlap=(0.0, 1.0))))
    assert all(np.array_equal(plain[name].image, wide[name].image) for name in plain)


def test_views_are_pure_functions_of_seed_and_index():
    store = ArrayStore()
    for spec in (Crop((16, 16, 16), STRONG), MultiCrop((16, 16, 16), (8, 8, 8), 3)):
        first, again, other = (spec.sample(store, 0, sample_rng(5, n)) for n in (7, 7, 8))
        assert all(np.array_equal(first[name].image, again[name].image) for name in first)
        assert not any(np.array_equal(first[name].image, other[name].image) for name in first)
