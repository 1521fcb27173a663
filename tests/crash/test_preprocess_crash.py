"""Preprocessing that is killed leaves whole cases only, and the next run completes the store."""

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nnssl_ext.cli import plan_and_preprocess, preprocess
from nnssl_ext.core.errors import UserError
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_raw import nnunet_dataset

ROOT, CASES = Path(__file__).parents[2], 6


def finished(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.suffix in (".b2nd", ".json")}


def clear(folder):
    for file in folder.iterdir():
        file.unlink()


def again() -> None:
    os._exit(preprocess.main(["-d", "801", "-c", "onemmiso", "-np", "1"]))


@pytest.mark.crash
@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_at_a_random_instant_leaves_whole_cases_and_the_next_run_completes_them(kills, folders):
    nnunet_dataset(folders["nnssl_raw"], cases=CASES)
    assert plan_and_preprocess.main(["-d", "801", "-c", "onemmiso", "-np", "1", "-gpu_memory_target", "0.5"]) == 0
    folder = folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_onemmiso"
    whole, chance, fork, partial = finished(folder), random.Random(0), multiprocessing.get_context("fork"), 0
    clear(folder)
    start = time.monotonic()
    assert preprocess.main(["-d", "801", "-c", "onemmiso", "-np", "1"]) == 0
    longest = time.monotonic() - start
    for trial in range(kills):
        if trial % 2 == 0:
            clear(folder)
        process = fork.Process(target=again)
        process.start()
        while process.is_alive() and not (folder / ".lock").exists():
            time.sleep(0.001)
        time.sleep(chance.random() * longest)
        process.kill()
        process.join()
        marks = [name for name in finished(folder) if name.endswith(".json")]
        partial += 0 < len(marks) < CASES
        if marks:
            store = CaseStore(folder)
            for case in range(len(store)):
                store.verify(case)
    assert partial  # some kills fell between the first and the last case
    assert preprocess.main(["-d", "801", "-c", "onemmiso", "-np", "1"]) == 0
    assert finished(folder) == whole
    assert not list(folder.glob(".*"))  # neither lock nor unfinished file


SCRIPT = """
    import os, sys, time
    from nnssl_ext.preprocessing.parallel import Workers, run_all

    def work(number):
        with open(f"{sys.argv[1]}/{os.getpid()}", "w"):
            time.sleep(0.2)

    if __name__ == "__main__":
        run_all(work, range(1000), [str(i) for i in range(1000)], Workers(2), "test")
"""


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.crash
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(number, tmp_path):
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(textwrap.dedent(SCRIPT))
    pids.mkdir()
    with open(tmp_path / "out", "w") as out:
        parent = subprocess.Popen([sys.executable, str(script), str(pids)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out)
    end = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2:
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait()
    workers = [int(path.name) for path in pids.iterdir()]
    while any(running(pid) for pid in workers):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.05)


def test_one_flipped_bit_of_a_stored_case_is_found_wherever_it_is(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=1)
    plan_and_preprocess.main(["-d", "801", "-np", "1", "-gpu_memory_target", "0.5"])
    store, chance = CaseStore(folders["nnssl_preprocessed"] / "Dataset801_Test" / "nnsslPlans_3d_fullres"), random.Random(0)
    file = store.folder / "case0.b2nd"
    content = file.read_bytes()
    for _ in range(500):
        broken = bytearray(content)
        broken[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            store.verify(0)
    file.write_bytes(content)
    store.verify(0)
