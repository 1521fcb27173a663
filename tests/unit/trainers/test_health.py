"""The health monitor: what it taps, when it raises an alarm, and that a continued run goes on exactly."""

import contextlib
import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nnssl_ext.nn import health as figures
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
from nnssl_ext.trainers.health import HealthMonitor
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.sinks import read_metrics
from tests.make_data import ArrayStore, tiny_plan
from tests.toy_trainers import ToyCentreTrainer, ToyEMATrainer, ToyPredictorTrainer, ToyQueueTrainer

PLAN = tiny_plan()
STORE = ArrayStore()


def make(cls, folder, family="primus", seed=0, **config):
    trainer = cls(PLAN, "3d_fullres", cls.Config(batch_size=8, workers=0, seed=seed, **config), STORE, folder, family=family)
    trainer.initialize()
    return trainer


def run(trainer, monitor, steps, lr, start=0, iterations=16):
    """Plain AdamW steps; the figures of each epoch and all alarms."""
    trainer.health = monitor
    data = trainer._dataset(trainer.train_cases, "train")
    if not hasattr(trainer, "adamw"):
        trainer.adamw = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr)
    trainer.model.train()
    records, alarms = [], []
    for step in range(start, steps):
        batch = data[step]
        torch.manual_seed(step)
        with monitor.watch(step):
            loss = trainer.step(trainer.model, batch)["total"]
            trainer.adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.adamw.step()
            trainer.after_update(step)
        monitor.seen(step, loss.item(), norm.item(), True, batch)
        if (step + 1) % iterations == 0:
            record, texts = monitor.epoch(step + 1, 0.0)
            records.append(record)
            alarms += texts
    return records, alarms


BROKEN = [(ToyPredictorTrainer, {"predictor": False}, 80), (ToyCentreTrainer, {"centring": False}, 160)]


@pytest.mark.parametrize(("cls", "config", "steps"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_forced_collapse_raises_the_alarm_with_cause_and_remedy(cls, config, steps, tmp_path):
    trainer = make(cls, tmp_path, **config)
    records, alarms = run(trainer, HealthMonitor(trainer.backbone, 16, armed=16), steps, 1e-2)
    assert len(alarms) == 1 and "collapsed" in alarms[0] and "lower the learning rate" in alarms[0], records[-1]
    assert trainer.health.collapsed


class Constant(MAETrainer):
    """A broken reconstruction: every token shall equal the first one of the first image; declares nothing to the monitor."""

    def step(self, model, batch):
        tokens = model.backbone.pyramid(batch["image"].image)[-1].flatten(2)
        return {"total": (tokens - tokens[:1, :, :1].detach()).square().mean()}


def test_features_that_no_method_declares_raise_the_alarm_when_they_fall_flat(tmp_path):
    trainer = make(Constant, tmp_path)
    records, alarms = run(trainer, HealthMonitor(trainer.backbone, 16, armed=16), 96, 1e-2)
    assert len(alarms) == 1 and "(patches: std*sqrt(D)" in alarms[0], [r["health/patches/std"] for r in records]


HEALTHY = [(ToyEMATrainer, 1e-2), (ToyPredictorTrainer, 1e-2), (ToyQueueTrainer, 1e-2), (ToyCentreTrainer, 1e-2), (MAETrainer, 1e-3)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", ["primus", "resenc"])
@pytest.mark.parametrize(("cls", "lr"), HEALTHY)
def test_healthy_runs_stay_silent_and_spread(cls, lr, family, seed, tmp_path):
    trainer = make(cls, tmp_path, family=family, seed=seed)
    records, alarms = run(trainer, HealthMonitor(trainer.backbone, 16, armed=16), 96, lr)
    assert alarms == [] and not trainer.health.collapsed, records[-1]
    last = records[-1]
    assert last.get("health/projection/std", 1.0) > 0.2 and last.get("health/cls/MI", 2.0) > 0.4  # well above the limits


def test_a_flat_check_is_known_at_once_so_that_the_best_checkpoint_stays_a_healthy_one(backbone):
    monitor, one = HealthMonitor(backbone, 1, armed=1000), torch.randn(1, 16)
    for flat, x in ((False, torch.randn(64, 16)), (True, one + 1e-3 * torch.randn(64, 16)), (False, torch.randn(64, 16))):
        with monitor.watch(0):
            monitor.add("projection", x)
        assert monitor.epoch(1, 0.0)[1] == [] and monitor.collapsed is flat  # not armed: no alarm


def test_the_best_checkpoint_is_of_the_last_healthy_epoch_although_a_collapse_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_sinks", "none")
    config = ToyPredictorTrainer.Config(predictor=False, epochs=6, iterations=8, batch_size=8, workers=0, lr=1e-2, optimizer="adamw", warmup=0.0)
    ToyPredictorTrainer(PLAN, "3d_fullres", config, STORE, tmp_path, family="primus").fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    healthy = [record for record in records if record["health/projection/std"] >= 0.1]
    assert len(healthy) < 5 and records[-1]["val/total"] < healthy[-1]["val/total"]
    assert load_checkpoint(tmp_path / "checkpoint_best.pth")["step"] == min(healthy, key=lambda record: record["val/total"])["step"]


@pytest.mark.parametrize("active", [True, False])
def test_a_continued_run_repeats_its_health_figures_and_the_monitor_changes_no_weight(active, tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_sinks", "none")

    class Watched(ToyCentreTrainer):
        def initialize(self):
            super().initialize()
            self.health.active = active

    def runner(name, cls=Watched):
        config = ToyCentreTrainer.Config(epochs=3, iterations=6, batch_size=6, workers=0)  # 36 vectors an epoch: a check needs two
        return cls(PLAN, "3d_fullres", config, STORE, tmp_path / name, family="primus")

    runner("whole", ToyCentreTrainer).fit()
    runner("parts").fit(stop_at=9)
    runner("parts").fit(resume=True)
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint_final.pth") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["ssl_state"][key]) for key, value in whole["ssl_state"].items())
    if not active:
        return
    assert equal(whole["health_state"], parts["health_state"])
    records = [
        [{k: v for k, v in r.items() if k.startswith("health/")} for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")
    ]
    assert records[0] == records[1] and "health/cls/MI" in records[0][1] and "health/cls/MI" not in records[0][0]


def equal(one, two):
    """Whether nested dictionaries and lists of tensors and numbers are the same bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


@pytest.mark.parametrize("flat", [0.4, 0.02])
def test_undeclared_patches_that_were_flat_from_the_start_are_no_collapse(flat, backbone):
    monitor, alarms = HealthMonitor(backbone, 1), []
    mean = torch.ones(1, 16)
    for spread in [flat] * 4:
        monitor.vectors["patches"] = [mean + spread * torch.randn(64, 16)]
        alarms += monitor.epoch(1, 0.0)[1]
    assert alarms == []


def test_vectors_that_are_not_finite_are_left_out(backbone):
    monitor, x = HealthMonitor(backbone, 1), torch.randn(80, 16)
    x[3, 2] = float("nan")
    for vectors, known in ((x, True), (torch.full((80, 16), float("inf")), False)):
        with monitor.watch(0):
            monitor.add("projection", vectors)
        record, _ = monitor.epoch(1, 0.0)
        assert ("health/projection/std" in record) is known
    with monitor.watch(0):
        monitor.add("projection", x[[i for i in range(80) if i != 3]])
    assert monitor.epoch(1, 0.0)[0]["health/projection/std"] == figures.spread(x[x.isfinite().all(1)]).item()


def test_notes_are_averaged_over_sampled_steps_and_costly_ones_computed_only_there(backbone):
    monitor, calls = HealthMonitor(backbone, 640), []  # every tenth step
    for step in range(20):
        with monitor.watch(step):
            monitor.note("momentum", float(step))
            monitor.note("teacher_distance", lambda step=step: calls.append(step) or torch.tensor(2.0))
    record, _ = monitor.epoch(20, 0.0)
    assert calls == [0, 10] and record["health/momentum"] == 5.0 and record["health/teacher_distance"] == 2.0


def test_a_divergence_noted_after_its_logits_is_reported_with_them(backbone):
    monitor = HealthMonitor(backbone, 4)
    for step in range(2):
        with monitor.watch(step):
            monitor.add_logits("tokens", torch.randn(64, 8))
            monitor.note("tokens/KL", float(step))
    found, _ = monitor.epoch(2, 0.0)
    assert found["health/tokens/KL"] == 0.5 and 0 < found["health/tokens/MI"] < 2 and not monitor.sums


def test_a_momentum_method_reports_its_teacher(tmp_path):
    trainer = make(ToyEMATrainer, tmp_path)
    records, _ = run(trainer, HealthMonitor(trainer.backbone, 4), 4, 1e-2, iterations=4)
    assert 0 < records[0]["health/teacher_distance"] < 1 and 0.9 <= records[0]["health/momentum"] <= 0.99


@pytest.fixture(params=["primus", "resenc"])
def backbone(request):
    torch.manual_seed(0)
    return build_backbone(PLAN.configuration("3d_fullres"), request.param, 1)


def images(n=2):
    return torch.randn(n, 1, *PLAN.configuration("3d_fullres").patch_size)


def test_sampled_vectors_are_those_of_the_forward_itself(backbone):
    monitor, x = HealthMonitor(backbone, 1), images()
    with monitor.watch(0):
        maps = backbone.pyramid(x)
        backbone.pyramid(images())  # a second view
    assert torch.equal(monitor.vectors["pooled"][0], maps[-1].flatten(2).mT.mean(1))
    tokens, places = maps[-1].flatten(2).mT, monitor.vectors["positions"][0]
    grid = maps[-1].shape[2:]
    index = places[:, 0] * grid[1] * grid[2] + places[:, 1] * grid[2] + places[:, 2]
    assert torch.equal(monitor.vectors["patches"][0].reshape(2, -1, tokens.shape[2])[1], tokens[1, index.reshape(2, -1)[1].long()])
    assert len(monitor.vectors["pooled"]) == 1


def test_dropped_tokens_keep_their_places(tmp_path):
    backbone = build_backbone(PLAN.configuration("3d_fullres"), "primus", 1)
    monitor = HealthMonitor(backbone, 1)
    keep = torch.tensor([[5, 9, 30], [1, 2, 3]])
    with monitor.watch(0):
        backbone.tokens(images(), keep=keep)
    _, y, x = backbone.grid
    places = monitor.vectors["positions"][0].reshape(2, 3, 3)
    index = places[..., 0] * y * x + places[..., 1] * x + places[..., 2]
    assert torch.equal(index.sort(1).values.long(), keep)


def test_nothing_is_left_on_the_backbone_and_unsampled_steps_collect_nothing(backbone):
    monitor = HealthMonitor(backbone, 640)  # every tenth step
    before = set(vars(backbone))
    with monitor.watch(3):
        assert set(vars(backbone)) == before
        backbone.pyramid(images())
    with contextlib.suppress(KeyError), monitor.watch(10):
        raise KeyError
    assert set(vars(backbone)) == before and not monitor.vectors
    copied = copy.deepcopy(backbone)
    assert type(copied).pyramid is type(backbone).pyramid


def test_watching_changes_no_gradient_and_checkpointing_counts_once(backbone):
    backbone.eval()  # no drop path
    x = images()
    backbone.pyramid(x)[-1].square().sum().backward()
    expected = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
    backbone.zero_grad()
    monitor = HealthMonitor(backbone, 1)
    with monitor.watch(0):
        checkpoint(lambda x: backbone.pyramid(x)[-1], x, use_reentrant=False).square().sum().backward()
    assert len(monitor.vectors["pooled"]) == 1
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip((p.grad for p in backbone.parameters() if p.grad is not None), expected))


def test_a_compiled_model_is_tapped_on_sampled_steps_only():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build_backbone(PLAN.configuration("3d_fullres"), "primus", 1)

        def forward(self, x):
            return self.backbone.tokens(x).sum()

    model, x = Model(), images()
    compiled, monitor = torch.compile(model, backend="eager"), HealthMonitor(model.backbone, 640)
    for step in range(21):
        with monitor.watch(step):
            compiled(x)
    assert len(monitor.vectors["pooled"]) == 3


def test_under_autocast_vectors_are_single_precision(backbone):
    monitor = HealthMonitor(backbone, 1)
    with monitor.watch(0), torch.autocast("cpu", torch.bfloat16):
        backbone.pyramid(images())
    assert monitor.vectors["pooled"][0].dtype == torch.float32


def test_figures_of_an_epoch_are_those_of_the_collected_vectors(backbone):
    monitor, generator = HealthMonitor(backbone, 4), torch.Generator().manual_seed(0)
    chunks = [torch.randn(32, 8, generator=generator) for _ in range(4)]
    logits = [torch.randn(32, 10, generator=generator) for _ in range(8)]
    for step in range(4):
        with monitor.watch(step):
            monitor.add("projection", chunks[step])
            monitor.add_logits("cls", logits[2 * step], logits[2 * step + 1])
    record, _ = monitor.epoch(4, 0.1)
    x, student, teacher = torch.cat(chunks), torch.cat(logits[::2]), torch.cat(logits[1::2])
    assert record["health/projection/std"] == pytest.approx(figures.spread(x).item(), rel=1e-5)
    assert record["health/projection/rank_me"] == pytest.approx(figures.rank_me(figures.singular_values(x)).item(), rel=1e-5)
    conditional, marginal = figures.conditional_entropy(teacher).item(), figures.marginal_entropy(teacher.softmax(1).mean(0)).item()
    assert record["health/cls/MI"] == pytest.approx(marginal - conditional, rel=1e-4)
    assert record["health/cls/KL"] == pytest.approx(figures.divergence(teacher, student).item(), rel=1e-4)
    assert record["health/cls/prototypes"] == pytest.approx(len(set(teacher.argmax(1).tolist())) / 10)
    assert monitor.epoch(8, 0.1)[0].keys() == {"health/skipped_steps"}  # nothing is judged twice


def fed(monitor, epochs, *, loss=lambda i: 1.0 - 0.01 * i, norm=1.0, applied=True, wait=0.0):
    alarms = []
    for number in range(epochs):
        for step in range(2):
            monitor.seen(step, loss(number) if callable(loss) else loss, norm(number) if callable(norm) else norm, applied, {})
        alarms += monitor.epoch(100, wait)[1]
    return alarms


@pytest.mark.parametrize(
    ("word", "bad", "good"),
    [
        ("waits for data 40%", {"wait": 0.4}, {"wait": 0.29}),
        ("skipped", {"applied": False}, {}),
        ("gradient norm", {"norm": lambda i: 1.0 if i < 5 else 20.0}, {"norm": lambda i: 1.0 if i < 5 else 9.0}),
        ("loss has not been below", {"loss": lambda i: 1.0 + 0.01 * i}, {"loss": lambda i: 1.0 - 0.01 * i}),
    ],
)
def test_each_alarm_is_raised_once_and_only_for_its_cause(word, bad, good, backbone):
    alarms = fed(HealthMonitor(backbone, 1), 16, **bad)
    assert len(alarms) == 1 and word in alarms[0]
    assert fed(HealthMonitor(backbone, 1), 16, **good) == []


def test_no_alarm_before_the_monitor_is_armed_nor_for_two_checks(backbone):
    assert fed(HealthMonitor(backbone, 1, armed=101), 9, wait=0.9) == []
    assert fed(HealthMonitor(backbone, 1), 2, wait=0.9) == []


def test_other_ranks_collect_nothing(backbone):
    monitor = HealthMonitor(backbone, 1, active=False)
    with monitor.watch(0):
        backbone.pyramid(images())
    assert fed(monitor, 3, wait=0.9) == [] and not monitor.vectors


def test_a_continued_run_gives_the_same_figures_and_alarms(tmp_path):
    whole = make(ToyPredictorTrainer, tmp_path, predictor=False)
    expected = run(whole, HealthMonitor(whole.backbone, 8, armed=8), 24, 3e-3, iterations=8)
    part = make(ToyPredictorTrainer, tmp_path, predictor=False)
    first = run(part, HealthMonitor(part.backbone, 8, armed=8), 13, 3e-3, iterations=8)
    save_checkpoint(tmp_path / "c.pth", {"network_weights": {}, "health": part.health.state_dict()})
    monitor = HealthMonitor(part.backbone, 8, armed=8)
    monitor.load_state_dict(load_checkpoint(tmp_path / "c.pth")["health"])
    second = run(part, monitor, 24, 3e-3, start=13, iterations=8)
    assert (first[0] + second[0], first[1] + second[1]) == expected
