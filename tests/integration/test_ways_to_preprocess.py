"""The same store, byte for byte, whichever way the cases are shared out."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nnssl_ext.cli import plan_and_preprocess, preprocess
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_raw import body_volume, nnunet_dataset, write_image

ROOT, CASES = Path(__file__).parents[2], 9
CONFIGURATION = ["-d", "801", "-c", "onemmiso"]


def content(folder):
    """Hash of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def start(*options):
    """nnssl_preprocess in a process of its own."""
    code = "import sys; from nnssl_ext.cli.preprocess import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *CONFIGURATION, *options], env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture
def planned(folders):
    """A planned dataset, its preprocessed folder, and what one process makes of it."""
    raw = nnunet_dataset(folders["nnssl_raw"], cases=CASES)
    write_image(raw / "imagesTr" / "case3_0000.nii.gz", body_volume((14, 30, 22), 3), spacing=(5.0, 1.0, 1.0))  # a slab, resampled slice by slice
    assert plan_and_preprocess.main([*CONFIGURATION, "-np", "1", "-gpu_memory_target", "0.5"]) == 0
    folder = folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_onemmiso"
    whole = content(folder)
    assert len(whole) == 2 * CASES
    shutil.rmtree(folder)
    return folder, whole


def test_eight_processes(planned):
    folder, whole = planned
    assert preprocess.main([*CONFIGURATION, "-np", "8"]) == 0
    assert content(folder) == whole


def test_four_parts_at_the_same_time(planned):
    folder, whole = planned
    runs = [start("-np", "1", "-part", str(k), "-total_parts", "4") for k in range(4)]
    assert [run.wait(120) for run in runs] == [0] * 4
    assert content(folder) == whole
    assert len(CaseStore(folder)) == CASES


def test_a_part_refuses_a_folder_that_is_wholly_in_use_and_the_other_way_round(planned, capsys):
    folder, _ = planned
    folder.mkdir()
    for lock, command in ((".lock", ["-part", "1", "-total_parts", "4"]), (".lock_1_of_4", []), (".lock_1_of_4", ["-part", "0", "-total_parts", "3"])):
        (folder / lock).write_text(json.dumps({"pid": os.getppid(), "host": os.uname().nodename}))
        assert preprocess.main([*CONFIGURATION, *command]) == 2
        assert "in use" in capsys.readouterr().err
        assert [file.name for file in folder.iterdir()] == [lock]
        (folder / lock).unlink()


def test_killed_and_run_again(planned):
    folder, whole = planned
    for wanted in (1, 4):
        run = start("-np", "2")
        while run.poll() is None and len(list(folder.glob("*.json"))) < wanted:
            time.sleep(0.005)
        workers = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not psutil.wait_procs(workers, 60)[1]  # they end with their parent
    assert preprocess.main([*CONFIGURATION, "-np", "1"]) == 0
    assert content(folder) == whole


CLUSTER = """
import sys, distributed
if __name__ == "__main__":
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None, memory_limit=0) as cluster:
        print(cluster.scheduler_address, *(worker.pid for worker in cluster.workers.values()), flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def cluster(tmp_path):
    """A Dask cluster in a process of its own (its threads would disturb tests that fork): address and process numbers of its workers."""
    pytest.importorskip("distributed")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address, *pids = process.stdout.readline().split()
        yield address, [int(pid) for pid in pids]
        process.stdin.close()


def test_a_dask_cluster_whose_workers_are_killed_on_the_way(planned, cluster):
    folder, whole = planned
    address, pids = cluster
    run = start("--dask-scheduler", address)
    for wanted, pid in zip((1, 4), pids):
        while run.poll() is None and len(list(folder.glob("*.json"))) < wanted:
            time.sleep(0.005)
        assert run.poll() is None
        os.kill(pid, signal.SIGKILL)
    assert run.wait(120) == 0
    for leftover in folder.glob(".*.tmp"):  # of a killed worker; the next run removes them
        leftover.unlink()
    assert content(folder) == whole


def test_a_dask_cluster_of_its_own(planned):
    folder, whole = planned
    assert start("--dask-scheduler", "local", "-np", "2").wait(120) == 0
    assert content(folder) == whole


DEADLY = """
import os, sys
from nnssl_ext.preprocessing.parallel import Workers, run_all
from tests.deadly import deadly
results, failures = run_all(deadly, range(5), [str(i) for i in range(5)], Workers(dask=sys.argv[1]), "test")
assert sorted(results) == ["0", "1", "2", "4"] and "died" in failures["3"], (results, failures)
"""


def test_a_case_that_kills_every_worker_fails_alone(cluster):
    ended = subprocess.run([sys.executable, "-c", DEADLY, cluster[0]], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_cluster_that_has_lost_all_workers_is_a_user_error(planned, cluster):
    quick = "from nnssl_ext.preprocessing import dask_workers; dask_workers.WORKERLESS_S, dask_workers.ASK_S = 1, 0.2"
    gone = f"import distributed; client = distributed.Client({cluster[0]!r}); client.retire_workers(list(client.nthreads())); client.close()"
    code = f"{quick}; {gone}; from nnssl_ext.cli.preprocess import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, *CONFIGURATION, "--dask-scheduler", cluster[0]]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "no worker is left" in ended.stderr, ended.stderr


def test_an_unreachable_scheduler_is_a_user_error(planned):
    code = "from nnssl_ext.preprocessing import dask_workers; dask_workers.CONNECT_S = 1; from nnssl_ext.cli.preprocess import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, *CONFIGURATION, "--dask-scheduler", "tcp://127.0.0.1:1"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "no Dask cluster" in ended.stderr, ended.stderr


def test_a_slurm_cluster_asks_for_jobs_of_one_core():
    pytest.importorskip("dask_jobqueue")
    code = "from nnssl_ext.preprocessing.dask_workers import slurm_cluster\nwith slurm_cluster() as cluster: print(cluster.job_script())"
    script = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120).stdout
    assert "#SBATCH --cpus-per-task=1" in script and "#SBATCH --mem=15G" in script and "--nthreads 1" in script
