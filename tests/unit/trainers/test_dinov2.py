"""DINOv2Trainer: schedules, teacher, centre, options, refusals. Its losses are checked in tests/conformance."""

import json
import math
from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.base import resolve
from nnssl_ext.trainers.description import describe
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.dinov2_presets import PRESETS, choose_batch, choose_preset, settle
from nnssl_ext.trainers.retrieval import view_retrieval
from nnssl_ext.trainers.schedules import cosine
from tests.make_data import ArrayStore, tiny_plan, tiny_store

SMALL = {"prototypes": 32, "hidden": 32, "bottleneck": 16, "locals": 2, "batch_size": 2, "workers": 0, "epochs": 2, "iterations": 5, "val_iterations": 1}


def make(folder, store=None, **options):
    trainer = DINOv2Trainer(tiny_plan(), "3d_fullres", DINOv2Trainer.Config(**{**SMALL, **options}), store or tiny_store(), folder)
    trainer.initialize()
    return trainer


def batch(trainer, step=0):
    return {name: view.to(trainer.device) for name, view in trainer._dataset(trainer.train_cases, "train")[step].items()}


def steps(trainer, first, last):
    """Optimiser steps first to last (exclusive), without the loop around them."""
    trainer.waited = 0.0
    micro = trainer.config.accumulate
    for step in range(first, last):
        trainer.next_step = step
        trainer._update(step, iter([batch(trainer, step * micro + i) for i in range(micro)]))


def test_the_teacher_starts_as_an_exact_copy_heads_included(tmp_path):
    model = make(tmp_path).model
    mine, theirs = model.student.state_dict(), model.teacher.net.state_dict()
    assert mine.keys() == theirs.keys() and any("dino_head" in name for name in mine)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_rates_follow_the_closed_forms_layer_by_layer(tmp_path):
    trainer = make(tmp_path, epochs=10, iterations=10, lr=1e-3, freeze=4)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    for step in (0, 3, 4, 9, 10, 57, 99):
        trainer.schedule(step)
        base = 1e-3 * (step + 1) / 10 if step < 10 else 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        decay = 0.2 - (0.2 - 0.04) * (1 + math.cos(math.pi * step / 100)) / 2
        for name, group in groups.items():
            assert group["lr"] == pytest.approx(0.0 if name == "last_layer" and step < 4 else base * group["lr_scale"])
            assert group["weight_decay"] == pytest.approx(decay * group["wd_scale"])
    scales = sorted({round(group["lr_scale"], 4) for group in groups.values()})
    assert scales == [0.1458, 0.729, 0.81, 0.9, 1.0]  # tokenizer .2 * .9^3, positions .9^3, two blocks, above


def test_prototypes_stay_while_they_are_frozen_and_move_afterwards(tmp_path):
    trainer = make(tmp_path, freeze=2, lr=1e-2)
    before = trainer.model.student.ibot_head.prototypes.detach().clone()
    steps(trainer, 0, 2)
    assert torch.equal(trainer.model.student.ibot_head.prototypes, before)
    steps(trainer, 2, 4)
    assert not torch.equal(trainer.model.student.ibot_head.prototypes, before)


def test_teacher_and_centre_move_once_per_optimiser_step_whatever_is_accumulated(tmp_path):
    trainer = make(tmp_path, accumulate=6)
    calls = []
    original = trainer.model.teacher.update
    trainer.model.teacher.update = lambda *arguments: (calls.append(arguments[1]), original(*arguments))
    expected, logits = trainer.model.centre.value.clone(), []
    add = trainer.model.centre.add
    trainer.model.centre.add = lambda x: (logits.append(x.clone()), add(x))
    steps(trainer, 0, 2)
    assert len(calls) == 2 and len(logits) == 12
    for part in (logits[:6], logits[6:]):
        expected = 0.9 * expected + 0.1 * torch.cat(part).mean(0)
    assert torch.allclose(trainer.model.centre.value, expected, atol=1e-7)
    assert calls == [pytest.approx(cosine(step, 10, 0.992, 0.9995)) for step in range(2)]


def test_the_teachers_temperature_rises_over_the_whole_run(tmp_path, monkeypatch):
    trainer, seen = make(tmp_path, teacher_temperature=(0.04, 0.06)), []
    original = type(trainer.model).forward
    monkeypatch.setattr(type(trainer.model), "forward", lambda self, *inputs: (seen.append(inputs[1]), original(self, *inputs))[1])
    steps(trainer, 0, 10)
    assert seen == [pytest.approx(0.04 + 0.02 * step / 10) for step in range(10)]


@pytest.mark.parametrize(
    "options",
    [
        {"centring": "sinkhorn"},
        {"centring": "none"},
        {"unmasked_pass": True},
        {"locals": 0},
        {"registers": 4},
        {"class_token": True},
        {"mask_probability": 0.0},
    ],
    ids=str,
)
def test_every_option_trains_every_parameter(options, tmp_path):
    trainer = make(tmp_path, **options)
    losses = trainer.step(trainer.model, batch(trainer))
    losses["total"].backward()
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())] == []
    if options.get("mask_probability") == 0.0:
        assert losses["ibot"].item() == 0


@pytest.mark.parametrize("options", [{}, {"registers": 4}, {"class_token": True}], ids=str)
def test_the_exported_network_gives_the_teachers_tokens(options, tmp_path):
    """With a class token (tokens attend to it) the exported network has a register in its place, and still gives the same tokens."""
    trainer = make(tmp_path, **options)
    backbone = trainer.transferred().eval()
    library = resolve({"net": backbone.class_name}, ["net"])["net"](input_channels=1, num_classes=2, input_shape=(16, 16, 16), **backbone.kwargs).eval()
    weights = backbone.network_weights()
    missing, unexpected = library.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("up_projection") for name in missing)
    image, found = torch.randn(1, 1, 16, 16, 16), []
    library.eva.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    with torch.no_grad():
        library(image)
        assert torch.allclose(found[0][:, backbone.registers :], backbone.tokens(image), atol=1e-6)


def test_what_is_hidden_has_no_influence_on_the_student(tmp_path):
    trainer = make(tmp_path, mask_probability=1.0)
    view = batch(trainer)["global_0"]
    hidden = view.mask.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None]
    with torch.no_grad():
        trainer.model.eval()
        clean = trainer.model.student(view.image, view.mask)
        broken = trainer.model.student(view.image.masked_fill(hidden, math.nan), view.mask)
    assert hidden.any() and all(torch.equal(a, b) for a, b in zip(clean, broken))


def test_presets_grow_with_the_data_and_the_step():
    assert choose_preset("auto", 500, 64) == choose_preset("auto", 1e6, 8) == PRESETS["small"]
    assert choose_preset("auto", 50_000, 64) == choose_preset("auto", 1e6, 64) == PRESETS["default"]
    assert choose_preset("auto", 1e6, 1024) == PRESETS["large"]


def settled(volumes=64, accumulate=1, width=864, steps=250_000, memory_gb=24.0, crops=1e6, **options):
    config = DINOv2Trainer.Config(accumulate=accumulate, **options)
    return settle(config, crops=crops, volumes=volumes, width=width, memory_gb=memory_gb, steps=steps)


def test_the_learning_rate_follows_the_volumes_of_an_optimiser_step():
    assert settled(16, accumulate=4).lr == settled(64).lr == pytest.approx(2e-3 * math.sqrt(64 / 1024))
    assert settled(4096).lr == settled(2, width=48).lr == 1e-3
    assert settled(2, width=400).lr == pytest.approx(0.1 / 400)  # narrow
    assert settled(2, lr=5e-3).lr == 5e-3


def test_prototypes_are_frozen_for_1500_steps_or_a_hundredth_and_at_most_a_tenth_of_the_run():
    assert [settled(steps=steps).freeze for steps in (100, 15_000, 100_000, 250_000)] == [10, 1500, 1500, 2500]


def test_sizes_follow_memory_width_and_batch():
    assert (settled(memory_gb=8).locals, settled(memory_gb=12).locals) == (4, 8)
    assert (settled(width=96).heads.hidden, settled(width=96).heads.bottleneck) == (576, 96)
    assert (settled(width=864).heads.hidden, settled(width=864).heads.bottleneck) == (2048, 256)
    assert (settled(63).centring, settled(64).centring) == ("centre", "sinkhorn")
    assert (settled(15).koleo, settled(16).koleo) == (0.0, 0.1)
    assert (choose_batch(4, 4.0), choose_batch(4, 8.0), choose_batch(48, 24.0)) == (16, 2, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "smal"},
        {"centring": "center"},
        {"momentum": (0.9,)},
        {"mask_ratio": (0.1, 0.2, 0.3)},
        {"teacher_temperature": (0.04,)},
        {"global_share": (0.5, 1.2)},
        {"local_share": (0.3, 0.1)},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, tmp_path):
    with pytest.raises(UserError) as error:
        make(tmp_path, **options)
    assert next(iter(options)) in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_the_share_of_the_sampling_box_that_crops_show_can_be_chosen(tmp_path):
    crops = make(tmp_path, global_share=(0.5, 0.9), local_share=(0.1, 0.4)).views().crops
    assert (crops.global_share, crops.local_share) == ((0.5, 0.9), (0.1, 0.4))


def test_unnormalised_input_is_refused_before_the_first_step(tmp_path):
    class Raw(ArrayStore):
        def read(self, case, box=None):
            return 400 * super().read(case, box) - 600

    store = tiny_store()
    store.__class__ = Raw
    with pytest.raises(UserError, match="normalised"):
        make(tmp_path, store=store)


def test_koleo_is_on_from_sixteen_volumes_and_warmed_in(tmp_path):
    trainer = make(tmp_path, batch_size=16, epochs=10)
    trainer.next_step = 1
    losses = trainer.step(trainer.model, batch(trainer))
    assert trainer.warmup_steps == 5
    assert losses["total"].item() == pytest.approx((losses["dino"] + losses["ibot"] + 0.1 * 2 / 5 * losses["koleo"]).item(), rel=1e-6)
    assert "koleo" not in make(tmp_path, batch_size=15).step(trainer.model, batch(trainer))


def test_validation_reports_retrieval_across_views(tmp_path):
    found = make(tmp_path).validate()
    assert set(found) == {"total", "dino", "ibot", "retrieval"} and 0 <= found["retrieval"] <= 1


def test_retrieval_is_left_out_where_no_tokens_correspond(tmp_path):
    trainer = make(tmp_path)
    sample = trainer.val_data[0]
    far = replace(sample["global_1"], affine=sample["global_1"].affine + 1e3)
    trainer.val_data = [{**sample, "global_1": far}]
    assert view_retrieval(trainer, "global_0", "global_1") == {}


def test_what_it_derived_is_in_the_description_of_the_run(tmp_path):
    derived = json.loads(json.dumps(describe(make(tmp_path))))["derived"]
    assert derived["locals"] == 2 and derived["heads"]["prototypes"] == 32 and {"temperatures", "freeze", "koleo", "lr"} <= set(derived)


def test_masks_do_not_change_the_crops(tmp_path):
    masked, whole = (make(tmp_path, mask_probability=p) for p in (0.5, 0.0))
    for name, view in batch(masked, 3).items():
        assert torch.equal(view.image, batch(whole, 3)[name].image)
    assert batch(masked, 3)["global_0"].mask.any() or batch(masked, 3)["global_1"].mask.any()
