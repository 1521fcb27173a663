"""Recomputed, compiled and spread models on one process; several processes are in tests/integration/test_ranks.py."""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn import distributed, parallel
from nnssl_ext.nn.cross_attention import CrossAttentionBlock
from nnssl_ext.trainers.config import SPEED_ONLY, folder_suffix, speed_only
from nnssl_ext.trainers.mae import MAETrainer
from tests.conformance.pairs import METHODS, Pair
from tests.make_data import tiny_plan, tiny_store
from tests.toy_trainers import ToyEMATrainer, trained

PLAN, CPU = tiny_plan(), torch.device("cpu")


def trainer(folder, method=MAETrainer, family="primus", **options):
    config = method.Config(**{"epochs": 1, "iterations": 4, "workers": 0, "warmup": 0.0, **options})
    made = method(PLAN, "3d_fullres", config, tiny_store(), folder, family=family)
    made.initialize()
    made.waited = 0.0
    return made


@pytest.mark.parametrize(("family", "count"), [("primus", 4), ("resenc", 6), ("segformer3d", 2)])
def test_the_parts_are_transformer_blocks_and_stages_each_once(family, count, tmp_path):
    model = trainer(tmp_path, family=family).model
    found = parallel.parts(model)
    assert len(found) == len({id(part) for part in found}) == count
    inside = {id(p) for part in found for p in part.parameters()}
    assert sum(p.numel() for p in model.parameters() if id(p) in inside) > 0.6 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("method", "count"), [("CroCo3DTrainer", 2 + 2), ("MultiMAETrainer", 2 + 2 * (1 + 2))])
def test_blocks_that_read_a_memory_are_parts_too_and_recomputing_them_changes_no_bit(method, count, tmp_path):
    plain, again = (Pair(METHODS[method], "primus").trainer(tmp_path, recompute=on) for on in (False, True))
    for run in (plain, again):
        run.initialize()
        run.waited = 0.0
    found = parallel.parts(again.model)
    assert len(found) == count and sum(isinstance(part, CrossAttentionBlock) for part in found) == 2
    assert trained(plain) == trained(again)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in plain.model.state_dict().items())


@pytest.mark.parametrize(("method", "family"), [(MAETrainer, "primus"), (MAETrainer, "resenc"), (MAETrainer, "segformer3d"), (ToyEMATrainer, "primus")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit_of_losses_gradients_and_weights(method, family, precision, tmp_path):
    plain, again = (trainer(tmp_path, method, family, recompute=on, precision=precision) for on in (False, True))
    calls = counted(again)
    assert trained(plain) == trained(again)  # drop path included
    assert calls["forward"] == 2 * 3  # twice in each of three steps
    assert list(plain.model.state_dict()) == list(again.model.state_dict())
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.model.parameters(), again.model.parameters()) if p.grad is not None)
    assert figures(plain) == figures(again)


def figures(run) -> dict[str, list[float]]:
    """What the health monitor has summed up."""
    return {name: torch.as_tensor(total).tolist() for name, (_, total, *_) in run.health.sums.items()}


def counted(run) -> dict[str, int]:
    """How often the first part of the trained model is computed from now on."""
    calls = {"forward": 0}
    inner = [module for module in parallel.parts(run.backbone)[0].children() if len(list(module.parameters()))][0]

    def count(*_):
        calls["forward"] += 1

    inner.register_forward_pre_hook(count)
    return calls


def test_a_part_with_running_statistics_is_not_recomputed():
    class StackedConvBlocks(nn.Sequential):
        pass

    def made():
        torch.manual_seed(0)
        return nn.Sequential(StackedConvBlocks(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)), StackedConvBlocks(nn.Conv3d(2, 2, 3), nn.InstanceNorm3d(2)))

    plain, again = made(), made()
    parallel.speed_up(again, CPU, compiled=False, recomputed=True)
    assert "forward" not in vars(again[0]) and "forward" in vars(again[1])
    x = torch.randn(2, 1, 8, 8, 8)
    for net in (plain, again):
        net(x).square().sum().backward()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in plain.state_dict().items())


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NO_COMPILER])])
def test_compiled_parts_compute_the_same_and_keep_their_names(backend, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, compiled = trainer(tmp_path), trainer(tmp_path, compile=True)
    assert "warning" not in capsys.readouterr().out
    torch.testing.assert_close(torch.tensor(trained(compiled, 2)), torch.tensor(trained(plain, 2)), rtol=1e-5, atol=0)
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    assert compiled.health.vectors["pooled"][0].shape == plain.health.vectors["pooled"][0].shape  # the taps still see the features
    assert compiled.validate()["total"] == pytest.approx(plain.validate()["total"], rel=1e-5)


def test_without_a_compiler_a_warning_is_printed_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    run = trainer(tmp_path, compile=True)
    said = capsys.readouterr().out.strip()
    assert said.startswith("warning: torch.compile does not work here (No working C++ compiler found)") and len(said.splitlines()) == 1
    assert trained(run, 1) == trained(trainer(tmp_path), 1)


def test_an_unknown_sharding_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown sharding 'zero'"):
        trainer(tmp_path, sharding="zero")


def test_a_parameter_without_axes_is_refused_by_name_before_it_is_sharded(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    net = nn.Module()
    net.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="without axes") as error:
        parallel.spread(net, "fsdp", CPU)
    assert "temperature" in str(error.value)


def test_one_process_needs_no_wrapper(tmp_path):
    for sharding in parallel.SHARDINGS:
        run = trainer(tmp_path, sharding=sharding)
        assert run.parallel is run.model and not parallel.is_sharded(run.model)


def test_what_changes_only_speed_and_memory_stays_out_of_the_folders_name():
    config = MAETrainer.Config(recompute=True, compile=True, sharding="fsdp", workers=3)
    assert folder_suffix(config, "resenc", "resenc") == "" and speed_only(config) == {"recompute", "compile", "sharding", "workers"}
    assert SPEED_ONLY == {"folder": False}
