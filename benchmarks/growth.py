"""How preprocessing grows with voxels, and the store with cases.

The ratio is CPU time per voxel of the smallest volume over that of the largest one, sixteen times as long: 1 is linear, above
1 is better. `detail` has time and memory of every size, and for stores of generated entries: seconds to open one for the
first time (every case's JSON file is read) and again (from the index), memory, and milliseconds per 64^3 box of random cases.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from threadpoolctl import threadpool_limits

from benchmarks.common import Result, memory, summarize
from benchmarks.preprocess import PATCH, ours
from benchmarks.volumes import SPACING
from nnssl_ext.core.files import read_json
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.io.index import Case
from nnssl_ext.preprocessing.store import write_case

BOX, READS = 64, 300
STORE = """
import json, sys, time
import numpy as np
from benchmarks.common import resident
from nnssl_ext.preprocessing.store import CaseStore
base, found = resident("VmRSS"), {}
for key in ("first_open_s", "open_s"):
    began = time.perf_counter()
    store = CaseStore(sys.argv[1])
    found[key] = round(time.perf_counter() - began, 4)
rng = np.random.default_rng(0)
seconds = []
for _ in range(int(sys.argv[2])):
    case = int(rng.integers(len(store)))
    box = [(low, low + int(sys.argv[3])) for low in (int(rng.integers(n - int(sys.argv[3]) + 1)) for n in store.shape(case))]
    began = time.process_time()
    store.read(case, box)
    seconds.append(time.process_time() - began)
found |= {"read_ms": round(1000 * float(np.median(seconds)), 3), "memory_gb": round(resident("VmRSS") - base, 4)}
print(json.dumps(found))
"""


def volumes(folder: Path, quick: bool) -> list[Case]:
    """One body, 1, 4 and 16 times as long."""
    body = make_phantom(0, 0, (16, 96, 96) if quick else (40, 256, 256), SPACING, "CT").image
    cases = []
    for times in (1, 4, 16):
        image = sitk.GetImageFromArray(np.concatenate([body, body[::-1]] * (times // 2) or [body]).astype(np.int16))
        image.SetSpacing(SPACING[::-1])
        path = folder / f"long{times:02}_0000.nii.gz"
        sitk.WriteImage(image, str(path), True)
        cases.append(Case(f"long{times:02}", "body", "session", (path,), ("CT",)))
    return cases


def grow_voxels(folder: Path, quick: bool) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """CPU seconds per million voxels by case, and a row of figures for each."""
    cases = volumes(folder, quick)
    millions = {case.identifier: math.prod(sitk.ReadImage(str(case.images[0])).GetSize()) / 1e6 for case in cases}
    seconds: dict[str, list[float]] = {case.identifier: [] for case in cases}
    ours(cases[0], Path(tempfile.mkdtemp(dir=folder)))
    for _ in range(2 if quick else 7):
        for case in cases:
            began = time.process_time()
            ours(case, Path(tempfile.mkdtemp(dir=folder)))
            seconds[case.identifier].append((time.process_time() - began) / millions[case.identifier])
    rows = []
    for case in cases:
        held = memory("preprocess", "ours", str(case.images[0]), "numpy")
        voxels = millions[case.identifier]
        figures = {"cpu_s_per_million": min(seconds[case.identifier]), "bytes_per_voxel": (held["peak"] - held["base"]) * 1e3 / voxels}
        rows.append({"million_voxels": round(voxels, 2), **{key: round(value, 4) for key, value in figures.items()}})
    return seconds, rows


def grow_cases(folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Figures of stores whose entries all lead to one array."""
    array = np.random.default_rng(0).standard_normal((1, 96, 96, 96), dtype=np.float32)
    real = folder / "real"
    real.mkdir()
    info = {"identifier": "case", "subject": "subject", "stored": {"shape": [96, 96, 96], "spacing": [1, 1, 1]}, "fill": [0.0]}
    write_case(real, "case", array, info, PATCH)
    content, found = read_json(real / "case.json"), {}
    for count in (10, 100, 1000) if quick else (10, 1000, 100_000):
        store = folder / f"store{count}"
        store.mkdir()
        for index in range(count):
            name = f"case{index:06}"
            (store / f"{name}.json").write_text(json.dumps({**content, "identifier": name, "subject": f"subject{index // 3}"}))
            (store / f"{name}.b2nd").symlink_to(real / "case.b2nd")
        command = [sys.executable, "-W", "ignore", "-c", STORE, str(store), str(READS), str(BOX)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(count)] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(quick: bool) -> Result:
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary, threadpool_limits(1):
        folder = Path(temporary)
        seconds, rows = grow_voxels(folder, quick)
        stores = grow_cases(folder, quick)
    smallest, *_, largest = seconds.values()
    return summarize(largest, smallest, "the volume a sixteenth as long", "CPU-s per million voxels", {"threads": 1, "voxels": rows, "cases": stores})
