"""MultiMAETrainer: which tokens, which losses, and what is handed over."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.multi_mae import MultiMAETrainer
from tests.conformance.oracles import hidden_voxels, multi_mae
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import TINY_SHAPE, ArrayStore, PairedStore

PAIR = Pair(MultiMAETrainer, "primus")


class Lacking(PairedStore):
    """Of all visits but the first, the MR image is another CT image."""

    def info(self, case):
        return {**super().info(case), "modalities": ["MR" if case == 1 else "CT"]}


def prepared(folder, **options):
    trainer = PAIR.trainer(folder, **options)
    trainer.initialize()
    return trainer


def batch_of(trainer, cases):
    trainer.train_cases = list(cases)
    return first_batch(trainer)


def test_a_sixth_of_all_tokens_is_visible_in_every_sample(tmp_path):
    trainer = prepared(tmp_path, batch_size=6)
    for step in range(3):
        batch = first_batch(trainer, step)
        assert list(batch) == ["CT", "MR"]
        counts = torch.stack([(~view.mask).flatten(1).sum(1) for view in batch.values()])
        assert (counts.sum(0) == round(2 * 64 / 6)).all() and len(set(counts[0].tolist())) > 1


@pytest.mark.parametrize(("visible", "tokens"), [(0.001, 1), (0.25, 32), (0.5, 63), (1.0, 63)])
def test_the_share_of_visible_tokens_is_chosen_and_something_of_each_modality_stays_hidden(visible, tokens, tmp_path):
    assert PAIR.trainer(tmp_path, visible=visible).views().visible == tokens


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_each_loss_depends_on_visible_voxels_of_both_modalities_and_on_no_hidden_one(modality, tmp_path):
    trainer = prepared(tmp_path)
    batch = {name: dataclasses.replace(view, image=view.image.clone().requires_grad_()) for name, view in first_batch(trainer).items()}
    loss = trainer.step(trainer.model.eval(), batch)[modality]
    encoded = {**batch, modality: dataclasses.replace(batch[modality], image=batch[modality].image.detach())}  # its own voxels are its target, too
    other = next(name for name in batch if name != modality)
    for views in (batch, encoded):
        (found,) = torch.autograd.grad(trainer.step(trainer.model, views)[modality], views[other].image)
        hidden = hidden_voxels(views[other])[:, None]
        assert not found[hidden].any() and (found[~hidden] != 0).float().mean() > 0.99
    assert loss.item() > 0


def test_losses_equal_plain_loops_where_samples_lack_a_modality_and_only_these_samples_lack_its_loss(tmp_path):
    trainer = prepared(tmp_path, store=Lacking(), batch_size=4)
    trainer.model.eval()
    batch = batch_of(trainer, (0, 2, 4, 6))
    assert trainer.present(batch).tolist() == [[True, case == 0] for case in batch["CT"].cases]
    assert all(bool(mask.all()) == (case != 1) for mask, case in zip(batch["MR"].mask, batch["MR"].cases))
    found, expected = trainer.step(trainer.model, batch), multi_mae(trainer, batch)
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4), name
    other = {
        **batch,
        "MR": dataclasses.replace(batch["MR"], image=torch.where(torch.tensor(batch["MR"].cases)[:, None, None, None, None] == 1, batch["MR"].image, 7.0)),
    }
    assert trainer.step(trainer.model, other)["total"].item() == pytest.approx(found["total"].item(), rel=1e-6)


def test_where_all_samples_lack_a_modality_its_loss_is_0_and_every_parameter_has_a_gradient(tmp_path):
    trainer = prepared(tmp_path, store=Lacking())
    losses = trainer.step(trainer.model, batch_of(trainer, (2, 4)))
    assert losses["MR"].item() == 0.0 and losses["total"].item() == losses["CT"].item() > 0
    losses["total"].backward()
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.grad is None] == []
    assert not any(parameter.grad.any() for parameter in trainer.model.decoders[1].parameters())


def test_a_run_with_missing_modalities_trains_and_validates(tmp_path):
    trainer = PAIR.trainer(tmp_path, store=Lacking(), epochs=1, iterations=3)
    trainer.fit()
    assert all(math.isfinite(value) for value in trainer.validate().values())


@pytest.mark.parametrize(("stem", "order"), [(None, ("CT", "MR")), ("MR", ("MR", "CT"))])
def test_the_backbone_alone_encodes_the_modality_of_the_chosen_stem(stem, order, tmp_path):
    trainer = prepared(tmp_path, stem=stem)
    assert trainer.modalities == order
    weights, model = trainer.state()["network_weights"], trainer.model.eval()
    assert weights["down_projection.proj.weight"].shape == (48, 1, 4, 4, 4)
    values = torch.randn(1, 5, 64)
    for number, same in ((0, True), (1, False)):
        found = model.embed(values, torch.full((1, 5), number))
        alone = values @ weights["down_projection.proj.weight"].flatten(1).T + weights["down_projection.proj.bias"]
        assert torch.allclose(found, alone, atol=1e-5) == same


def test_channels_of_one_case_are_modalities_whose_stems_are_the_tokenizer(tmp_path):
    trainer = prepared(tmp_path, channels=3, store=ArrayStore(4, TINY_SHAPE, 3), stem="MR")
    assert trainer.modalities == ("CT", "MR", "PET") and not trainer.model.further
    assert trainer.state()["network_weights"]["down_projection.proj.weight"].shape == (48, 3, 4, 4, 4)
    assert trainer.step(trainer.model, first_batch(trainer))["total"].item() > 0


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        ({"modalities": ["CT"]}, {}, "MultiMAETrainer needs images of two modalities of one visit"),
        ({}, {"stem": "PET"}, "no case shows the modality 'PET'"),
        ({"modalities": ["CT", "MR", "CT"]}, {}, "channels of equal names: CT, MR, CT"),
    ],
)
def test_collections_and_stems_that_do_not_serve_are_refused(info, options, message, tmp_path):
    class Store(PairedStore):
        def info(self, case):
            return {**super().info(case), **info}

    with pytest.raises(UserError, match=message) as error:
        PAIR.trainer(tmp_path, store=Store(), **options)
    assert len(str(error.value).splitlines()) == 3


def test_a_picture_shows_each_modality_what_is_visible_and_the_reconstruction_with_visible_voxels_as_they_are(tmp_path):
    trainer = prepared(tmp_path)
    batch = first_batch(trainer)
    with torch.no_grad():
        rows = trainer.picture(batch)
    assert len(rows) == 2 and list(rows[0]) == [f"{name}{part}" for name in ("CT", "MR") for part in ("", ", visible", ", reconstruction")]
    for sample, row in enumerate(rows):
        for name in ("CT", "MR"):
            hidden = hidden_voxels(batch[name])[sample].numpy()
            assert np.array_equal(row[f"{name}, reconstruction"][~hidden], row[name][~hidden])
            assert not np.array_equal(row[f"{name}, reconstruction"][hidden], row[name][hidden])
            assert (row[f"{name}, visible"][hidden] == row[f"{name}, visible"].min()).all()


def test_health_figures_are_those_of_visible_tokens_at_their_places(tmp_path):
    trainer = prepared(tmp_path, batch_size=4)
    batch = first_batch(trainer)
    with trainer.health.watch(0):
        trainer.step(trainer.model.train(), batch)
    (places,), (pooled,) = trainer.health.vectors["positions"], trainer.health.vectors["pooled"]
    visible = {tuple(place) for view in batch.values() for place in (~view.mask).nonzero()[:, 1:].tolist()}
    assert {tuple(place) for place in places.int().tolist()} == visible and len(pooled) == 4


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_halves_as_two_processes_compute_it(tmp_path):
    trainer = prepared(tmp_path, store=Lacking(), batch_size=4)
    trainer.model.eval()
    batch = batch_of(trainer, (0, 2, 4, 6))
    halves = [
        {name: dataclasses.replace(v, image=v.image[at], mask=v.mask[at], cases=v.cases[at]) for name, v in batch.items()} for at in (slice(2), slice(2, 4))
    ]
    whole, parts = trainer.step(trainer.model, batch), [trainer.step(trainer.model, half) for half in halves]
    for name, loss in whole.items():
        assert loss.item() == pytest.approx((parts[0][name].item() + parts[1][name].item()) / 2, rel=1e-5, abs=1e-6)
