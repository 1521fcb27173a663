"""Two runs into one folder: the second is refused with process and host; what a killed run locked is taken over."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import tiny_plan, tiny_store

pytestmark = pytest.mark.crash
FIRST = """
import sys, time
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import tiny_plan, tiny_store

def wait(trainer, step):
    if step == 3:
        print("in the loop", flush=True)
        time.sleep(600)

MAETrainer.after_update = wait
MAETrainer(tiny_plan(), "3d_fullres", MAETrainer.Config(epochs=2, iterations=2, workers=0), tiny_store(), sys.argv[1], family="resenc").fit()
"""


def trainer(folder):
    return MAETrainer(tiny_plan(), "3d_fullres", MAETrainer.Config(epochs=2, iterations=2, workers=0), tiny_store(), folder, family="resenc")


def test_a_second_run_is_refused_until_the_first_is_killed_and_then_goes_on_from_its_checkpoint(tmp_path):
    first = subprocess.Popen([sys.executable, "-W", "ignore", "-c", FIRST, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert any("in the loop" in line for line in first.stdout)
        before = {file: file.read_bytes() for file in tmp_path.glob("checkpoint_*.pth")}
        for resume in (False, True):
            with pytest.raises(UserError, match=f"in use by process {first.pid} on {socket.gethostname()}"):
                trainer(tmp_path).fit(resume=resume)
        assert {file: file.read_bytes() for file in tmp_path.glob("checkpoint_*.pth")} == before
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (tmp_path / ".lock").exists() and load_checkpoint(tmp_path / "checkpoint_latest.pth")["step"] == 2
    trainer(tmp_path).fit(resume=True)
    assert load_checkpoint(tmp_path / "checkpoint_final.pth")["step"] == 4 and not (tmp_path / ".lock").exists()
