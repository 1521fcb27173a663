"""TensorBoard, W&B and MLflow: curves continue without gaps and duplicates."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnssl_ext.trainers.sinks import MLflow, TensorBoard, WandB, scalars

SETTINGS = {"dataset": "Dataset801_Test", "name": "MAETrainer__nnsslPlans", "config": {"lr": 0.1}}


def record(step, **values):
    return {"epoch": step // 5 - 1, "step": step, "time": 1000.0 + step, "train/total": 1 / step, "val/total": None, **values}


def test_only_finite_numbers_are_curves():
    assert scalars(record(5, alarms=["x"], lr=0.1, skips=2)) == {"train/total": 0.2, "lr": 0.1, "skips": 2.0}


def test_tensorboard_curves_of_a_continued_run_have_every_step_once(tmp_path):
    first = TensorBoard(tmp_path, SETTINGS, 0)
    for step in (5, 10, 15):
        first.add(record(step), step)
    first.close("stopped", "")
    second = TensorBoard(tmp_path, SETTINGS, 12)  # step 15 is trained again
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "picture.png")
    for step in (15, 20):
        second.add(record(step, alarms=["collapse"], **{"train/total": float(step)}), step)
    second.picture("views", tmp_path / "picture.png", 20)
    second.close("finished", "")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total")] == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1)), (15, 15.0), (20, 20.0)]
    assert events.Images("views")[0].width == 6
    assert "val/total" not in events.Tags()["scalars"]


def test_nothing_is_opened_before_there_is_something_to_write(tmp_path):
    TensorBoard(tmp_path, SETTINGS, 0).close("stopped", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what it is told; runs by id."""
    runs = {}

    class Run:
        def __init__(self, options):
            self.options, self.logged, self.alerts, self.ended = options, [], [], None

        def log(self, values, step):
            self.logged.append((step, values))

        def alert(self, title, text):
            self.alerts.append(text)

        def finish(self, exit_code):
            self.ended = exit_code

    module = types.ModuleType("wandb")
    module.runs = runs
    module.init = lambda **options: runs.setdefault(options["id"], Run(options))
    module.Image = lambda path: f"image {path}"
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_continued_run_is_the_same_run_on_wandb(tmp_path, wandb):
    first = WandB(tmp_path, SETTINGS, 0)
    first.add(record(5), 5)
    first.add(record(10, alarms=["collapse"]), 10)
    second = WandB(tmp_path, SETTINGS, 5)  # step 10 is trained again, bit for bit
    second.add(record(10), 10)
    second.add(record(15), 15)
    second.picture("views", tmp_path / "x.png", 15)
    second.close("finished", "")
    (run,) = wandb.runs.values()
    assert [step for step, _ in run.logged] == [5, 10, 15, 15] and run.logged[0][1]["train/total"] == 0.2
    assert run.options["config"] == SETTINGS and run.options["project"] == "nnssl" and run.options["group"] == "Dataset801_Test"
    assert run.alerts == ["collapse"] and run.ended == 0


def test_a_run_that_starts_anew_is_another_run_on_wandb(tmp_path, wandb):
    for _ in range(2):
        WandB(tmp_path, SETTINGS, 0).add(record(5), 5)
    assert len(wandb.runs) == 2
    WandB(tmp_path, SETTINGS, 5).close("failed", "x")
    assert list(wandb.runs.values())[-1].ended == 1 and len(wandb.runs) == 2


@pytest.fixture
def mlflow(monkeypatch):
    runs = {}

    class Client:
        experiments = {}

        def get_experiment_by_name(self, name):
            return self.experiments.get(name)

        def create_experiment(self, name):
            self.experiments[name] = types.SimpleNamespace(experiment_id=str(len(self.experiments)))
            return self.experiments[name].experiment_id

        def create_run(self, experiment, run_name):
            identifier = f"run{len(runs)}"
            runs[identifier] = types.SimpleNamespace(experiment=experiment, name=run_name, metrics=[], params={}, tags={}, status="RUNNING", artifacts=[])
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identifier))

        def update_run(self, run_id, status):
            runs[run_id].status = status

        def log_batch(self, run_id, metrics=(), params=()):
            runs[run_id].metrics += metrics
            runs[run_id].params |= dict(params)

        def set_tag(self, run_id, key, value):
            runs[run_id].tags[key] = value

        def log_artifact(self, run_id, path, folder):
            runs[run_id].artifacts.append((folder, path))

        def set_terminated(self, run_id, status):
            runs[run_id].status = status

    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowClient, module.runs = Client, runs
    entities.Metric, entities.Param = (lambda *values: values), (lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # set and restored
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    return module


def test_a_continued_run_is_the_same_run_on_mlflow(tmp_path, mlflow):
    first = MLflow(tmp_path, SETTINGS, 0)
    first.add(record(5), 5)
    first.add(record(10), 10)
    first.close("stopped", "stopped by SIGTERM")
    assert mlflow.runs["run0"].status == "KILLED" and mlflow.runs["run0"].tags["end"] == "stopped by SIGTERM"
    second = MLflow(tmp_path, SETTINGS, 5)
    assert mlflow.runs["run0"].status == "RUNNING"
    second.add(record(10), 10)
    second.add(record(15, alarms=["collapse"]), 15)
    second.picture("views", tmp_path / "x.png", 15)
    second.close("finished", "")
    (run,) = mlflow.runs.values()
    assert [(name, value, step) for name, value, _, step in run.metrics] == [
        ("train/total", 1 / 5, 5),
        ("train/total", 1 / 10, 10),
        ("train/total", 1 / 15, 15),
    ]
    assert run.metrics[0][2] == 1_005_000  # milliseconds
    assert run.params["config.lr"] == "0.1" and run.tags["alarm"] == "collapse" and run.status == "FINISHED"
    assert run.artifacts == [("pictures", str(tmp_path / "x.png"))]
    assert json.loads((tmp_path / "sinks.json").read_text()) == {"mlflow": {"id": "run0", "step": 15}}
