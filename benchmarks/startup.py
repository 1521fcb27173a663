"""CPU seconds from the shell to the first answer of a command, against nnU-Net's training command.

The ratio is that of the heaviest of our commands, which has loaded all it needs for training; the others are in `detail`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace

from benchmarks.common import Result, summarize

PEER = "nnUNetv2_train -h"
BAR_S = 2.0  # wall seconds that every command may take before its work
NNUNET = ("nnunetv2.run.run_training", "run_training_entry", ["-h"], 0)
COMMANDS = {  # module, function, arguments, exit code
    "nnssl_train --help": ("nnssl_ext.cli.train", "main", ["--help"], 0),
    "nnssl_train, wrong option": ("nnssl_ext.cli.train", "main", ["801", "3d_fullres", "--wrong"], 2),
    "nnssl_train, no folders set": ("nnssl_ext.cli.train", "main", ["801", "3d_fullres"], 2),
    "nnssl_plan_experiment, no folders set": ("nnssl_ext.cli.plan_experiment", "main", ["-d", "801"], 2),
    "nnssl_preprocess, no folders set": ("nnssl_ext.cli.preprocess", "main", ["-d", "801"], 2),
    "nnssl_plan_and_preprocess, no folders set": ("nnssl_ext.cli.plan_and_preprocess", "main", ["-d", "801"], 2),
}


def measure(module: str, function: str, arguments: list[str], expected: int) -> tuple[float, float]:
    """CPU and wall seconds of a fresh process that does what the console script does."""
    code = f"import sys; from {module} import {function}; sys.argv = ['command', *{arguments!r}]; sys.exit({function}())"
    environment = {key: value for key, value in os.environ.items() if not key.lower().startswith(("nnssl_", "nnunet_"))}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise RuntimeError(f"{module} {arguments} ended with {done.returncode}, not {expected}: {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def run(quick: bool) -> Result:
    repetitions = 2 if quick else 7
    for command in (NNUNET, *COMMANDS.values()):  # files into the disk cache, byte code written
        measure(*command)
    times: dict[str, list[tuple[float, float]]] = {PEER: [], **{name: [] for name in COMMANDS}}
    for _ in range(repetitions):
        for name, command in ((PEER, NNUNET), *COMMANDS.items()):
            times[name].append(measure(*command))
    wall = {name: round(min(seconds for _, seconds in pairs), 3) for name, pairs in times.items()}
    heaviest = max(COMMANDS, key=lambda name: min(cpu for cpu, _ in times[name]))
    result = summarize([cpu for cpu, _ in times[heaviest]], [cpu for cpu, _ in times[PEER]], PEER, "CPU-s", {"command": heaviest, "wall_s": wall})
    slow = [name for name in COMMANDS if wall[name] > BAR_S]
    return replace(result, detail={**result.detail, "bar_s": BAR_S, "over_the_bar": slow})
