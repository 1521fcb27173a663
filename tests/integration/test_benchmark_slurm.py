"""nnssl_benchmark --slurm: a job for each pretraining and what follows it, on this machine and with an imitation of SLURM."""

import shlex
import time

import pytest
import yaml

from nnssl_ext.benchmark import data as data_module
from nnssl_ext.benchmark.units import Unit
from nnssl_ext.cli.benchmark import main
from nnssl_ext.cli.slurm import submit_chains
from nnssl_ext.core.files import write_json
from tests import fake_slurm
from tests.make_data import tiny_plan
from tests.toy_units import double, stop_once

submitit = pytest.importorskip("submitit")

SET = "Dataset902_Organs"
SUITE = {
    "name": "tiny",
    "seeds": 2,
    "methods": [{"trainer": "MAETrainer", "family": "primus", "steps": 2, "batch": 2}],
    "finetuning": [{"mode": "full", "labels": [2]}, {"mode": "frozen", "labels": [2]}],
    "probe": [2],
    "registration": None,
    "upper_bound": 0,
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "slurm"


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A benchmark's folder whose data are told to be there."""
    folder = tmp_path / "out"
    tiny_plan().save(folder / "data" / "plan.json")
    datasets = {SET: {"judges": ["segmentation"], "cases": 4}}
    write_json(folder / "data" / "data.json", {"unlabelled": "Dataset802_X", "datasets": datasets, "digests": {"Dataset802_X": "cohort", SET: "organs"}})
    monkeypatch.setattr(data_module, "prepare", lambda suite, out, workers: data_module.Data(out))
    return folder


def submitted(out):
    """Names of the units of each job, in the order of the array."""
    paths = sorted((out / "slurm_logs").glob("7_*_submitted.pkl"))
    return [[unit.name for unit in submitit.core.utils.DelayedSubmission.load(path).function.units] for path in paths]


def test_each_pretraining_and_what_follows_it_is_a_job_of_an_array(tmp_path, out, cluster, capsys):
    (cluster / "hold").touch()
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    command = ["--suite", str(file), "-out", str(out), "-device", "cuda"]  # a card that the jobs find; this machine may have none
    assert main([*command, "--slurm", "partition=gpu", "time=1-0", "array_parallelism=2", "--verbose"]) == 0, capsys.readouterr()
    jobs = submitted(out)
    tuned = [f"finetune_MAETrainer_primus_Dataset902_{mode}_2" for mode in ("full", "frozen")]
    base = ["finetune_scratch_primus_Dataset902_full_2", "finetune_random_weights_primus_Dataset902_frozen_2"]
    expected = [{f"pretrain_MAETrainer_primus_{seed}", f"probe_MAETrainer_primus_Dataset902_{seed}", *(f"{name}_{seed}" for name in tuned)} for seed in (0, 1)]
    expected += [{f"start_primus_{seed}", f"probe_random_weights_primus_Dataset902_{seed}", *(f"{name}_{seed}" for name in base)} for seed in (0, 1)]
    expected[2].add("probe_controls_primus_Dataset902")
    assert sorted(map(sorted, jobs)) == sorted(map(sorted, expected))
    assert all(names[0].startswith(("pretrain_", "start_")) for names in jobs)
    lines = (cluster / "job.sh").read_text().splitlines()
    for wanted in ("array=0-3%2", "requeue", "signal=USR2@180", "time=1440", "partition=gpu", "gpus-per-node=1", "ntasks-per-node=1", "cpus-per-task=10"):
        assert f"#SBATCH --{wanted}" in lines
    assert any(line.startswith("srun ") and f"submitit.core._submit {out / 'slurm_logs'}" in line for line in lines)
    said = capsys.readouterr().out
    assert all(f"job 7_{number}: {', '.join(names)}\n  log: tail -F {out / 'slurm_logs'}/7_{number}_0_log.out\n" in said for number, names in enumerate(jobs))
    assert said.endswith(f"cancel: scancel 7\nafterwards, for the report: nnssl_benchmark {shlex.join([*command, '--verbose'])}\n")


def test_the_command_for_the_report_names_the_card_that_the_jobs_had(tmp_path, out, cluster, capsys, monkeypatch):
    (cluster / "hold").touch()
    for name in ("nnssl_raw", "nnUNet_raw"):
        monkeypatch.setenv(name, str(tmp_path))
    for more, device in (([], "cuda"), (["--quick"], "cpu")):
        assert main(["802", "902", "-n", "2", "-seeds", "1", *more, "-out", str(out), "--slurm", "time=60"]) == 0
        assert capsys.readouterr().out.rstrip().endswith(f"-out {out} -device {device}")
        assert ("#SBATCH --gpus-per-node=1" in (cluster / "job.sh").read_text()) == (device == "cuda")


@pytest.mark.slow
def test_jobs_finish_their_units_go_on_after_a_preemption_and_say_when_something_failed(tmp_path, cluster, capsys):
    out = tmp_path / "out"
    first, bad = Unit("first", double, {"number": 1}), Unit("bad", double, {"number": -1})
    stopped = Unit("stopped", stop_once, {}, first)
    last, lost = Unit("last", double, {}, stopped), Unit("lost", double, {}, bad)
    units = [first, bad, stopped, last, lost]
    assert submit_chains(units, out, ["time=60"], "cpu", ["-out", str(out)]) == 0
    assert sorted(submitted(out)) == [["bad", "lost"], ["first", "stopped", "last"]]
    end = time.monotonic() + 400
    while not ((cluster / "ended_7_0").exists() and (cluster / "ended_7_1").exists()):
        assert time.monotonic() < end, "\n".join(path.read_text() for path in (out / "slurm_logs").glob("*log.out"))
        time.sleep(0.2)
    ended = {names[0]: (cluster / f"ended_7_{number}").read_text() for number, names in enumerate(submitted(out))}
    assert ended == {"first": "0 1", "bad": "1 0"}  # exit code, restarts
    assert [unit.record(out) and unit.record(out)["result"]["number"] for unit in units] == [2, None, 4, 8, None]
    assert (out / "calls.txt").read_text().splitlines().count(first.folder(out).name) == 1  # what was finished isn't computed again
    assert any("bad failed, negative" in log.read_text() for log in (out / "slurm_logs").glob("*log.out"))
