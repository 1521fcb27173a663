"""The picture of a pair: the IoU in its title is the one of the views, and the outlines are where the crops are."""

import numpy as np
import pytest
from PIL import Image

from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.spatial import make_affine, rotation_matrix, to_case, to_crop
from nnssl_ext.trainers.pair_pictures import COLOURS, case_slices, inside, true_iou
from nnssl_ext.trainers.pictures import GAP, LINE, MARGIN, TILE, draw_run, draw_volumes
from nnssl_ext.trainers.sim_clr import SimCLRTrainer
from nnssl_ext.trainers.sim_siam_iou import SimSiamIoUTrainer
from tests.conformance.pairs import Pair
from tests.make_data import ArrayStore

SIZE = (9, 12, 10)
FIRST, SECOND = (np.array(colour) for colour in COLOURS.values())


def voxels(affine, size):
    """Every voxel of a crop as a voxel of the case."""
    return {tuple(np.rint(to_case(affine, np.array(place))).astype(int)) for place in np.ndindex(*size)}


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.05, 0.3), (0.4, 0.9), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("cls", [SimCLRTrainer, SimSiamIoUTrainer])
def test_the_iou_of_the_title_is_that_of_the_voxels_that_the_views_share(cls, interval, tmp_path):
    store = ArrayStore(3, (30, 33, 36))
    trainer = Pair(cls, "primus").trainer(tmp_path, store=store, iou=interval)
    seen = set()
    for step in range(4):
        batch = StepDataset(store, trainer.views(), range(3), 0, 3)[step]
        rows = trainer.picture(batch)
        assert len(rows) == 2
        for sample, row in enumerate(rows):
            first, second = (voxels(view.affine[sample].numpy(), view.image.shape[2:]) for view in batch.values())
            iou = len(first & second) / len(first | second)
            assert interval[0] <= iou <= interval[1] and row["IoU"] == f"{iou:.2f}"
            seen.add(iou)
            for i, view in enumerate(batch.values()):
                assert np.array_equal(list(row.values())[1 + i], view.image[sample, 0].numpy())
    assert len(seen) > 2 or interval[0] == interval[1]


def turned_and_zoomed(seed):
    rng = np.random.default_rng(seed)
    rotation, zoom = rotation_matrix(rng.uniform(-40, 40, 3)), rng.uniform(0.6, 1.7, 3)
    return make_affine(rng.uniform(8, 12, 3), SIZE, (2.0, 1.0, 1.5), rotation, zoom, rng.integers(0, 2, 3).astype(bool))


@pytest.mark.parametrize("seed", range(3))
def test_crops_that_are_turned_and_zoomed_are_counted_by_the_centres_of_voxels(seed):
    crops = []
    one, other = turned_and_zoomed(seed), turned_and_zoomed(seed + 10)
    for affine in (one, other):
        places = np.stack(np.meshgrid(*[np.arange(-15, 35)] * 3, indexing="ij"), -1)
        at = to_crop(affine, places)
        crops.append(((at > -0.5) & (at < np.array(SIZE) - 0.5)).all(-1))
        assert np.array_equal(inside(affine, SIZE, ((-15, 35),) * 3), crops[-1])
    expected = (crops[0] & crops[1]).sum() / (crops[0] | crops[1]).sum()
    assert 0.1 < expected < 1 and true_iou((one, other), (SIZE, SIZE)) == expected


def shifted(*low):
    return np.column_stack((np.eye(3), low)).astype(float)


def test_outlines_are_the_borders_of_the_crops_in_slices_through_what_both_share():
    store = ArrayStore(1, (30, 33, 36))
    axial, coronal, sagittal = case_slices(store, 0, (shifted(2, 3, 4), shifted(6, 5, 8)), (SIZE, (9, 12, 20)))
    assert [part.shape for part in (axial, coronal, sagittal)] == [(33, 36, 3), (30, 36, 3), (30, 33, 3)]
    for image, (low, high) in ((axial, ((5, 8), (17, 28))), (coronal, ((6, 8), (15, 28))), (sagittal, ((6, 5), (15, 17)))):
        blue = np.argwhere((image == SECOND).all(-1))
        assert blue.min(0).tolist() == list(low) and (blue.max(0) + 1).tolist() == list(high)
        assert len(blue) == 2 * (high[0] - low[0] + high[1] - low[1]) - 4
    orange = np.argwhere((axial == FIRST).all(-1))
    assert orange.min(0).tolist() == [3, 4] and (orange.max(0) + 1).tolist() == [15, 14]
    grey = axial[20:, :8]
    values = store.read(0)[0, 8, 20:, :8]  # z: the middle of 6 and 11
    assert np.ptp(grey, axis=-1).max() == 0 and np.corrcoef(grey[..., 0].ravel(), values.ravel())[0, 1] > 0.99


def test_both_crops_are_seen_where_they_are_the_same_and_the_first_where_they_are_apart():
    store, one = ArrayStore(1, (30, 33, 36)), shifted(2, 3, 4)
    for image in case_slices(store, 0, (one, one), (SIZE, SIZE)):
        assert all((image == colour).all(-1).any() for colour in (FIRST, SECOND))
    for image in case_slices(store, 0, (one, shifted(20, 20, 20)), (SIZE, SIZE)):
        assert (image == FIRST).all(-1).any()


def test_crops_beyond_the_case_are_drawn_as_far_as_they_reach():
    outside = shifted(-5, 30, -4)
    for image in case_slices(ArrayStore(1, (30, 33, 36)), 0, (outside, outside), (SIZE, SIZE)):
        assert np.isfinite(image).all() and (image == SECOND).all(-1).any()


def test_the_text_stands_above_its_sample_and_slices_are_drawn_as_they_are(tmp_path):
    volume, red = np.zeros((4, 4, 4), np.float32), np.array((1.0, 0.0, 0.0))
    slices = tuple(np.ones((4, 4, 3)) * red * brightness for brightness in (1.0, 0.6, 0.2))
    draw_volumes([{"crop": volume, "slices": slices, "IoU": "0.42"}, {"crop": volume, "slices": slices, "IoU": "0.10"}], tmp_path / "with.png")
    draw_volumes([{"crop": volume, "slices": slices}] * 2, tmp_path / "without.png")
    told, silent = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("with", "without"))
    assert told.shape[0] == silent.shape[0] + LINE and told.shape[1] == silent.shape[1]
    second = MARGIN + 3 * (TILE + GAP) + GAP
    lines = told[LINE : 2 * LINE]
    assert all((lines[:, left : left + 60].min() < 128) for left in (MARGIN, second)) and lines[:, :MARGIN].min() == 255
    assert not np.array_equal(lines[:, MARGIN : MARGIN + 60], lines[:, second : second + 60])
    for plane, red_ in enumerate((255, 153, 51)):
        assert told[-TILE // 2, MARGIN + plane * (TILE + GAP) + TILE // 2].tolist() == [red_, 0, 0]


@pytest.mark.parametrize("cls", [SimCLRTrainer, SimSiamIoUTrainer])
def test_a_run_draws_its_pairs_and_their_features(cls, tmp_path):
    trainer = Pair(cls, "resenc").trainer(tmp_path)
    trainer.initialize()
    draw_run(trainer, trainer.val_data[0], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        lines = 3 if cls is SimCLRTrainer and trainer.views().turning.size != trainer.config_plan.patch_size else 4
        assert image.height == 3 * LINE + 4 + lines * (TILE + GAP)
