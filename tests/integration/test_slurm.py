"""nnssl_train --slurm: what is submitted, and jobs that are preempted, on this machine and with an imitation of SLURM."""

import dataclasses
import json
import os
import signal
import sys
import time

import pytest
import torch

from nnssl_ext.cli import plan_and_preprocess, slurm, train
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_json
from nnssl_ext.core.plan import Plan
from nnssl_ext.trainers.checkpoint import load_checkpoint
from tests import fake_slurm
from tests.make_data import tiny_plan
from tests.make_raw import nnunet_dataset

pytest.importorskip("submitit")

SHORT = ["-device", "cpu", "-o", "epochs=2", "iterations=4", "batch_size=1", "workers=0"]
PLUGIN = """
import os
from pathlib import Path

from nnssl_ext.trainers.mae import MAETrainer


class PreemptedTrainer(MAETrainer):
    def after_update(self, step):
        number, seen = os.environ.get(f"stop_{self.config.seed}_{step}"), Path(os.environ["seen"]) / f"{self.config.seed}_{step}_{self.rank}"
        if number and not seen.exists():
            seen.touch()
            os.kill(os.getpid(), int(number))
"""


@pytest.fixture
def dataset(folders, tmp_path, monkeypatch):
    """The results folder of a dataset with a tiny plan, and a trainer that gets a signal, once, at steps that variables name."""
    nnunet_dataset(folders["nnssl_raw"])
    assert plan_and_preprocess.main(["-d", "801", "-gpu_memory_target", "0.5", "-np", "1"]) == 0
    file = folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans.json"
    plan, tiny = Plan.load(file), tiny_plan().configuration("3d_fullres")
    config = dataclasses.replace(plan.configuration("3d_fullres"), patch_size=tiny.patch_size, networks=tiny.networks)
    write_json(file, dataclasses.replace(plan, configurations={"3d_fullres": config}).as_dict())
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "preempted.py").write_text(PLUGIN)
    (tmp_path / "seen").mkdir()
    for name, value in (("nnssl_extPath", tmp_path / "plugins"), ("seen", tmp_path / "seen"), ("nnssl_sinks", "none"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, str(value))
    return folders["nnssl_results"] / "Dataset801_Test"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "slurm"


def run_folder(dataset, trainer="PreemptedTrainer", seed=0):
    return dataset / f"{trainer}__nnsslPlans__3d_fullres__epochs=2_iterations=4_batch_size=1{f'_seed={seed}' if seed else ''}" / "fold_all"


def weights(folder):
    return load_checkpoint(folder / "checkpoint_final.pth")["ssl_state"]


def uninterrupted(dataset, *words):
    """Weights of the run that the jobs should repeat; its folder is moved out of their way."""
    assert train.main(["801", "3d_fullres", "-tr", "PreemptedTrainer", *words, *SHORT]) == 0
    run_folder(dataset).rename(dataset / "uninterrupted")
    return weights(dataset / "uninterrupted")


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def wait_for(done, logs, seconds=400):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "\n".join(path.read_text() for path in logs.glob("*log.out"))
        time.sleep(0.1)


def error_of(capsys) -> str:
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and len(text.splitlines()) <= 3
    return text


def test_trainers_and_seeds_become_an_array_with_one_process_per_card(dataset, cluster, capsys):
    (cluster / "hold").touch()
    words = ["801", "3d_fullres", "-tr", "PreemptedTrainer", "MAETrainer", "-seeds", "0", "1", "-o", *SHORT[3:], "-num_gpus", "4"]
    settings = ["partition=gpu", "time=2-12", "nodes=2", "mem=200G", "account=lab", "constraint=a100|h100", "array_parallelism=3"]
    assert train.main([*words, "--slurm", *settings]) == 0
    lines = (cluster / "job.sh").read_text().splitlines()
    for wanted in (
        "array=0-3%3",
        "requeue",
        "signal=USR2@180",
        "time=3600",
        "partition=gpu",
        "nodes=2",
        "gpus-per-node=4",
        "ntasks-per-node=4",
        "cpus-per-task=10",
        "mem=200G",
        "account=lab",
        "constraint='a100|h100'",
        "job-name=nnssl",
        "open-mode=append",
    ):
        assert f"#SBATCH --{wanted}" in lines
    (command,) = (line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in command and f"{sys.executable} -u -m submitit.core._submit {dataset.parent / 'slurm_logs'}" in command
    out = capsys.readouterr().out
    for number, (trainer, seed) in enumerate((t, s) for t in ("PreemptedTrainer", "MAETrainer") for s in (0, 1)):
        spoken = "" if trainer == "MAETrainer" else f" -tr {trainer}"  # the default method goes without saying
        assert f"job 7_{number}: nnssl_train 801 3d_fullres{spoken} -o {' '.join(SHORT[3:])} seed={seed} -device cuda" in out
        assert f"results: {run_folder(dataset, trainer, seed)}\n  log: tail -F {dataset.parent / 'slurm_logs' / f'7_{number}_0_log.out'}" in out
    assert "squeue -j 7\n" in out and "scancel 7\n" in out


@pytest.mark.slow
def test_jobs_that_are_preempted_end_with_the_weights_of_an_uninterrupted_run(dataset, cluster, monkeypatch):
    whole = uninterrupted(dataset)
    monkeypatch.setenv("stop_0_1", str(int(signal.SIGUSR2)))  # the time limit is near
    monkeypatch.setenv("stop_0_4", str(int(signal.SIGTERM)))  # SLURM wants the node
    assert train.main(["801", "3d_fullres", "-tr", "PreemptedTrainer", *SHORT, "-seeds", "0", "1", "--slurm", "time=60"]) == 0
    logs, log = dataset.parent / "slurm_logs", dataset.parent / "slurm_logs" / "7_0_0_log.out"
    wait_for(lambda: log.exists() and "stopped by SIGTERM" in log.read_text(), logs)
    assert load_checkpoint(run_folder(dataset) / "checkpoint_latest.pth")["step"] == 6  # the step after the signal
    assert not (cluster / "ended_7_0").exists()  # the job waits to be ended: SLURM requeues only what it ends
    (cluster / "requeue_7_0").touch()
    wait_for((cluster / "ended_7_1").exists, logs)
    assert (cluster / "ended_7_0").read_text() == "0 2" and (cluster / "ended_7_1").read_text() == "0 0"
    assert "stopped by SIGUSR2" in log.read_text()
    assert equal(weights(run_folder(dataset)), whole)
    assert load_checkpoint(run_folder(dataset, seed=1) / "checkpoint_final.pth")["config"]["seed"] == 1


@pytest.mark.slow
def test_two_tasks_form_one_group_and_are_requeued_together(dataset, monkeypatch, capsys):
    whole = uninterrupted(dataset, "-num_gpus", "2")
    monkeypatch.setenv("stop_0_2", str(int(signal.SIGUSR2)))
    assert train.main(["801", "3d_fullres", "-tr", "PreemptedTrainer", *SHORT, "-num_gpus", "2", "--slurm", "cluster=local"]) == 0
    logs = dataset.parent / "slurm_logs"
    wait_for((run_folder(dataset) / "checkpoint_final.pth").exists, logs)
    (log,) = logs.glob("*_0_log.out")
    assert "stopped by SIGUSR2" in log.read_text() and "Requeued job" in log.read_text()
    assert json.loads((run_folder(dataset) / "run.json").read_text())["processes"] == 2
    assert equal(weights(run_folder(dataset)), whole)


def test_mistakes_show_before_anything_is_submitted(dataset, cluster, capsys, monkeypatch):
    words = ["801", "3d_fullres", *SHORT]
    for more, message in (
        (["--slurm", "partitoin=gpu"], "did you mean 'partition'"),
        (["--slurm", "gpu"], "not of the form key=value"),
        (["--slurm", "nodes=two"], "'two' is not a valid int"),
        (["--slurm", "time=soon"], "is not a time"),
        (["--slurm", "cluster=cloud"], "unknown cluster 'cloud'"),
        (["--slurm", "-tr", "MAETrainer", "MAEtrainer"], "did you mean 'MAETrainer'"),
        (["-seeds", "0", "1"], "add --slurm"),
        (["-tr", "MAETrainer", "PreemptedTrainer"], "add --slurm"),
    ):
        assert train.main([*words, *more]) == 2
        assert message in error_of(capsys)
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    assert train.main([*words, "--slurm", "partition=x"]) == 2
    assert "invalid partition specified: x" in error_of(capsys)
    folder = run_folder(dataset, "MAETrainer")
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").touch()
    assert train.main([*words, "--slurm"]) == 2
    assert "already holds a run" in error_of(capsys)
    monkeypatch.setenv("PATH", os.defpath)
    assert train.main([*words, "--c", "--slurm"]) == 2
    assert "SLURM was not found" in error_of(capsys)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert train.main([*words, "--slurm"]) == 2
    assert "pip install submitit" in error_of(capsys)


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("90:30", 91), ("12:00:00", 720), ("1-0", 1440), ("2-12", 3600), ("1-01:30", 1530), ("1-01:30:01", 1531)]
)
def test_times_are_read_as_sbatch_reads_them(text, minutes):
    assert slurm.settings([f"time={text}"]) == {"timeout_min": minutes}


def test_settings_have_the_names_of_sbatch_or_of_submitit():
    assert slurm.settings(["ntasks-per-node=2", "job_name=x", "qos=high", "mem_gb=1.5", "stderr_to_stdout=false"]) == {
        "tasks_per_node": 2,
        "name": "x",
        "slurm_qos": "high",
        "mem_gb": 1.5,
        "stderr_to_stdout": False,
    }
    assert slurm.settings(["slurm_setup=module load cuda", "timeout_min=5"]) == {"slurm_setup": ["module load cuda"], "timeout_min": 5}
    with pytest.raises(UserError, match="unknown setting 'srun_args'"):
        slurm.settings(["srun_args=x"])
