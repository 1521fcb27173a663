"""Is this machine ready? What is installed, where the folders are, what the hardware offers, and whether a tiny training works."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.paths import PREPROCESSED, RAW, RESULTS
from nnssl_ext.core.registry import PLUGIN_VARIABLE
from nnssl_ext.evaluation.self_test import train_a_little
from nnssl_ext.finetuning import nnunet_trainers
from nnssl_ext.preprocessing.memory import available_memory

State = Literal["ok", "warning", "problem"]
GB = 1e9
TRAINER_FOLDER = Path(nnunet_trainers.__path__[0])
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
LITTLE_SPACE, LITTLE_MEMORY, LITTLE_SHM, FEW_FILES, CLOCK_SKEW_S = 20 * GB, 8 * GB, 2 * GB, 4096, 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        state: "warning" works but may disappoint, "problem" has to be mended first.
        text: what was found.
        fix: how to mend it; "" for "ok".
    """

    name: str
    state: State
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.name}: {self.text}" + (f"\n         fix: {self.fix}" if self.fix else "")


def examine(self_test: bool = True) -> Iterator[Finding]:
    """All findings, one after the other; a check that fails itself is a problem, too."""
    checks: list[Callable[[], Iterable[Finding]]] = [_python, _packages, _graphics, _folders, _trainers, _processor, _memory, _limits, _clock]
    for check in [*checks, _self_tests] if self_test else checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(check.__name__.strip("_"), "problem", f"{type(error).__name__}: {error}", "report this: the check itself failed")


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 10)
    yield Finding("python", "problem" if old else "ok", f"{version}, nnssl_ext {__version__}", "install Python 3.10 or newer" if old else "")


def _packages() -> Iterator[Finding]:
    fine = []
    for text in importlib.metadata.requires("nnssl_ext") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("packages", "problem", f"{requirement.name} is not installed", fix)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine.append(f"{requirement.name} {version}")
        else:
            yield Finding("packages", "problem", f"{requirement.name} {version} is installed, {requirement.specifier} is needed", fix)
    yield Finding("packages", "ok", ", ".join(fine))


def _graphics() -> Iterator[Finding]:
    built, driver = torch.version.cuda, _driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("GPU", "warning", "none found; training runs on the CPU", "fine for small tests; pretraining wants a CUDA card")
        elif built is None:
            yield Finding(
                "GPU", "problem", f"a card (driver {driver}), but torch {torch.__version__} is built for the CPU", "install torch as pytorch.org says for CUDA"
            )
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            fix = f"update the driver, or install a torch for an older CUDA; CUDA_VISIBLE_DEVICES is {visible}"
            yield Finding("GPU", "problem", f"a card (driver {driver}) that torch {torch.__version__} for CUDA {built} can't use", fix)
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        text = f"{card.name}, {card.total_memory / GB:.0f} GB, compute capability {card.major}.{card.minor}, CUDA {built}, driver {driver or 'unknown'}"
        if card.major < min(int(arch.removeprefix("sm_").rstrip("a")) for arch in ["sm_500", *torch.cuda.get_arch_list()] if arch.startswith("sm_")) // 10:
            yield Finding(f"GPU {number}", "problem", f"{text}: too old for this torch", "install an older torch that knows this card")
        elif card.major < 8:
            yield Finding(f"GPU {number}", "warning", f"{text}: no fast bfloat16", "train with -o precision=fp16")
        else:
            yield Finding(f"GPU {number}", "ok", text)


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def _folders() -> Iterator[Finding]:
    for variable in (RAW, PREPROCESSED, RESULTS, *NNUNET_FOLDERS):
        yield folder_finding(variable, os.environ.get(variable, ""))
    for folder in filter(None, os.environ.get(PLUGIN_VARIABLE, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            yield Finding(PLUGIN_VARIABLE, "problem", f"{folder} does not exist", f"correct or unset {PLUGIN_VARIABLE}")


def folder_finding(variable: str, value: str) -> Finding:
    """Whether the folder that an environment variable names exists, can be written and has room."""
    ours = variable not in NNUNET_FOLDERS
    if not value:
        state: State = "problem" if ours else "warning"
        why = "" if ours else " (nnU-Net needs it for fine-tuning)"
        return Finding(variable, state, f"not set{why}", f"export {variable}=/path/to/{variable}, in ~/.bashrc to keep it")
    folder = Path(value)
    if not folder.is_dir():
        return Finding(variable, "problem", f"{folder} does not exist", f"mkdir -p {folder}, or correct {variable}")
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / GB:.0f} GB free"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor"):
            pass
    except OSError as error:
        if variable in (RAW, "nnUNet_raw"):
            return Finding(variable, "ok", f"{text}, read-only")  # reading is enough
        return Finding(variable, "problem", f"{folder} can't be written: {error.strerror}", "change its owner or rights, or name another folder")
    if free < LITTLE_SPACE and variable not in (RAW, "nnUNet_raw"):
        return Finding(variable, "warning", text, "preprocessed volumes take about 4 bytes a voxel before compression; make room or name another disk")
    return Finding(variable, "ok", text)


def _trainers() -> Iterator[Finding]:
    known = [Path(folder).resolve() for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
    if TRAINER_FOLDER.resolve() in known:
        yield Finding("nnUNet_extTrainer", "ok", "nnU-Net finds the trainers of nnssl_ext")
    else:
        yield Finding("nnUNet_extTrainer", "ok", f"nnssl_finetune sets it itself; for nnUNetv2_train by hand: export nnUNet_extTrainer={TRAINER_FOLDER}")


def _processor() -> Iterator[Finding]:
    cores = usable_cores()
    few = cores < 4
    text = f"{cores:g} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads for torch"
    yield Finding("processor", "warning" if few else "ok", text, "preprocessing and loaders are slow on few cores; ask the scheduler for more" if few else "")


def usable_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use: its affinity, and the quota of a container or a job."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = limit.read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no control groups, or "max"
        return cores


def _memory() -> Iterator[Finding]:
    total, free = psutil.virtual_memory().total, available_memory()
    text = f"{free / GB:.1f} GB free for this process, {total / GB:.1f} GB in the machine"
    little = free < LITTLE_MEMORY
    yield Finding("memory", "warning" if little else "ok", text, "end other programs, or ask the scheduler for more (--mem)" if little else "")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        fix = "start the container with --shm-size=8g or --ipc=host, or train with -o workers=0" if size < LITTLE_SHM else ""
        yield Finding("shared memory", "warning" if fix else "ok", f"{size / GB:.1f} GB free in {shared}, which loader processes use", fix)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < FEW_FILES
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} at once"
    fix = f"ulimit -n {FEW_FILES if hard == resource.RLIM_INFINITY else min(hard, FEW_FILES)}, before training" if few else ""
    yield Finding("open files", "warning" if few else "ok", text, fix)


def _clock() -> Iterator[Finding]:
    folder = Path(os.environ.get(RESULTS) or tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(dir=folder if folder.is_dir() and os.access(folder, os.W_OK) else None) as file:
        file.write(b"x")
        file.flush()
        skew = os.stat(file.name).st_mtime - time.time()
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, files {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    wrong = abs(skew) > CLOCK_SKEW_S
    yield Finding("clock", "warning" if wrong else "ok", text, "let machine and file server set their clocks by NTP" if wrong else "")


def _self_tests() -> Iterator[Finding]:
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        began = time.monotonic()
        try:
            text = train_a_little(device)
        except Exception as error:
            what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Finding(
                f"self-test on {device}",
                "problem",
                what,
                "mend the problems above first; if there are none, report all of these lines",
            )
            continue
        yield Finding(f"self-test on {device}", "ok", f"{text}, {time.monotonic() - began:.1f} s")


def worst(findings: Iterable[Finding]) -> State:
    """The worst state among them."""
    order: Mapping[State, int] = {"ok": 0, "warning": 1, "problem": 2}
    return max((finding.state for finding in findings), key=lambda state: order[state], default="ok")
