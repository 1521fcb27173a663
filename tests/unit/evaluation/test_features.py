"""Dense features of volumes: against the backbone's own, whole volumes seen at once, and known positions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.features import Extractor, PrincipalComponents, window_starts, window_weights
from nnssl_ext.nn.backbones.base import Backbone, build_backbone
from tests.make_data import slice_plan, tiny_plan

PLAN = tiny_plan()
GEOMETRY = ((2.0, 1.5, 1.0), (5.0, -7.0, 11.0), (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))  # spacing (z, y, x), origin, turned about z


class Means(Backbone):
    """Mean of each cell and its square: features that don't depend on where a window lies."""

    def __init__(self, cell=(2, 4, 4), patch_size=(8, 8, 16)) -> None:
        torch.nn.Module.__init__(self)
        self.strides, self.widths, self.patch_size = (cell,), (2,), patch_size

    def pyramid(self, x):
        assert tuple(x.shape[2:]) == tuple(self.patch_size)
        mean = F.avg_pool3d(x, self.strides[0])
        return [torch.cat((mean, mean**2), 1)]


def volume(*shape, channels=1):
    return np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)


def geometry(array):
    return Geometry(array.shape[1:], *GEOMETRY)


def backbone_of(family, channels=1):
    torch.manual_seed(0)
    return build_backbone(PLAN.configuration("3d_fullres"), family, channels)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("family", "size"),
    [("primus", None), ("primus", (8, 24, 16)), ("resenc", None), ("resenc", (24, 16, 32)), ("segformer3d", (8, 24, 16)), ("segformer3d", (4, 4, 4))],
)
def test_a_volume_that_is_one_window_large_has_the_features_of_the_backbone_bit_for_bit(family, size, channels):
    extractor = Extractor(backbone_of(family, channels), size)
    image = volume(*extractor.size, channels=channels)
    found = extractor.features(image, geometry(image))
    with torch.no_grad():
        expected = backbone_of(family, channels).eval().dense(torch.from_numpy(image)[None])[0]
    assert found.values.dtype == np.float32 and np.array_equal(found.values, expected.numpy()) and found.values.std() > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_have_the_same_features_one_by_one_and_several_at_a_time(axis):
    torch.manual_seed(0)
    backbone = build_backbone(slice_plan(axis=axis).configuration("2d"), "resenc", 1)
    shape, window = ([*plane[:axis], across, *plane[axis:]] for plane, across in (((24, 20), 6), ((16, 16), 4)))
    image = volume(*shape)
    alone, several = (Extractor(backbone, size).features(image, geometry(image)) for size in (None, tuple(window)))
    assert alone.cell[axis] == 1 and alone.values.shape[1 + axis] == 6 and alone.geometry == several.geometry
    np.testing.assert_allclose(alone.values, several.values, atol=1e-4)
    with torch.no_grad():  # one window of each slice holds it all
        part = np.take(image, [2], axis + 1)[:, :16, :16, :16]
        expected = backbone.dense(torch.from_numpy(part)[None])[0].numpy()
    np.testing.assert_allclose(Extractor(backbone).features(part, geometry(part)).values, expected, atol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(8, 8, 16), (30, 36, 40), (8, 20, 16), (10, 44, 20)])
def test_windows_see_what_the_whole_volume_shows(shape, overlap):
    image = volume(*shape)
    found = Extractor(Means(), overlap=overlap).features(image, geometry(image)).values
    mean = F.avg_pool3d(torch.from_numpy(image), (2, 4, 4)).numpy()
    np.testing.assert_allclose(found, np.concatenate((mean, mean**2)), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 7), (8, 9, 33), (1, 1, 1)])
def test_what_is_smaller_than_a_window_or_ends_within_a_cell_is_padded_with_the_fill_value(shape):
    image = volume(*shape, channels=1)
    cells = [-(-n // edge) for n, edge in zip(shape, (2, 4, 4))]
    found = Extractor(Means()).features(image, geometry(image), fill=[-3.0])
    padded = np.full([1, *(n * edge for n, edge in zip(cells, (2, 4, 4)))], -3.0, np.float32)
    padded[:, : shape[0], : shape[1], : shape[2]] = image
    mean = F.avg_pool3d(torch.from_numpy(padded), (2, 4, 4)).numpy()
    assert found.values.shape == (2, *cells) == (2, *found.geometry.shape)
    np.testing.assert_allclose(found.values, np.concatenate((mean, mean**2)), atol=1e-6)


def test_what_is_beyond_the_faces_is_as_dark_as_the_darkest_voxels_where_nothing_is_said():
    class Corner(Means):
        def pyramid(self, x):
            return [x[:, :, :1, :1, :1].expand(-1, 2, 4, 2, 4)]

    image = volume(2, 4, 4)
    assert Extractor(Corner()).features(image, geometry(image)).values[0, 0, 0, 0] == pytest.approx(np.percentile(image, 0.5))


@pytest.mark.parametrize(("cells", "window", "overlap"), [(12, 4, 0.5), (13, 4, 0.5), (4, 4, 0.5), (40, 12, 0.75), (7, 1, 0.5), (9, 4, 0.0), (5, 4, 0.9)])
def test_windows_cover_an_axis_and_overlap_as_asked(cells, window, overlap):
    starts = window_starts(cells, window, overlap)
    assert starts[0] == 0 and starts[-1] == cells - window and starts == sorted(set(starts))
    step = max(1, int(window * (1 - overlap)))
    assert all(b - a <= step for a, b in zip(starts, starts[1:]))


def test_weights_are_a_gaussian_about_the_middle_of_the_window():
    weights = window_weights((6, 4, 5)).double()
    z, y, x = np.meshgrid(np.arange(6) - 2.5, np.arange(4) - 1.5, np.arange(5) - 2.0, indexing="ij")
    expected = np.exp(-0.5 * ((z / 0.75) ** 2 + (y / 0.5) ** 2 + (x / 0.625) ** 2))
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
    assert float(window_weights((16, 16, 16)).min()) > 0


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_the_weights_sum_to_one_everywhere(overlap):
    class Ones(Means):
        def pyramid(self, x):
            return [torch.ones(1, 2, 4, 2, 4)]

    image = volume(31, 50, 70)
    np.testing.assert_allclose(Extractor(Ones(), overlap=overlap).features(image, geometry(image)).values, 1, atol=1e-6)


def test_the_weighted_mean_of_windows_that_disagree_equals_a_plain_loop():
    extractor, image = Extractor(backbone_of("primus"), overlap=0.5), volume(16, 28, 24)
    found = extractor.features(image, geometry(image)).values
    total, weights = np.zeros((48, 4, 7, 6)), np.zeros((4, 7, 6))
    for y in (0, 2, 3):  # cells; at most half a window apart
        for x in (0, 2):
            with torch.no_grad():
                features = extractor.backbone.pyramid(torch.from_numpy(image[None, :, :, 4 * y : 4 * y + 16, 4 * x : 4 * x + 16]))[0][0].numpy()
            for cell in np.ndindex(4, 4, 4):
                weight = np.exp(-sum(((i - 1.5) / 0.5) ** 2 for i in cell) / 2)
                total[:, cell[0], y + cell[1], x + cell[2]] += weight * features[:, cell[0], cell[1], cell[2]]
                weights[cell[0], y + cell[1], x + cell[2]] += weight
    np.testing.assert_allclose(found, total / weights, atol=1e-5)


@pytest.mark.parametrize("zoom", [1.0, 2.0])
def test_a_landmark_keeps_its_place_in_the_world(zoom):
    """The centre of mass of a smooth blob in the map of means is where it is in the volume, in mm."""
    z, y, x = np.meshgrid(np.arange(30), np.arange(37), np.arange(43), indexing="ij")
    image = np.exp(-((z - 14.2) ** 2 + (y - 22.7) ** 2 + (x - 17.1) ** 2) / 18)[None].astype(np.float32)
    where = geometry(image)
    found = Extractor(Means(), zoom=zoom).features(image, where)
    mean = found.values[0].astype(float)
    centre = [float((mean.sum(tuple(a for a in range(3) if a != axis)) * np.arange(n)).sum() / mean.sum()) for axis, n in enumerate(mean.shape)]
    np.testing.assert_allclose(found.geometry.to_world(centre), where.to_world((14.2, 22.7, 17.1)), atol=0.02)
    assert found.geometry.shape == tuple(-(-round(n * zoom) // edge) for n, edge in zip((30, 37, 43), (2, 4, 4)))
    np.testing.assert_allclose(found.geometry.spacing, np.array((4.0, 6.0, 4.0)) / zoom)


def test_the_first_cell_begins_with_the_first_voxel():
    image = volume(8, 8, 16)
    found = Extractor(Means()).features(image, geometry(image))
    np.testing.assert_allclose(found.geometry.to_world((-0.5, -0.5, -0.5)), geometry(image).to_world((-0.5, -0.5, -0.5)))


def test_the_same_volume_has_the_same_features_and_no_random_number_is_drawn():
    image = volume(20, 24, 22)
    extractor = Extractor(backbone_of("primus").train())
    before = torch.get_rng_state()
    first, second = (extractor.features(image, geometry(image)).values for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(before, torch.get_rng_state()) and not extractor.backbone.training


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("primus", {"window": (16, 16, 18)}, r"16x16x18 voxels is no multiple of the network's 4x4x4"),
        ("resenc", {"window": (16, 14, 16)}, r"16x14x16 voxels is no multiple of the network's 4x4x4"),
        ("primus", {"window": (0, 16, 16)}, "no multiple"),
        ("resenc", {"window": (4, 4, 4)}, "would be one voxel"),
        ("primus", {"overlap": 1.0}, "can't overlap by 1"),
        ("primus", {"overlap": -0.1}, "can't overlap"),
        ("primus", {"zoom": 0.0}, "can't be zoomed by 0"),
    ],
)
def test_windows_that_cannot_be_are_refused(family, options, message):
    with pytest.raises(UserError, match=message) as error:
        Extractor(backbone_of(family), **options)
    assert len(str(error.value).splitlines()) == 3


def test_principal_components_equal_those_of_a_singular_value_decomposition():
    rng = np.random.default_rng(0)
    samples = (rng.normal(size=(400, 6)) * (5, 4, 3, 2, 1, 0.5)) @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 7
    found = PrincipalComponents.fit(samples.astype(np.float32), 3)
    _, values, rows = np.linalg.svd(samples - samples.mean(0), full_matrices=False)
    np.testing.assert_allclose(abs(np.sum(found.directions.T * rows[:3], 1)), 1, atol=1e-6)
    np.testing.assert_allclose(found.explained, values[:3] ** 2 / (values**2).sum(), rtol=1e-5)
    assert (found.directions[abs(found.directions).argmax(0), range(3)] > 0).all()
    grid = samples.T.reshape(6, 4, 10, 10).astype(np.float32)
    components = found.project(grid)
    assert components.shape == (3, 4, 10, 10) and components.dtype == np.float32
    np.testing.assert_allclose(components.reshape(3, -1).T, (samples - samples.mean(0)) @ found.directions, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 20), (20, 5)])
def test_more_components_than_cells_or_features_are_refused(shape):
    with pytest.raises(UserError, match=f"{shape[0]} cells with {shape[1]} features have no 6 principal components"):
        PrincipalComponents.fit(np.ones(shape, np.float32), 6)
