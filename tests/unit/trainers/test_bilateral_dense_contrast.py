"""Bilateral dense contrast: where the crops are compared, and what becomes of the other side of the body."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import Intensity
from nnssl_ext.data.sagittal import mirrored
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import bounds, is_slicing, to_case
from nnssl_ext.nn.dense_contrast import contralateral, values_at
from nnssl_ext.trainers.bilateral_dense_contrast import BilateralDenseContrastTrainer
from tests.conformance.pairs import Pair, first_batch
from tests.conformance.test_views import CoordinateStore
from tests.make_data import TINY_SHAPE, ArrayStore

FAMILIES = ["resenc", "primus"]


def made(folder, family="resenc", plain=True, **options):
    """A trainer whose views have no changed intensities."""
    trainer = Pair(BilateralDenseContrastTrainer, family).trainer(folder, **options)
    spec = replace(trainer.views(), intensity=Intensity()) if plain else trainer.views()
    trainer.views = lambda: spec
    trainer.initialize()
    return trainer


def reading(trainer, read):
    """In the place of the model: unit vectors of the voxels' own values, which are kept in `read`."""

    def model(images, places):
        read.append(values_at(images, places))
        return F.normalize(read[-1] - read[-1].mean((0, 1)), dim=2)

    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_both_crops_are_read_at_the_same_places_of_the_case_though_turned_zoomed_and_mirrored(family, tmp_path):
    trainer, read, kinds = made(tmp_path, family, channels=3, store=CoordinateStore(), batch_size=4), [], set()
    for step in range(2):
        batch = first_batch(trainer, step)
        trainer.step(reading(trainer, read), batch)
        places, valid, positions = trainer.places(batch)
        assert valid.float().mean() > 0.5 and valid.any(1).all()
        for sample, affine in enumerate(batch["global_0"].affine):
            case = torch.from_numpy(to_case(affine.numpy(), places[0, sample].numpy()))
            kept = valid[sample] & ((case >= 0) & (case <= torch.tensor(TINY_SHAPE) - 1)).all(1)  # beyond the case there are no coordinates
            first, second = (view[kept] for view in (read[-1][sample], read[-1][4 + sample]))
            torch.testing.assert_close(first, second, rtol=0, atol=1e-3)
            torch.testing.assert_close(first.double(), case[kept], rtol=0, atol=1e-3)
            middle = (np.array(TINY_SHAPE) - 1) / 2  # all of it is body
            np.testing.assert_allclose(positions[sample], (3.0 * (case.numpy() - middle))[:, ::-1], atol=1e-9)
            kinds.add((tuple(np.sign(np.diag(affine[:, :3]))), bool((affine[:, :3].abs().diag() == affine[:, :3].abs().sum(1)).all())))
    assert len({mirror for mirror, _ in kinds}) > 2 and len({straight for _, straight in kinds}) == 2


def test_crops_overlap_are_mirrored_alike_and_turned_and_zoomed_apart(tmp_path):
    spec, store = made(tmp_path).views(), ArrayStore(8, TINY_SHAPE)
    pairs = [list(spec.sample(store, number % 8, sample_rng(0, number)).values()) for number in range(20)]
    for first, second in pairs:
        assert (np.sign(np.diag(first.affine)) == np.sign(np.diag(second.affine))).all()
        assert iou(*(bounds(view.affine, view.image.shape[1:]) for view in (first, second))) > 0.2
    zooms = np.array([[np.cbrt(abs(np.linalg.det(view.affine[:, :3]))) for view in pair] for pair in pairs])
    assert 0.85 <= zooms.min() < 0.95 and 1.1 < zooms.max() <= 1.2 and (zooms[:, 0] != zooms[:, 1]).all()
    assert not any(is_slicing(view.affine) for pair in pairs for view in pair)


class SymmetricStore(ArrayStore):
    """Cases of many channels that hold the same on both sides of their middle; the array lies in the world as a geometry says.

    Args:
        axis: of the array that runs from left to right.
        direction: of the geometry.
    """

    def __init__(self, axis=2, direction=None, channels=12):
        super().__init__(8, (32, 32, 32), channels)
        self.direction = np.eye(3) if direction is None else direction
        rng = np.random.default_rng(0)
        self.arrays = []
        for _ in range(8):
            noise = torch.from_numpy(rng.normal(size=(1, channels, 8, 8, 8)).astype(np.float32))
            smooth = F.interpolate(noise, (32, 32, 32), mode="trilinear")[0].numpy()
            self.arrays.append(np.moveaxis(smooth + smooth[..., ::-1], 3, axis + 1).copy())

    def geometry(self, case):
        return Geometry(self.shape(case), (3.0, 3.0, 3.0), (0.0, 0.0, 0.0), tuple(np.asarray(self.direction, float).ravel()))


def test_features_that_are_alike_on_both_sides_of_a_symmetric_body_cost_less_than_where_the_other_side_is_a_negative(tmp_path):
    costs = {}
    for handling in ("exclude", "positive", "negative"):
        trainer = made(tmp_path, channels=12, patch=(24, 24, 24), store=SymmetricStore(), voxels=512, contralateral=handling, radius=10.0, weight=1.0)
        steps = [trainer.step(reading(trainer, []), first_batch(trainer, step))["total"].item() for step in range(3)]
        costs[handling] = np.mean(steps)
    assert costs["exclude"] < 0.8 * costs["negative"]


@pytest.mark.parametrize(("axis", "direction"), [(0, np.eye(3)[::-1]), (1, np.eye(3)[[1, 0, 2]]), (2, -np.eye(3)), (0, -np.eye(3)[::-1])])
def test_partners_are_those_of_the_world_whichever_axis_of_the_array_runs_from_left_to_right(axis, direction, tmp_path):
    trainer = made(tmp_path, channels=12, patch=(24, 24, 24), store=SymmetricStore(axis, direction), voxels=512, radius=4.0)
    batch, read = first_batch(trainer), []
    trainer.step(reading(trainer, read), batch)
    _, valid, positions = trainer.places(batch)
    partners = contralateral(positions, 4.0)
    case = [to_case(affine.numpy(), places.numpy()) for affine, places in zip(batch["global_0"].affine, trainer.places(batch)[0][0])]
    for sample, voxels in enumerate(case):
        mirror = voxels.copy()
        mirror[:, axis] = 31 - mirror[:, axis]
        expected = 3.0 * np.linalg.norm(mirror[:, None] - voxels, axis=2) <= 4.0 + 1e-6
        assert np.array_equal(partners[sample].numpy(), expected)
    apart = partners & ~torch.eye(512, dtype=torch.bool) & valid[:, :, None] & valid[:, None]
    vectors = F.normalize(read[0].chunk(2)[0] - read[0].mean((0, 1)), dim=2)
    cosines = vectors @ vectors.mT
    assert apart.any() and cosines[apart].mean() > cosines.mean() + 0.4  # they hold the same


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sample_at_a_time_and_crops_that_hardly_overlap_are_no_obstacle(family, tmp_path):
    trainer = made(tmp_path, family, plain=False, batch_size=1, iou=(0.0, 0.01), store=ArrayStore(8, (40, 40, 40)))
    trainer.model.train()
    seen = []
    for step in range(6):
        batch = first_batch(trainer, step)
        assert trainer.places(batch)[1].any()
        loss = trainer.step(trainer.model, batch)["total"]
        loss.backward()
        seen.append(loss.item())
    assert np.isfinite(seen).all() and max(seen) > 0


def test_mirroring_twice_leads_back_to_every_place_that_is_compared(tmp_path):
    trainer = made(tmp_path)
    positions = trainer.places(first_batch(trainer))[2]
    np.testing.assert_array_equal(mirrored(mirrored(positions.numpy())), positions.numpy())


def test_the_decoder_of_a_u_net_is_trained_and_handed_over_and_a_transformer_has_its_tokens_compared(tmp_path):
    u_net, transformer = made(tmp_path, "resenc"), made(tmp_path, "primus")
    assert u_net.model.cells == ((1, 1, 1),) and transformer.model.cells == transformer.backbone.strides
    assert all(p.requires_grad for p in u_net.backbone.net.decoder.stages.parameters()) and u_net.transfers_decoder


def test_settings_are_those_of_the_method():
    config = BilateralDenseContrastTrainer.Config()
    assert (config.temperature, config.bottleneck, config.voxels, config.contralateral) == (0.1, 128, 1024, "exclude")


def test_the_picture_shows_the_case_matches_and_likeness_of_two_samples(tmp_path):
    trainer = made(tmp_path, batch_size=3, patch=(16, 16, 16))
    trainer.model.eval()
    with torch.no_grad():
        rows = trainer.picture(first_batch(trainer))
    names = ["case", "first (matches)", "second (matches)", "first (likeness)", "second (likeness)"]
    assert [list(row) for row in rows] == [names] * 2
    for row in rows:
        coloured = [{tuple(colour) for cut in row[name] for colour in cut.reshape(-1, 3).round(3) if np.ptp(colour) > 0.2} for name in names[1:3]]
        assert len(coloured[0] & coloured[1]) >= 3  # matches of equal colours
        assert all(np.isfinite(cut).all() and 0 <= cut.min() and cut.max() <= 1 for cuts in row.values() for cut in cuts)


@pytest.mark.parametrize(("options", "message"), [({"iou": (0.5, 0.3)}, "iou needs two numbers"), ({"contralateral": "both"}, "can't be 'both'")])
def test_settings_that_mean_nothing_are_refused_in_a_sentence(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        Pair(BilateralDenseContrastTrainer, "resenc").trainer(tmp_path, **options)
    assert len(str(error.value).splitlines()) <= 3
