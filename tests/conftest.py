"""What every test shares: an environment without the user's settings, and few threads."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS") or (1 if "PYTEST_XDIST_WORKER" in os.environ else 2))

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # for the processes that tests start
    os.environ.setdefault(_variable, str(THREADS))
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the user's nnssl_* and nnUNet_* variables; only the cache of downloads is shared."""
    for variable in list(os.environ):
        if variable.lower().startswith(("nnssl_", "nnunet_")) and variable != "nnssl_cache":
            monkeypatch.delenv(variable)
    yield


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty nnssl_raw, nnssl_preprocessed and nnssl_results, set in the environment; their paths by name."""
    made = {}
    for name in ("nnssl_raw", "nnssl_preprocessed", "nnssl_results"):
        made[name] = tmp_path / name
        made[name].mkdir()
        monkeypatch.setenv(name, str(made[name]))
    return made


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`shared(name, fill)`: a folder filled once for all workers of a test run; who comes later waits, and only reads."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        made, filled = root / name, root / f"{name}.filled"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not filled.exists():
                shutil.rmtree(made, ignore_errors=True)  # what a failure left
                made.mkdir()
                fill(made)
                filled.touch()
        return made

    return folder


@pytest.fixture
def undrawn():
    """Runs leave out pictures, curves and TensorBoard, which take longer than the training of a tiny network; `undrawn.undo()` brings them back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnssl_sinks", "none")
        patch.setattr("nnssl_ext.trainers.sinks.draw_progress", lambda *_: None)
        patch.setattr("nnssl_ext.trainers.base.draw_run", lambda *_: None)
        yield patch
