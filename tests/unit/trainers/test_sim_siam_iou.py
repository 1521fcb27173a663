"""SimSiam on pairs with a controlled IoU: the pairs, the stopped gradient, the rates and the warning."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import bounds
from nnssl_ext.nn.health import spread
from nnssl_ext.trainers.schedules import cosine
from nnssl_ext.trainers.sim_siam_iou import PREDICTOR, SimSiamIoUTrainer
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import tiny_store


def made(folder, family="primus", **options):
    trainer = Pair(SimSiamIoUTrainer, family).trainer(folder, **options)
    trainer.initialize()
    return trainer


@pytest.mark.parametrize("interval", [(0.3, 0.6), (0.7, 0.8)], ids=str)
def test_the_iou_of_the_crops_lies_in_the_interval(interval, tmp_path):
    spec, store = Pair(SimSiamIoUTrainer, "primus").trainer(tmp_path, iou=interval).views(), tiny_store()
    for number in range(40):
        views = spec.sample(store, number % 8, sample_rng(0, number))
        assert interval[0] <= iou(*(bounds(view.affine, view.image.shape[1:]) for view in views.values())) <= interval[1]


def test_no_gradient_flows_through_the_projections_that_are_predicted(tmp_path):
    trainer = made(tmp_path, batch_size=4)
    z, p = (torch.randn(2, 4, 32, requires_grad=True) for _ in range(2))
    trainer.step(lambda images: (z, p), first_batch(trainer))["total"].backward()
    assert z.grad is None and all(bool(part.any()) for part in p.grad)


def test_each_prediction_is_compared_with_the_projection_of_the_other_crop(tmp_path):
    trainer = made(tmp_path)
    batch, z = first_batch(trainer), torch.eye(4)[:2, None].expand(2, 2, 4)  # both vectors of a crop alike, those of two crops orthogonal
    losses = [trainer.step(lambda images, p=p: (z, p), batch)["total"].item() for p in (z.flip(0), z)]
    assert losses == [-1, 0]


def test_the_crops_of_a_step_are_normalised_by_kind_and_not_together(tmp_path):
    trainer = made(tmp_path, batch_size=4)
    batch = first_batch(trainer)
    far = replace(batch["second"], image=100 * batch["second"].image)
    for second in (batch["second"], far):
        z, _ = trainer.model.train()(torch.stack((batch["first"].image, second.image)))
        assert z.mean(1).abs().max() < 1e-3


def test_the_learning_rate_of_the_predictor_does_not_decay(tmp_path):
    trainer = made(tmp_path, "resenc")
    by_part = {True: set(), False: set()}
    for step in range(trainer.total_steps):
        trainer.schedule(step)
        for group in trainer.optimizer.param_groups:
            by_part[group.get("name") == PREDICTOR].add(group["lr"])
    assert by_part[True] == {trainer.recipe.lr}
    assert by_part[False] == {cosine(step, trainer.total_steps, trainer.recipe.lr, 0.0) for step in range(trainer.total_steps)}
    predictor = [p for group in trainer.optimizer.param_groups if group.get("name") == PREDICTOR for p in group["params"]]
    assert set(predictor) == set(trainer.model.predictor.parameters())


def test_the_rate_of_a_u_net_grows_with_the_pairs_of_a_step_and_its_momentum_is_that_of_the_source(tmp_path):
    trainer = made(tmp_path, "resenc", batch_size=4, accumulate=2)
    assert trainer.recipe.lr == pytest.approx(0.05 * 8 / 256)
    assert all((group["momentum"], group["weight_decay"]) == (0.9, 1e-4) for group in trainer.optimizer.param_groups)
    assert made(tmp_path, "resenc", lr=0.1).recipe.lr == 0.1
    assert made(tmp_path).recipe.optimizer == "adamw" and made(tmp_path).recipe.lr == 3e-4


def test_few_pairs_are_warned_of_and_sixteen_are_not(tmp_path, capsys):
    made(tmp_path, batch_size=15)
    assert "warning: SimSiam normalises over the pairs of a step, and 15 are few" in capsys.readouterr().out
    made(tmp_path, batch_size=16)
    assert "warning" not in capsys.readouterr().out


def test_a_collapse_is_seen_by_the_predictions(tmp_path):
    trainer, seen = made(tmp_path, batch_size=4), {}
    trainer.health.add = lambda name, vectors: seen.update({name: spread(vectors).item()})
    batch = first_batch(trainer)
    trainer.step(trainer.model.train(), batch)
    assert min(seen.values()) > 0.3
    torch.nn.init.zeros_(trainer.model.predictor[-1].weight)  # the same answer to everything
    trainer.step(trainer.model, batch)
    assert seen["prediction"] < 0.01 < 0.3 < seen["projection"]


def test_widths_are_those_of_the_source():
    config = SimSiamIoUTrainer.Config()
    assert (config.hidden, config.bottleneck, config.iou) == (2048, 512, (0.3, 0.6))


@pytest.mark.parametrize("options, message", [({"batch_size": 1}, "compares samples and needs two"), ({"iou": (0.5,)}, "iou needs two numbers")], ids=str)
def test_what_cannot_work_is_refused_in_a_sentence(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        Pair(SimSiamIoUTrainer, "primus").trainer(tmp_path, **options)
    assert len(str(error.value).splitlines()) <= 3
