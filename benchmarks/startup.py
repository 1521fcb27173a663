"""CPU and wall seconds from the shell to the first answer of every command, against nnU-Net's training command.

Files are in the disk's cache and byte code is written. The ratio is that of `nnssl_train` up to its first step, which has
loaded, built and done all that a training needs, to `nnUNetv2_train -h`, which only prints its help.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.common import Result, summarize
from benchmarks.volumes import phantoms

PEER = "nnUNetv2_train -h"
SCRIPTS = re.findall(r'(?m)^(nnssl_\w+) = "([\w.]+):main"$', (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("nnssl_raw", "nnssl_preprocessed", "nnssl_results")


@dataclass(frozen=True)
class Command:
    """A console script and when it has answered.

    Args:
        module, function: of the script.
        arguments: of its command line.
        answer: an exit code, or a regular expression that the beginning of a line of output fulfils.
        bar: wall seconds that it may take.
    """

    module: str
    arguments: Sequence[str]
    answer: int | str
    bar: float
    function: str = "main"


def commands() -> dict[str, Command]:
    short = ["-device", "cpu", "-o", "epochs=1", "batch_size=1", "iterations=1"]
    found = {PEER: Command("nnunetv2.run.run_training", ["-h"], 0, float("inf"), "run_training_entry")}
    for script, module in SCRIPTS:
        found[f"{script} --help"] = Command(module, ["--help"], 0, 0.5)
        found[f"{script} --wrong"] = Command(module, ["--wrong"], 2, 0.5)
    found["nnssl_extract_fingerprint"] = Command("nnssl_ext.cli.extract_fingerprint", ["-d", "801", "-np", "1"], "fingerprint of", 2.0)
    found["nnssl_plan_experiment"] = Command("nnssl_ext.cli.plan_experiment", ["-d", "801", "-gpu_memory_target", "0.5"], "Dataset801_", 2.0)
    found["nnssl_preprocess"] = Command("nnssl_ext.cli.preprocess", ["-d", "801", "-np", "1"], "preprocessing", 2.0)
    for family in ("resenc", "primus"):
        found[f"nnssl_train -b {family}"] = Command("nnssl_ext.cli.train", ["801", "3d_fullres", "-b", family, *short], r"step 1/", 6.0)
    return found


def measure(command: Command, environment: Mapping[str, str]) -> tuple[float, float]:
    """CPU (with child processes) and wall seconds of a fresh process until it answers."""
    code = f"import sys; from {command.module} import {command.function}; sys.argv = ['command', *{list(command.arguments)!r}]; sys.exit({command.function}())"
    began = time.perf_counter()
    process = psutil.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    told, answered = [], None
    for line in process.stdout:
        told.append(line)
        if answered is None and isinstance(command.answer, str) and re.match(command.answer, line):
            answered = _cpu(process), time.perf_counter() - began
    wall = time.perf_counter() - began
    while process.status() != psutil.STATUS_ZOMBIE:  # its times are there until it is waited for
        time.sleep(0.001)
    answered, expected = answered or (_cpu(process), wall), command.answer if isinstance(command.answer, int) else 0
    if process.wait() != expected:
        raise RuntimeError(f"{command.module} {command.arguments} ended with {process.returncode} and not with {expected}: {''.join(told[-5:])}")
    return answered


def _cpu(process: psutil.Process) -> float:
    """Of a process and its children, those that have ended included."""
    processes = [process, *process.children(recursive=True)]
    return sum(sum(each.cpu_times()[:2]) for each in processes) + sum(process.cpu_times()[2:4])


def dataset(folder: Path) -> None:
    """One small CT, as nnU-Net's raw dataset 801."""
    target = folder / "nnssl_raw" / "Dataset801_Phantom"
    (target / "imagesTr").mkdir(parents=True)
    phantoms(target / "imagesTr", 1, (32, 32, 32))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1, "file_ending": ".nii.gz"}
    (target / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def run(quick: bool) -> Result:
    repetitions = 1 if quick else 5
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repetitions + 1):
        with tempfile.TemporaryDirectory(prefix="nnssl_ext_") as name:
            dataset(Path(name))
            kept = {key: value for key, value in os.environ.items() if not key.lower().startswith(("nnssl_", "nnunet_"))}
            environment = kept | {folder: str(Path(name) / folder) for folder in FOLDERS}
            for title, command in commands().items():
                times.setdefault(title, []).append(measure(command, environment))
    times = {title: pairs[1:] for title, pairs in times.items()}  # the first one filled the disk's cache
    detail = {title: {"cpu_s": round(min(cpu for cpu, _ in pairs), 2), "wall_s": round(min(wall for _, wall in pairs), 2)} for title, pairs in times.items()}
    slow = [title for title, command in commands().items() if detail[title]["wall_s"] > command.bar]
    ours, peer = ([cpu for cpu, _ in times[title]] for title in ("nnssl_train -b resenc", PEER))
    return summarize(ours, peer, PEER, "CPU-s", {"fastest of": repetitions, "answers": detail, "over their bar": slow})
