"""Every method learns: it fits one batch, stands empty volumes, takes gradients from where it may, and does the same again for the same seed."""

import math
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.data.loader import batches
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.trainers.mae import MAETrainer
from tests.conformance.oracles import hidden_voxels
from tests.conformance.pairs import METHODS, PAIRS, Pair, features_of, first_batch, own_family, registered

OWN = [pair for pair in PAIRS if pair.method in registered()]
UNUSED = Path(tempfile.gettempdir()) / "unused"
OVERFIT_STEPS, LR = 30, 3e-3
LEFT = 0.3  # of the first loss, at most, when a batch has been seen thirty times; measured 0.04 to 0.17
LEFT_BY_METHOD = {  # slower: classes, entropies of soft targets, contrasts, normalised voxels
    "DINOv2Trainer": 0.5,
    "DINOv2HighResTrainer": 0.5,
    "DINOIoUTrainer": 0.5,
    "MultiMAETrainer": 0.5,
    "PixelClusterTrainer": 0.6,
    "ReconContrastTrainer": 0.5,
    "RegistrationPretextTrainer": 0.6,
    "SimSiamIoUTrainer": 0.5,
    "SwinUNETRPretrainTrainer": 0.75,
    "VolumeFusionTrainer": 0.75,
    "VoCoTrainer": 0.6,
    "PCRLv2Trainer-segformer3d": 0.65,  # nothing but the deepest map
    "SimMIMTrainer-segformer3d": 0.5,
}
LOWEST_BY_METHOD = {"SimSiamIoUTrainer": -1.0, "PCRLv2Trainer": -2.0}  # value of a perfect loss where that is not 0: negative cosines
VISIBLE = 0.99  # share of the visible voxels that get a gradient, at least
VISIBLE_BY_METHOD = {"VolumeFusionTrainer": 0.5}  # where one of two crops has all the weight, nothing of the other one is seen
LABELS = {  # views with numbers of classes or known answers, which are told and not seen, by method
    "PixelClusterTrainer": {"first_labels", "second_labels"},
    "RegistrationPretextTrainer": {"displacement"},
}
PATCH = (8, 24, 16)  # no two axes alike


def prepared(pair, **options):
    trainer = pair.trainer(UNUSED, **options)
    trainer.initialize()
    trainer.model.train()
    return trainer


def gradients_of(trainer, batch):
    """Losses of a step and the gradients of what is trained."""
    trainer.model.zero_grad()
    losses = trainer.step(trainer.model, batch)
    losses["total"].backward()
    return losses, [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]


def check_finite(trainer):
    losses, found = gradients_of(trainer, first_batch(trainer))
    broken = [name for name, loss in losses.items() if not math.isfinite(loss.item())]
    assert not broken, f"not finite: {broken}"
    assert found and all(bool(torch.isfinite(gradient).all()) for gradient in found), "a gradient is not finite"


# One batch


def overfitted(pair):
    """Last over first loss (above the lowest there is) of AdamW on one batch; what is not trained (teacher, centre, queue) and random numbers stay the same."""
    trainer = prepared(pair)
    batch, model = first_batch(trainer), trainer.model
    fixed = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    former = [tensor.clone() for tensor in fixed]
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=LR)
    totals = []
    for _ in range(OVERFIT_STEPS + 1):
        torch.manual_seed(0)
        losses, _ = gradients_of(trainer, batch)
        optimizer.step()
        totals.append(losses["total"].item())
        for tensor, value in zip(fixed, former):
            tensor.data.copy_(value)
    lowest = LOWEST_BY_METHOD.get(pair.method, 0.0)
    return (totals[-1] - lowest) / (totals[0] - lowest)


def check_learns(pair):
    left = overfitted(pair)
    assert left <= LEFT_BY_METHOD.get(str(pair), LEFT_BY_METHOD.get(pair.method, LEFT)), f"{left:.3f} of the first loss is left"


@pytest.mark.parametrize("pair", own_family(OWN), ids=str)
def test_the_loss_of_one_batch_falls_within_thirty_steps(pair):
    check_learns(pair)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_a_method_whose_gradient_has_the_wrong_sign_is_found(family):
    class Ascending(MAETrainer):
        def step(self, model, batch):
            total = super().step(model, batch)["total"]
            return {"total": 2 * total.detach() - total}

    with pytest.raises(AssertionError, match="of the first loss is left"):
        check_learns(Pair(Ascending, family))


# Empty volumes


def check_constant(pair):
    trainer = prepared(pair)
    for value in (0.0, 2.5):
        trainer.store.arrays = [np.full_like(array, value) for array in trainer.store.arrays]
        check_finite(trainer)


@pytest.mark.parametrize("pair", OWN, ids=str)
def test_constant_volumes_give_finite_losses_and_gradients(pair):
    check_constant(pair)


def test_a_method_that_divides_by_the_spread_of_a_crop_is_found():
    class Dividing(MAETrainer):
        def step(self, model, batch):
            return {"total": super().step(model, batch)["total"] / batch["image"].image.std()}

    with pytest.raises(AssertionError, match="not finite"):
        check_constant(Pair(Dividing, "primus"))


# Where gradients come from


def check_reach(pair):
    """What is visible of every view reaches the trained backbone; what is hidden, and a sample's own target, does not."""
    trainer = prepared(pair)
    batch = {name: replace(view, image=view.image.clone().requires_grad_()) for name, view in first_batch(trainer).items()}
    with features_of(trainer.backbone) as features:
        total = trainer.step(trainer.model, batch)["total"]
    count, least = len(next(iter(batch.values())).image), VISIBLE_BY_METHOD.get(pair.method, VISIBLE)
    for sample in range(count):  # of each version of the batch, where several are stacked
        seen = sum((feature[sample::count] * torch.randn_like(feature[sample::count])).sum() for feature in features if feature.requires_grad)
        for name, view in batch.items():
            (found,) = torch.autograd.grad(seen, view.image, allow_unused=True, retain_graph=True)
            if name == "target":
                assert found is None or not found[sample].any(), "the target reaches the backbone"
                continue
            if name in LABELS.get(pair.method, ()):
                assert found is None, "labels reach the backbone"
                continue
            assert found is not None, f"'{name}' does not reach the backbone"
            hidden = torch.zeros_like(view.image[:, :1], dtype=torch.bool) if view.mask is None else hidden_voxels(view)[:, None]
            assert not found[hidden].any(), f"hidden voxels of '{name}' reach the backbone"
            share = found[sample][~hidden[sample].expand_as(found[sample])].ne(0).float().mean()
            assert share >= least, f"only {share:.0%} of the visible voxels of '{name}' reach the backbone"
    if "target" in batch:
        assert torch.autograd.grad(total, batch["target"].image)[0].any(), "the loss does not depend on the target"


@pytest.mark.parametrize("pair", OWN, ids=str)
def test_gradients_come_from_all_that_is_visible_and_from_nothing_else(pair):
    check_reach(pair)


class Peeping(MAETrainer):
    """A block that is hidden to others is visible to it."""

    def step(self, model, batch):
        mask = batch["image"].mask.clone()
        mask.view(-1)[mask.flatten().nonzero()[0]] = False
        mask[1] = mask[0]  # equal counts
        return super().step(model, {"image": replace(batch["image"], mask=mask)})


class HalfBlind(MAETrainer):
    """Sees one side only."""

    def step(self, model, batch):
        view = batch["image"]
        return super().step(model, {"image": replace(view, image=torch.cat((view.image[..., :8], torch.zeros_like(view.image[..., 8:])), -1))})


class Cheating(METHODS["ModelsGenesisTrainer"]):
    """Encodes its target."""

    def step(self, model, batch):
        return {"total": super().step(model, batch)["total"] + model.backbone.pyramid(batch["target"].image)[-1].mean()}


@pytest.mark.parametrize(
    ("cls", "message"),
    [(Peeping, "hidden voxels of 'image' reach"), (HalfBlind, "of the visible voxels of 'image' reach"), (Cheating, "the target reaches")],
)
def test_a_method_that_sees_too_much_or_too_little_is_found(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_reach(Pair(cls, "primus"))


# The same again


@cache
def trained(pair, seed=0, attempt=0):
    """A trainer after three steps, and their losses."""
    trainer = prepared(pair, seed=seed)
    trainer.waited = 0.0
    loader = batches(trainer._dataset(trainer.train_cases, "train"), 0, 3, 0)
    return trainer, [trainer._update(step, loader).values for step in range(3)]


def check_repeats(pair):
    (one, losses), (again, same), (_, others) = trained(pair), trained(pair, attempt=1), trained(pair, seed=1)
    assert losses == same, "other losses for the same seed"
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items()), "other weights for the same seed"
    assert all(mine["total"] != other["total"] for mine, other in zip(losses, others)), "the same losses for another seed"


@pytest.mark.parametrize("pair", OWN, ids=str)
def test_three_steps_are_equal_bit_for_bit_for_one_seed_and_differ_for_another(pair):
    check_repeats(pair)


@pytest.mark.parametrize(("changed", "message"), [("noise", "same seed"), ("seed", "another seed")])
def test_random_numbers_from_elsewhere_and_a_seed_that_is_ignored_are_found(changed, message):
    class Own(MAETrainer):
        generator = np.random.default_rng(0)

        def __init__(self, plan, configuration, config, *arguments, **options):
            super().__init__(plan, configuration, replace(config, seed=0) if changed == "seed" else config, *arguments, **options)

        def step(self, model, batch):
            factor = 1 + self.generator.random() if changed == "noise" else 1.0
            return {"total": factor * super().step(model, batch)["total"]}

    with pytest.raises(AssertionError, match=message):
        check_repeats(Pair(Own, "primus"))


# What is handed over


def check_export(trainer, weights):
    """A fresh backbone with these weights computes what the trained one does."""
    fresh, trained_one = build_backbone(trainer.config_plan, trainer.family, trainer.plan.channels), trainer.transferred()
    fresh.net.load_state_dict(weights)
    image = torch.randn(2, trainer.plan.channels, *trainer.config_plan.patch_size)
    training = trained_one.training
    with torch.no_grad():
        maps = zip(fresh.eval().pyramid(image), trained_one.eval().pyramid(image))
    trained_one.train(training)
    assert all(torch.equal(one, other) for one, other in maps), "the handed over network computes something else"


@pytest.mark.parametrize("pair", OWN, ids=str)
def test_a_fresh_backbone_with_the_weights_that_are_handed_over_computes_the_same(pair):
    trainer = trained(pair)[0]
    check_export(trainer, trainer.state()["network_weights"])


def test_decoders_are_handed_over_where_the_source_does_it():
    handing = {name for name, cls in registered().items() if cls.trains_decoder and cls.transfers_decoder}
    assert handing == {f"{name}Trainer" for name in ("BilateralDenseContrast", "GVSL", "MAE", "ModelsGenesis", "PixelCluster", "SimMIM", "VolumeFusion")}


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_weights_of_another_network_are_found(family):
    trainer = trained(Pair(MAETrainer, family))[0]
    weights = prepared(Pair(MAETrainer, family)).state()["network_weights"]
    with pytest.raises(AssertionError, match="something else"):
        check_export(trainer, weights)


# Channels and shapes


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("pair", OWN, ids=str)
def test_several_channels_and_a_patch_of_unequal_edges_are_trained(pair, channels):
    trainer = prepared(pair, channels=channels, patch=PATCH)
    assert first_batch(trainer)
    check_finite(trainer)
