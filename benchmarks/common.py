"""What benchmarks share: interleaved timing, peak memory of a child process, the form of a result."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.plan import ConfigPlan, NetworkPlan, Normalization, Plan
from nnssl_ext.preprocessing.store import BODY_CELL

THREADS = 2
PAIRED = ("MultiMAETrainer",)  # methods that need images of two modalities


@dataclass(frozen=True)
class Result:
    """A ratio to a peer on the same work in the same run.

    Args:
        ratio, min, max: peer / ours, over pairs of neighbouring measurements; above 1 = ours is faster.
        ours, peer: medians in `unit`.
        peer_name: what it is compared with.
        detail: further figures.
    """

    ratio: float
    min: float
    max: float
    ours: float
    peer: float
    peer_name: str
    unit: str
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}

    def sentence(self) -> str:
        times = f"ours {self.ours:.4g} {self.unit}, {self.peer_name} {self.peer:.4g} {self.unit}"
        return f"ratio {self.ratio:.2f} (min {self.min:.2f}, max {self.max:.2f}): {times}"


def compare(ours: Callable[[], object], peer: Callable[[], object], peer_name: str, repetitions: int, warm_up: int = 1) -> Result:
    """CPU seconds (all threads of this process) of both, one after the other in turn; wall seconds in `detail`."""
    for _ in range(warm_up):
        ours()
        peer()
    cpu: dict[str, list[float]] = {"ours": [], "peer": []}
    wall: dict[str, list[float]] = {"ours": [], "peer": []}
    for repetition in range(repetitions):
        pair = [("ours", ours), ("peer", peer)]
        for name, function in pair if repetition % 2 == 0 else reversed(pair):
            began = time.process_time(), time.perf_counter()
            function()
            cpu[name].append(time.process_time() - began[0])
            wall[name].append(time.perf_counter() - began[1])
    return summarize(cpu["ours"], cpu["peer"], peer_name, "CPU-s", {"wall_s": {name: round(statistics.median(v), 4) for name, v in wall.items()}})


def summarize(ours: Sequence[float], peer: Sequence[float], peer_name: str, unit: str, detail: dict[str, Any]) -> Result:
    """The ratios of paired measurements."""
    ratios = [p / o for o, p in zip(ours, peer)]
    detail = {"repetitions": len(ratios), "threads": THREADS, **detail}
    return Result(statistics.median(ratios), min(ratios), max(ratios), statistics.median(ours), statistics.median(peer), peer_name, unit, detail)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum, for `Result.detail`."""
    numbers = list(values)
    return {"median": round(statistics.median(numbers), 2), "min": round(min(numbers), 2), "max": round(max(numbers), 2)}


def memory(module: str, side: str, argument: object, imports: str = "torch", prepare: str = "") -> dict[str, float]:
    """Memory in GB of a fresh process that calls ``module.work(side, argument)`` twice: "peak", and "base" after these imports, the module's and `prepare`."""
    code = (
        f"import json, sys, {imports}\n"
        f"if 'torch' in sys.modules: sys.modules['torch'].set_num_threads({THREADS})\n"
        f"from benchmarks import {module}; from benchmarks.common import resident\n"
        f"{prepare}\nbase = resident('VmRSS'); step = {module}.work({side!r}, {argument!r}); step(); step()\n"
        "print(json.dumps({'base': base, 'peak': resident('VmHWM')}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def resident(key: str) -> float:
    """This process's memory in GB, "VmRSS" now or "VmHWM" at most. (A child's ru_maxrss would include its parent's.)"""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key + ":"))
    return round(int(line.split()[1]) * 1024 / 1e9, 4)


def make_plan(patch_size: tuple[int, int, int], family: str, network: NetworkPlan) -> Plan:
    """A plan with one configuration and one network."""
    config = ConfigPlan("benchmark", (1.0, 1.0, 1.0), patch_size, patch_size, {"CT": Normalization("zscore")}, {"order": 3, "order_z": 0}, {family: network})
    return Plan("Dataset999_Benchmark", "nnsslPlans", "Planner", 1, 8.0, "0" * 64, (), {"3d_fullres": config})


class ArrayLabels:
    """The reading side of `ClusterLabels`, in memory.

    Args:
        arrays: labels of each case, (1, z, y, x).
        classes: number of clusters.
    """

    model = "0" * 64

    def __init__(self, arrays: Sequence[np.ndarray], classes: int) -> None:
        self.arrays, self.classes = arrays, classes

    def shape(self, case: int) -> tuple[int, ...]:
        return self.arrays[case].shape[1:]

    def fill(self, case: int) -> list[float]:
        return [0.0]

    def read(self, case: int, box: Sequence[tuple[int, int]]) -> np.ndarray:
        return self.arrays[case][(slice(None), *(slice(low, high) for low, high in box))].copy()


def intensity_labels(arrays: Iterable[np.ndarray]) -> ArrayLabels:
    """Four clusters of normalised volumes (C, z, y, x), by the intensity of the first channel."""
    return ArrayLabels([1 + np.digitize(array[:1], (-1.0, 0.0, 1.0)).astype(np.uint8) for array in arrays], 4)


class NoiseStore:
    """The reading side of a case store: white noise, no files."""

    def __init__(self, shape: Sequence[int], cases: int = 4) -> None:
        self.arrays = np.random.default_rng(0).standard_normal((cases, 1, *shape), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.arrays)

    def shape(self, case: int) -> tuple[int, ...]:
        return self.arrays[case].shape[1:]

    def subject(self, case: int) -> str:
        return f"subject{case}"

    @property
    def identifiers(self) -> list[str]:
        return [f"case{case}" for case in range(len(self))]

    def geometry(self, case: int) -> Geometry:
        return Geometry(self.shape(case), (1.0, 1.0, 1.0))

    def body(self, case: int) -> np.ndarray:
        return np.ones([-(-n // BODY_CELL) for n in self.shape(case)], bool)

    def fill(self, case: int) -> list[float]:
        return [0.0]

    def read(self, case: int, box: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        return self.arrays[case] if box is None else self.arrays[case][(slice(None), *(slice(low, high) for low, high in box))].copy()

    def clusters(self) -> ArrayLabels:
        return intensity_labels(self.arrays)

    def verify(self, case: int) -> None:
        pass

    def data_hash(self) -> str:
        return "0" * 64


class PairedStore(NoiseStore):
    """The same, but every two cases are the CT and the MR image of one visit."""

    def subject(self, case: int) -> str:
        return f"subject{case // 2}"

    def info(self, case: int) -> dict[str, Any]:
        return {"session": "1", "modalities": [("CT", "MR")[case % 2]], "stored": self.geometry(case).as_dict()}
