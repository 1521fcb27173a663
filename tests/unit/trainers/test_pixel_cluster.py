"""PixelClusterTrainer: clusters of whole cases as classes of two crops."""

import numpy as np
import pytest
import torch

from benchmarks.common import ArrayLabels
from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.pixel_cluster import PixelClusterTrainer
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import TINY_SHAPE, ArrayStore

PAIR = Pair(PixelClusterTrainer, "resenc")


class Store(ArrayStore):
    """Every voxel has a number of its own, also as its label."""

    def __init__(self) -> None:
        super().__init__(8, TINY_SHAPE)
        self.numbers = np.arange(1, 1 + np.prod(TINY_SHAPE), dtype=np.uint16).reshape(1, *TINY_SHAPE)

    def clusters(self):
        return ArrayLabels([self.numbers] * len(self), self.numbers.size)


def prepared(folder, store=None, **options):
    trainer = PAIR.trainer(folder, store=store, **options)
    trainer.initialize()
    return trainer


def test_each_crop_has_to_tell_the_labels_of_the_other_one_where_both_are_and_nothing_elsewhere(tmp_path):
    trainer = PAIR.trainer(tmp_path, store=Store())  # thousands of classes: the network is never built
    trainer.train_cases = list(range(8))
    for step in range(2):
        batch = first_batch(trainer, step)
        swapped = trainer.swapped(batch)
        for i in range(2):
            own = [batch[f"{name}_labels"].image[i, 0].long() for name in ("first", "second")]
            shared = set(own[0].unique().tolist()) & set(own[1].unique().tolist()) - {0}
            assert shared
            for labels, target in zip(own, swapped):
                inside = torch.isin(labels, torch.tensor(sorted(shared)))
                assert torch.equal(target[i], torch.where(inside, labels, 0))


def test_the_overlap_has_the_configured_iou(tmp_path):
    for interval in ((0.3, 1.0), (0.6, 0.7)):
        trainer = PAIR.trainer(tmp_path, store=Store(), iou=interval)
        trainer.train_cases = list(range(8))
        batch = first_batch(trainer)
        for i in range(2):
            one, other = (set(batch[f"{name}_labels"].image[i].unique().tolist()) for name in ("first", "second"))
            assert interval[0] <= len(one & other) / len(one | other) <= interval[1]


def test_what_is_outside_of_the_body_counts_nowhere(tmp_path):
    class Halved(Store):
        def clusters(self):
            labels = np.ones((1, *TINY_SHAPE), np.uint8)
            labels[:, :, :12] = 0
            return ArrayLabels([labels] * len(self), 3)

    trainer = prepared(tmp_path, Halved())
    batch = first_batch(trainer)
    logits = torch.zeros(4, 3, 16, 16, 16, requires_grad=True)
    trainer.step(lambda image: logits, batch)["total"].backward()
    assert torch.equal(logits.grad.ne(0).any(1), torch.cat(trainer.swapped(batch)) > 0) and 0 < logits.grad.ne(0).any(1).float().mean() < 1


def test_a_sample_without_any_labels_leaves_the_loss_finite(tmp_path):
    class Empty(Store):
        def clusters(self):
            return ArrayLabels([np.zeros((1, *TINY_SHAPE), np.uint8)] * len(self), 3)

    trainer = prepared(tmp_path, Empty())
    loss = trainer.step(trainer.model, first_batch(trainer))["total"]
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_a_run_goes_on_with_its_own_clusters_only(tmp_path):
    PAIR.trainer(tmp_path).fit(stop_at=2)

    class Others(ArrayStore):
        def clusters(self):
            labels = super().clusters()
            labels.model = "1" * 64
            return labels

    with pytest.raises(UserError, match="assigned to other clusters than those of this run"):
        PAIR.trainer(tmp_path, store=Others(8, TINY_SHAPE)).fit(resume=True)
    PAIR.trainer(tmp_path).fit(resume=True, stop_at=3)


def test_the_picture_shows_either_crop_its_clusters_and_those_that_are_predicted(tmp_path):
    trainer = prepared(tmp_path)
    batch = first_batch(trainer)
    with torch.no_grad():
        rows = trainer.picture(batch)
    assert [list(row) for row in rows] == [[f"{n}{what}" for n in ("first", "second") for what in ("", " (assigned, shared)", " (predicted)")]] * 2
    dark = rows[0]["first (assigned, shared)"].max(-1) - rows[0]["first (assigned, shared)"].min(-1) < 1e-6
    assert np.array_equal(dark, (trainer.swapped(batch)[0][0] == 0).numpy())  # no colour where nothing is shared


def test_encoder_and_decoder_are_handed_over(tmp_path):
    assert prepared(tmp_path).state()["transfer"] == "encoder+decoder"


def test_an_interval_whose_ends_are_swapped_is_refused(tmp_path):
    with pytest.raises(UserError, match="iou needs two numbers"):
        PAIR.trainer(tmp_path, iou=(0.6, 0.3))
