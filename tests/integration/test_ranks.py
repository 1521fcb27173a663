"""Two gloo processes against one: samples, losses, sharded models, checkpoints. All of it in one started pair."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from nnssl_ext.data.loader import batches
from nnssl_ext.nn import distributed, parallel
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.initial import Initial
from nnssl_ext.trainers.mae import MAETrainer
from tests.conformance.pairs import PAIRS, SLICES, Pair
from tests.toy_trainers import ToyEMATrainer

ROOT = Path(__file__).parents[2]
STEPS, GLOBAL = 3, 4  # optimiser steps, samples of each over all ranks
FURTHER = ("ToyEMATrainer-primus", "DINOv2Trainer-primus", "SparkMAETrainer-resenc", "CroCo3DTrainer-primus", "MultiMAETrainer-primus")
SHARDED = [pair for pair in PAIRS if pair.cls is MAETrainer or str(pair) in FURTHER]
MAE, EMA = (Pair(cls, "primus") for cls in (MAETrainer, ToyEMATrainer))
WORK = """
import sys, torch
torch.set_num_threads(1)
from nnssl_ext.nn import distributed
from tests.integration import test_ranks
with distributed.group("cpu"):
    test_ranks.work(sys.argv[1])
distributed.leave(0)  # as the command line does: gloo aborts some teardowns of the interpreter
"""


def trainer(pair: Pair, folder, float64=True, **options) -> SSLTrainer:
    """A run in double precision and without drop path, or as users have it."""
    small = {"iterations": 2, "batch_size": GLOBAL // distributed.ranks(), "warmup": 0.0}
    made = pair.trainer(folder, float64=float64, **{**small, **options})
    made.initialize()
    made.waited = 0.0
    for module in made.model.modules():
        if float64 and isinstance(module, DropPath):
            module.drop_prob = 0.0
    return made


def steps(run: SSLTrainer, stop: int = STEPS) -> list[list[float]]:
    """Loss over all ranks and gradient norm of each step."""
    loader = batches(run._dataset(run.train_cases, "train"), run.next_step, stop)
    found = []
    for step in range(run.next_step, stop):
        outcome = run._update(step, loader)
        run.next_step = step + 1
        found.append([distributed.mean(outcome.values["total"], run.device), outcome.norm])
    return found


def digests(workers: int) -> list[str]:
    """Of every training sample of six steps that this rank sees."""
    run = trainer(MAE, "unused")
    loader = batches(run._dataset(run.train_cases, "train"), 0, 6, workers)
    content = [(image, mask, affine) for view in (batch["image"] for batch in loader) for image, mask, affine in zip(view.image, view.mask, view.affine)]
    return [hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest() for parts in content]


def work(folder: str) -> None:
    """What each of two processes does; its findings go to rank0.json and rank1.json."""
    root = Path(folder)
    found: dict = {"samples": {workers: digests(workers) for workers in (0, 1, 4)}}
    found["ddp"] = {str(pair): steps(trainer(pair, root)) for pair in PAIRS + SLICES}
    found["fsdp"] = {str(pair): steps(trainer(pair, root, sharding="fsdp")) for pair in SHARDED}
    found["exchanged"] = {str(pair): exchanged(pair, root / str(pair)) for pair in SHARDED}
    found["started"] = {sharding: started(root / str(EMA), sharding) for sharding in parallel.SHARDINGS}
    found["loop"] = loop(root / "loop")
    found["skipped"] = {sharding: skipped(root / "skipped", sharding) for sharding in parallel.SHARDINGS}
    found["statistics"] = {sharding: statistics(sharding) for sharding in parallel.SHARDINGS}
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(found), encoding="utf-8")


def exchanged(pair, folder: Path) -> dict:
    """Two steps with each sharding, saved; then the third step of each from the other's checkpoint."""
    shares = {}
    for sharding in parallel.SHARDINGS:
        run = trainer(pair, folder / sharding, sharding=sharding)
        steps(run, 2)
        run.folder.mkdir(parents=True, exist_ok=True)
        run.save("latest")
        shares[sharding] = sum(distributed.local(parameter).numel() for parameter in run.model.parameters())
    distributed.barrier()
    thirds = {}
    for sharding, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        run = trainer(pair, folder, sharding=sharding)
        run.load(load_checkpoint(folder / other / "checkpoint_latest.pth"), folder)
        thirds[sharding] = steps(run, 3)
    return {"third": thirds, "share": shares["fsdp"] / shares["ddp"]}


def started(folder: Path, sharding: str) -> float:
    """How far student and teacher of a new run are from the teacher of the checkpoint that it starts from; nan where they were equal before."""
    content = load_checkpoint(folder / "ddp" / "checkpoint_latest.pth")
    run = trainer(EMA, folder, sharding=sharding, seed=1)
    wanted = {name.removeprefix("teacher.net."): value for name, value in content["ssl_state"].items() if name.startswith("teacher.net.")}
    apart = []
    for _ in range(2):
        state = parallel.whole(run.model.state_dict())
        both = [(state[f"{part}{name}"].cpu(), value) for part in ("student.", "teacher.net.") for name, value in wanted.items()]
        apart.append(0.0 if distributed.rank() else max(float((a - b).abs().max()) for a, b in both))
        run.init = Initial({"file": "c.pth", "sha256": "", "method": "ToyEMATrainer", "step": 2}, content)
        run.init.fill(run)
    return apart[1] if apart[0] > 0 or distributed.rank() else float("nan")


def loop(folder: Path) -> dict:
    """The whole loop, sharded, with epoch ends, interrupted and continued; fp32 with drop path."""
    for name, stops in (("whole", (None,)), ("parts", (3, None))):
        for number, stop in enumerate(stops):
            trainer(EMA, folder / name, float64=False, sharding="fsdp", recompute=True).fit(resume=number > 0, stop_at=stop)
            distributed.barrier()
    return {}


def skipped(folder: Path, sharding: str) -> list[float]:
    """One rank's loss is not finite in one step: the scale of the loss afterwards, the sum of the weights before and after."""
    run = trainer(MAE, folder, float64=False, sharding=sharding, precision="fp16")
    steps(run, 1)
    losses, before = run.update.losses, [distributed.local(parameter).detach().clone() for parameter in run.model.parameters()]
    run.update.losses = lambda model, batch: {"total": losses(model, batch)["total"] * (float("nan") if distributed.rank() else 1.0)}
    steps(run, 2)
    changed = sum(float((distributed.local(p).detach() - b).abs().sum()) for p, b in zip(run.model.parameters(), before))
    run.update.losses = losses
    steps(run, 3)
    moved = sum(float((distributed.local(p).detach() - b).abs().sum()) for p, b in zip(run.model.parameters(), before))
    return [run.update.scaler.get_scale(), changed, moved]


def statistics(sharding: str) -> list[float]:
    """Running mean after each of two forward passes of a batch of ones (rank 0) or threes (rank 1), momentum 0.5."""
    net = nn.Sequential(nn.BatchNorm1d(1, momentum=0.5), nn.Linear(1, 1))
    model = parallel.spread(net, sharding, torch.device("cpu"))
    found = []
    for _ in range(2):
        model(torch.full((2, 1), 1.0 + 2.0 * distributed.rank())).sum().backward()
        found.append(float(net[0].running_mean))
    return found


def start(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        assert distributed.launch([sys.executable, "-c", WORK, str(folder)], 2) == 0


@pytest.fixture(scope="module")
def pair(shared):
    folder = shared("ranks", start)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_two_processes_with_any_number_of_workers_read_the_samples_of_one(pair):
    one = sorted(digests(0))
    for workers in ("0", "1", "4"):
        assert sorted(pair[1][0]["samples"][workers] + pair[1][1]["samples"][workers]) == one
    assert len(set(one)) == len(one) == 6 * GLOBAL


@pytest.mark.parametrize("method", PAIRS + SLICES, ids=str)
def test_two_processes_compute_the_losses_and_gradients_of_one(method, pair, tmp_path):
    one = torch.tensor(steps(trainer(method, tmp_path)))
    for rank in pair[1]:
        torch.testing.assert_close(torch.tensor(rank["ddp"][str(method)]), one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", SHARDED, ids=str)
def test_a_sharded_model_computes_the_same_with_half_the_weights_per_process(method, pair):
    for rank in pair[1]:
        sharded, whole = torch.tensor(rank["fsdp"][str(method)]), torch.tensor(rank["ddp"][str(method)])
        torch.testing.assert_close(sharded, whole, rtol=1e-6, atol=0)
        assert rank["exchanged"][str(method)]["share"] == pytest.approx(0.5, abs=0.05)


def test_both_processes_start_from_the_weights_of_an_earlier_checkpoint_whole_or_sharded(pair):
    _, (first, _) = pair
    assert first["started"] == {"ddp": 0.0, "fsdp": 0.0}


@pytest.mark.parametrize("method", SHARDED, ids=str)
def test_checkpoints_of_sharded_and_of_copied_models_are_the_same_files(method, pair, tmp_path):
    folder, ranks = pair
    sharded, copied = (load_checkpoint(folder / str(method) / name / "checkpoint_latest.pth") for name in ("fsdp", "ddp"))
    assert sharded.keys() == copied.keys() and sharded["optimizer_state"]["param_groups"] == copied["optimizer_state"]["param_groups"]
    for part in ("ssl_state", "network_weights"):
        assert list(sharded[part]) == list(copied[part]) and all(type(value) is torch.Tensor for value in sharded[part].values())
        torch.testing.assert_close(sharded[part], copied[part], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sharded["optimizer_state"]["state"], copied["optimizer_state"]["state"], rtol=1e-6, atol=1e-9)
    sizes = [(folder / str(method) / name / "checkpoint_latest.pth").stat().st_size for name in ("fsdp", "ddp")]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]  # aliased weights are stored once
    for rank in ranks:
        for third in rank["exchanged"][str(method)]["third"].values():
            torch.testing.assert_close(torch.tensor(third[0]), torch.tensor(rank["ddp"][str(method)][2]), rtol=1e-6, atol=0)
    alone = trainer(method, tmp_path, batch_size=2)  # one process continues what two began
    alone.load(sharded, tmp_path)
    assert all(torch.equal(value, sharded["ssl_state"][name]) for name, value in alone.model.state_dict().items())
    assert torch.isfinite(torch.tensor(steps(alone))).all()


def test_a_sharded_run_with_validation_and_pictures_continues_exactly(pair):
    whole, parts = (pair[0] / "loop" / name for name in ("whole", "parts"))
    one, two = (load_checkpoint(folder / "checkpoint_final.pth") for folder in (whole, parts))
    assert one["step"] == 8 and all(torch.equal(value, two["ssl_state"][name]) for name, value in one["ssl_state"].items())
    assert not torch.equal(one["network_weights"]["eva.norm.weight"], torch.ones_like(one["network_weights"]["eva.norm.weight"]))  # trained
    assert list((whole / "pictures").glob("*.png")) and (whole / "checkpoint_best.pth").exists()
    assert "val/total" in json.loads((whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.parametrize("sharding", parallel.SHARDINGS)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(sharding, pair):
    (scale, changed, moved), other = (rank["skipped"][sharding] for rank in pair[1])
    assert changed == other[1] == 0.0 and moved > 0 and other[2] > 0
    assert scale == other[0] < 65536


@pytest.mark.parametrize("sharding", parallel.SHARDINGS)
def test_the_running_statistics_of_rank_0_win(sharding, pair):
    one, two = (rank["statistics"][sharding] for rank in pair[1])
    assert one == [0.5, 0.75]  # of its own batches: (0 + 1) / 2, (0.5 + 1) / 2
    assert two[1] == (0.5 + 3) / 2  # from rank 0's after the first pass, not its own 1.5
