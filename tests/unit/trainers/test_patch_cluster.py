"""PatchCluster: which places are compared, what a patch's features are, and that a collapse is seen."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import Intensity
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import bounds
from nnssl_ext.nn import assign
from nnssl_ext.nn.warp import warp
from nnssl_ext.trainers.health import COLLAPSE
from nnssl_ext.trainers.patch_cluster import PatchClusters, PatchClusterTrainer
from nnssl_ext.trainers.pictures import feature_level
from tests.conformance.pairs import Pair, first_batch
from tests.conformance.test_views import CoordinateStore
from tests.make_data import tiny_store


def made(folder, family="primus", **options):
    trainer = Pair(PatchClusterTrainer, family).trainer(folder, **options)
    trainer.initialize()
    return trainer


def test_crops_overlap_by_the_interval_and_are_mirrored_alike(tmp_path):
    spec, store = Pair(PatchClusterTrainer, "primus").trainer(tmp_path).views(), tiny_store()
    for number in range(20):
        first, second = spec.sample(store, number % 8, sample_rng(0, number)).values()
        assert 0.3 <= iou(*(bounds(view.affine, view.image.shape[1:]) for view in (first, second))) <= 1
        assert (first.affine[:, :3] == second.affine[:, :3]).all()


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_both_crops_are_read_at_the_same_places_of_the_case(family, tmp_path):
    trainer = made(tmp_path, family, channels=3, store=CoordinateStore(), batch_size=4)
    spec, read = replace(trainer.views(), intensity=Intensity()), []
    trainer.views = lambda: spec

    def model(images, places):
        read.append(warp(F.avg_pool3d(images, trainer.model.cell), places))
        return F.normalize(torch.randn(len(images), *places.shape[2:], 6), dim=-1), torch.eye(6)

    trainer.step(model, first_batch(trainer))
    first, second = read[0].chunk(2)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    assert (first.amax((2, 3, 4)) > first.amin((2, 3, 4)) + 1).all()


def test_places_of_the_first_crop_are_compared_with_those_of_the_second_one_sample_by_sample(tmp_path):
    trainer = made(tmp_path)
    z = torch.eye(8)[torch.arange(2 * 64) % 8].reshape(2, 4, 4, 4, 8)  # neighbours differ
    losses = [
        trainer.step(lambda images, places, s=second: (torch.cat((z, s)), torch.eye(8)), first_batch(trainer))["total"].item() for second in (z, z.roll(1, 3))
    ]
    assert losses[0] < 1e-3 and losses[1] == pytest.approx(10, rel=0.01)


class Ramps(nn.Module):
    """A pyramid whose maps hold averages of the input: of 2^3, 4^3 and 8^3 voxels."""

    strides, widths = ((2, 2, 2), (4, 4, 4), (8, 8, 8)), (3, 3, 3)

    def pyramid(self, x):
        return [F.avg_pool3d(x, stride) for stride in self.strides]


def test_features_of_a_cell_are_those_of_its_map_and_of_all_coarser_ones_there():
    model, seen = PatchClusters(Ramps(), 1, 4, 5), []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    ramp = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (16, 24, 32)), indexing="ij"))[None]
    z, directions = model(ramp)
    assert z.shape == (1, 4, 6, 8, 4) and directions.shape == (5, 4)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(1, 4, 6, 8)), torch.testing.assert_close(directions.norm(dim=1), torch.ones(5))
    own, coarser = seen[0].split(3, dim=-1)
    torch.testing.assert_close(own.movedim(-1, 1), F.avg_pool3d(ramp, 4))
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(coarser[inner], own[inner])  # a ramp is a ramp at any resolution
    shifted = model(ramp, torch.full((1, 3, 4, 6, 8), 0.25))
    torch.testing.assert_close(seen[1][0, :-1, :-1, :-1, :3], own[0, :-1, :-1, :-1] + 1)  # a quarter of four voxels
    assert not torch.equal(shifted[0], z)


def test_every_stage_of_a_u_net_learns_also_where_cells_are_not_those_of_its_deepest_map(tmp_path):
    backbone = made(tmp_path, "resenc").backbone
    PatchClusters(backbone, 1, 8, 4)(torch.randn(1, 1, 16, 16, 16))[0].mul(torch.randn(8)).sum().backward()
    assert all(bool(stage.blocks[0].conv2.norm.bias.grad.any()) for stage in backbone.net.encoder.stages)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_cells_are_those_that_features_are_looked_at_of_eight_voxels_at_most(family, tmp_path):
    trainer = made(tmp_path, family)
    assert trainer.model.cell == tuple(trainer.backbone.strides[feature_level(trainer.backbone)]) and max(trainer.model.cell) <= 8


def test_settings_are_those_of_the_source_where_it_has_them():
    config = PatchClusterTrainer.Config()
    assert (config.temperature, config.sharpness, config.bottleneck, config.iou) == (0.1, 0.05, 64, (0.3, 1.0)) and 10 <= config.prototypes <= 50


def test_the_picture_shows_crops_and_clusters_of_two_samples(tmp_path):
    trainer = made(tmp_path, "resenc", batch_size=3)
    trainer.model.eval()
    with torch.no_grad():
        rows = trainer.picture(first_batch(trainer))
    assert [list(row) for row in rows] == [["first", "second", "first, clusters", "second, clusters"]] * 2
    assert all(cut.shape == (16, 16, 3) for row in rows for cuts in row.values() for cut in cuts)


@pytest.mark.parametrize("balanced", [True, False])
def test_no_alarm_is_raised_but_where_nothing_balances_the_assignments_and_all_patches_become_one_cluster(balanced, tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl_ext.trainers.base.draw_run", lambda *_: None)
    monkeypatch.setattr("nnssl_ext.trainers.sinks.draw_progress", lambda *_: None)
    if not balanced:
        monkeypatch.setattr(assign, "sinkhorn", assign.softmax)
    trainer = Pair(PatchClusterTrainer, "resenc").trainer(tmp_path, iterations=8)
    trainer.fit()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    alarms = [text for record in records for text in record.get("alarms", [])]
    assert trainer.health.collapsed is not balanced
    assert alarms == [] if balanced else len(alarms) == 1 and COLLAPSE in alarms[0] and "clusters/MI" in alarms[0]


def test_an_interval_that_is_none_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="iou needs two numbers") as error:
        Pair(PatchClusterTrainer, "primus").trainer(tmp_path, iou=(0.5, 0.3))
    assert len(str(error.value).splitlines()) <= 3
