"""Every method trains, stops, goes on exactly, and leaves what a run has to leave."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.base import build_backbone, families
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.pictures import draw_run
from tests.conformance.pairs import EVERY, METHODS, PAIRS, SLICES, STEPS, Pair, first_batch, own_family, registered
from tests.make_data import ArrayStore

TOYS = [pair for pair in PAIRS if pair.method not in registered()]
REFUSED = [*(pair for pair in EVERY if not pair.supported()), Pair(type("GraphTrainer", (SSLTrainer,), {"needs": (frozenset({"graph"}),)}), "resenc")]
PRECISIONS = [{"precision": "bf16"}, {"accumulate": 2}]
# crops of half a patch still have 4^3 cells in the deepest map: on fewer, PyTorch's bfloat16 weight gradients of 3^3 convolutions are wrong on the CPU (2.15)
LARGE = {"patch": (32, 32, 32), "store": ArrayStore()}


def differences(one, two, where="") -> list[str]:
    """Where two nested contents are not equal bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        same = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(two, dict) and set(one) == set(two):
        return [found for key in one for found in differences(one[key], two[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [found for number, pair in enumerate(zip(one, two)) for found in differences(*pair, f"{where}/{number}")]
    return [] if one == two or one != one and two != two else [where]


def saved(folder, name):
    """A checkpoint's content, without how often the training waited for data: that depends on the machine."""
    content = load_checkpoint(folder / f"checkpoint_{name}.pth")
    content["health_state"]["strikes"].pop("data wait", None)
    return content


def curves(folder):
    """What an epoch's record says, without times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        alarms = [text for text in record.pop("alarms", ()) if "waits for data" not in text]  # that depends on the machine
        record |= {"alarms": alarms} if alarms else {}
    return [{key: value for key, value in record.items() if key not in ("time", "seconds", "samples_per_second") and "wait" not in key} for record in records]


def interrupted(pair, folder, stops, **options):
    """A run that is stopped before each of the steps `stops` and continued, while other code draws random numbers."""
    for number, stop in enumerate((*stops, None)):
        torch.manual_seed(1000 + number)
        pair.trainer(folder, **options).fit(resume=number > 0, stop_at=stop)


def check_resume(pair, folder, stops, **options):
    pair.trainer(folder / "whole", **options).fit()
    interrupted(pair, folder / "parts", stops, **options)
    for name in ("final", "latest", "best"):
        contents = [saved(folder / run, name) for run in ("whole", "parts")]
        assert not differences(*contents), name
    assert curves(folder / "whole") == curves(folder / "parts")


@pytest.mark.parametrize("pair", own_family(PAIRS + SLICES), ids=str)
def test_a_run_that_is_stopped_at_steps_1_7_and_19_ends_bit_for_bit_like_an_uninterrupted_one(pair, tmp_path):
    check_resume(pair, tmp_path, (1, 7, 19))


@pytest.mark.slow
@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_resuming_is_exact_in_bf16_and_with_accumulated_batches(pair, options, tmp_path):
    room = LARGE if "precision" in options and "token_drop" not in families()[pair.family].supports else {}
    check_resume(pair, tmp_path, (1, 7, 19), **options, **room)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *PRECISIONS], ids=str)
@pytest.mark.parametrize("pair", TOYS, ids=str)
def test_resuming_is_exact_at_every_step(pair, options, tmp_path):
    check_resume(pair, tmp_path, range(1, STEPS), **options)


def test_a_state_that_a_checkpoint_forgets_is_found(tmp_path):
    class Forgetful(METHODS["ToyQueueTrainer"]):
        def load(self, content, path):
            super().load({**content, "ssl_state": {**content["ssl_state"], "queue": torch.randn_like(content["ssl_state"]["queue"])}}, path)

    pair = Pair(Forgetful, "primus")
    with pytest.raises(AssertionError, match="final"):
        check_resume(pair, tmp_path, (7,))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_loader_processes_change_nothing(pair, tmp_path):
    for workers in (0, 2):
        pair.trainer(tmp_path / str(workers), workers=workers).fit(stop_at=5)
    contents = [saved(tmp_path / str(workers), "latest") for workers in (0, 2)]
    assert differences(*contents) == ["/config/workers"]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_short_run_has_finite_losses_health_figures_no_alarm_and_a_checkpoint_that_fits_the_library(pair, tmp_path):
    trainer = pair.trainer(tmp_path, batch_size=4)  # four epochs of it are enough vectors for a check
    trainer.fit()
    records = curves(tmp_path)
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    for record in records:
        assert all(math.isfinite(record[f"{side}/total"]) for side in ("train", "val"))
        assert {"health/gradient_norm", "health/update_ratio", "health/skipped_steps", "health/background"} <= set(record)
        assert record["health/gradient_norm"] > 0 and record["health/skipped_steps"] == 0
        assert "alarms" not in record
    assert {"health/pooled/std", "health/patches/rank_me"} <= set().union(*records)
    content = load_checkpoint(tmp_path / "checkpoint_final.pth")  # reads nothing but tensors and plain types
    fresh = build_backbone(trainer.config_plan, pair.family, trainer.plan.channels).network_weights()
    assert {key: value.shape for key, value in content["network_weights"].items()} == {key: value.shape for key, value in fresh.items()}
    assert all(bool(torch.isfinite(value).all()) for value in content["network_weights"].values() if value.is_floating_point())


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_trained_parameter_gets_a_gradient_and_is_in_one_group_of_the_optimiser(pair, tmp_path):
    trainer = pair.trainer(tmp_path)
    trainer.initialize()
    trainer.model.train()
    losses = trainer.step(trainer.model, first_batch(trainer))
    assert losses["total"].ndim == 0 and all(bool(torch.isfinite(loss)) for loss in losses.values())
    losses["total"].backward()
    names = {parameter: name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert [name for parameter, name in names.items() if parameter.grad is None] == []  # processes that train together would wait for them
    grouped = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(names)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pictures_are_drawn_and_leave_the_training_as_it_was(pair, tmp_path, undrawn):
    trainer = pair.trainer(tmp_path)
    trainer.initialize()
    batch = first_batch(trainer)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.model.train()
    random = torch.get_rng_state()
    draw_run(trainer, batch, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert torch.equal(torch.get_rng_state(), random) and trainer.model.training
    assert not differences(before, trainer.model.state_dict())


@pytest.mark.parametrize("pair", REFUSED, ids=str)
def test_a_backbone_that_lacks_something_is_refused_before_data_are_read(pair, tmp_path):
    with pytest.raises(UserError, match=f"{pair.method} needs") as error:
        pair.trainer(tmp_path, store=object())
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("method", registered())
def test_a_method_is_one_short_file_that_names_its_source_and_explains_its_settings(method):
    cls = METHODS[method]
    file = Path(inspect.getsourcefile(cls))
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 150
    assert "Source:" in (cls.__doc__ or "") and cls.citation
    assert cls.build is not SSLTrainer.build and cls.default_family in [pair.family for pair in PAIRS if pair.cls is cls]
