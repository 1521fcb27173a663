"""Enough of SLURM for one machine: sbatch runs its script at once, an array one job after the other; srun starts the tasks; scontrol requeues."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = "FAKE_SLURM"  # folder of scripts, process numbers and requests


def install(folder: Path) -> dict[str, str]:
    """Put sbatch, srun and scontrol into `folder`/bin; the variables to set."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        (binaries / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {name} "$@"\n')
        (binaries / name).chmod(0o755)
    return {STATE: str(folder), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}


def sbatch(script: str) -> None:
    """Take a job: its script is kept as job.sh, and run unless there is a file `hold`."""
    shutil.copy(script, state("job.sh"))
    print("Submitted batch job 7")
    if not state("hold").exists():
        sys.stdout.flush()
        subprocess.Popen([sys.executable, "-S", __file__, "control"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def control() -> None:
    """What slurmctld does: run each job of the array, again after a request to requeue it."""
    script = state("job.sh").read_text()
    for task in range(int(option(script, "array", r"0-(\d+)")) + 1):
        environment = {**os.environ, "SLURM_JOB_ID": str(7 + task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        environment |= {"SLURM_JOB_NUM_NODES": option(script, "nodes"), "SLURM_JOB_NODELIST": "localhost"}
        environment |= {"SLURM_NTASKS": str(int(option(script, "nodes")) * int(option(script, "ntasks-per-node")))}
        for restart in range(9):
            count = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
            job = subprocess.Popen(["bash", state("job.sh")], env=environment | count, start_new_session=True)
            request = state(f"requeue_7_{task}")
            while job.poll() is None and not request.exists():
                time.sleep(0.05)
            if not request.exists():
                break
            try:
                os.killpg(job.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            job.wait()
            request.unlink()
        state(f"ended_7_{task}").write_text(f"{job.returncode} {restart}")


def srun(*words: str) -> None:
    """Start the tasks; with --kill-on-bad-exit=1, one that fails ends the others."""
    output, start = words[words.index("--output") + 1], words.index(sys.executable)
    for pattern, value in (("%A", os.environ["SLURM_ARRAY_JOB_ID"]), ("%a", os.environ["SLURM_ARRAY_TASK_ID"])):
        output = output.replace(pattern, value)
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        with open(output.replace("%t", str(rank)), "a") as log:
            own = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
            tasks.append(subprocess.Popen(words[start:], env=own, stdout=log, stderr=subprocess.STDOUT))
    while None in [task.poll() for task in tasks]:
        if "--kill-on-bad-exit=1" in words and any(task.returncode for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    sys.exit(max(abs(task.returncode) for task in tasks))


def scontrol(command: str, job: str) -> None:
    """As SLURM does, let the job live on for a moment: it is ended by `control`."""
    assert command == "requeue" and re.fullmatch(r"7_\d+", job)
    state(f"requeue_{job}").touch()


def state(name: str) -> Path:
    return Path(os.environ[STATE]) / name


def option(script: str, name: str, pattern: str = r"(\d+)") -> str:
    match = re.search(f"^#SBATCH --{name}={pattern}", script, re.MULTILINE)
    assert match is not None, name
    return match[1]


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "control": control}[sys.argv[1]](*sys.argv[2:])
