"""SIGTERM and SIGUSR1 in the middle of a step: one process with loader workers, several of `-num_gpus`, several of torchrun."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from nnssl_ext.trainers.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time, os
from pathlib import Path
import torch
torch.set_num_threads(1)
from nnssl_ext.trainers import launch
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import tiny_plan, tiny_store

folder, processes = Path(sys.argv[1]), int(sys.argv[2])

class Slow(MAETrainer):
    "Notes every step that begins, and whether a stop was already known to this process."
    def step(self, model, batch):
        if model.training:
            with open(folder / f"steps_{self.rank}", "a") as file:
                file.write(f"{self.next_step} {self.signals.received}\\n")
            time.sleep(0.3)
        return super().step(model, batch)

def make(run):
    config = MAETrainer.Config(epochs=1, iterations=100000, batch_size=1, workers=2 if processes == 1 else 1)
    return Slow(tiny_plan(), "3d_fullres", config, tiny_store(), folder / "run", family="primus")

launch.make_trainer = make
if __name__ == "__main__":
    sys.exit(launch.start(launch.Run("801", "3d_fullres", "Slow", device="cpu"), processes, [sys.executable, *sys.argv]))
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@dataclass
class Way:
    """How a run is started and stopped, and what its first process answers."""

    start: list[str]
    processes: int
    stop: int
    code: int
    all: bool = False  # the signal goes to every process, loader workers too, as a scheduler sends it


WAYS = {
    "one process, SIGTERM to all": Way([], 1, signal.SIGTERM, 143, all=True),
    "two processes, SIGUSR1": Way([], 2, signal.SIGUSR1, 138),
    "torchrun, SIGTERM": Way(TORCHRUN, 2, signal.SIGTERM, 1),  # torchrun's own code
    "torchrun, SIGUSR1": Way(TORCHRUN, 2, signal.SIGUSR1, -signal.SIGUSR1),  # which it does not handle: the workers notice that it is gone
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Each way's folder, exit code and processes that are left; all run at the same time."""
    script = tmp_path_factory.mktemp("script") / "slow.py"
    script.write_text(SCRIPT, encoding="utf-8")
    runs = {}
    for name, way in WAYS.items():
        folder = tmp_path_factory.mktemp("run")
        variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, *way.start, str(script), str(folder), str(1 if way.start else way.processes)]
        with open(folder / "output", "w") as output:
            runs[name] = folder, subprocess.Popen(words, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        for name, (folder, process) in runs.items():
            began = time.monotonic()
            while any(len(steps_of(folder, rank)) < 3 for rank in range(WAYS[name].processes)):
                assert process.poll() is None and time.monotonic() - began < 300, (folder / "output").read_text()
                time.sleep(0.1)
        found = {}
        for name, (folder, process) in runs.items():
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in family if WAYS[name].all else family[:1]:
                one.send_signal(WAYS[name].stop)
            found[name] = folder, process, family
        return {name: (folder, process.wait(120), psutil.wait_procs(family[1:], timeout=60)[1]) for name, (folder, process, family) in found.items()}
    finally:
        for _, process in runs.values():
            if process.poll() is None:
                process.kill()


def steps_of(folder: Path, rank: int) -> list[list[int]]:
    """Number of each step that began, and the signal that was known then."""
    file = folder / f"steps_{rank}"
    return [[int(word) for word in line.split()] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("name", WAYS)
def test_a_stop_ends_with_a_checkpoint_of_the_step_it_fell_into_and_leaves_no_process(name, ended):
    folder, code, left = ended[name]
    output = (folder / "output").read_text()
    assert left == [], output
    assert code == WAYS[name].code, output
    last = 0
    for rank in range(WAYS[name].processes):
        steps = steps_of(folder, rank)
        assert sum(received > 0 for _, received in steps) <= 1, output  # begun although the stop was known (another process had not heard of it)
        last = max(last, steps[-1][0])
    assert load_checkpoint(folder / "run" / "checkpoint_latest.pth")["step"] == last + 1, output
    assert "Traceback" not in output or "torchrun" in name
