"""One case from .nii.gz to the store (read, crop, normalise, resample, compress, hash, write) against nnU-Net's DefaultPreprocessor.

The same files, spacing, normalisation (nnU-Net's for CT) and one thread each. Files hold the box around the body, so that
both have the same voxels left after cropping: nnU-Net looks for voxels that are not 0, we for the body. What else differs:
nnU-Net also resamples and stores its mask of such voxels, and tries two filters in compressing; we check every voxel and
hash the file. The results are compared voxel by voxel.
"""

from __future__ import annotations

import gzip
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.common import Result, memory, summarize
from benchmarks.volumes import phantoms, torso_cts
from nnssl_ext.core.plan import ConfigPlan, Normalization
from nnssl_ext.io.index import Case
from nnssl_ext.io.readers import read_header
from nnssl_ext.preprocessing.preprocessor import Preprocessor
from nnssl_ext.preprocessing.store import CaseStore, write_case

PEER = "nnunetv2 DefaultPreprocessor.run_case_save"
TARGET = (1.8, 1.8, 1.8)  # mm
PATCH = (96, 96, 96)
STATISTICS = Normalization("ct", mean=40.0, std=180.0, low=-900.0, high=1200.0)
CONFIG = ConfigPlan("benchmark", TARGET, PATCH, PATCH, {"CT": STATISTICS}, {"order": 3, "order_z": 0, "force_separate_z": None}, {})


def shape(quick: bool) -> tuple[int, int, int]:
    return (64, 96, 96) if quick else (160, 256, 256)


def ours(case: Case, folder: Path) -> None:
    finished = Preprocessor(CONFIG).run(case)
    write_case(folder, case.identifier, finished.array, finished.info, PATCH, masks=finished.masks)


def nnunet() -> Callable[[Case, Path], None]:
    """nnU-Net's preprocessing of one case; imported here, so that our side's memory doesn't count it."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "benchmark",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": list(PATCH),
        "spacing": list(TARGET),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "architecture": {},
    }
    intensities = {"mean": STATISTICS.mean, "std": STATISTICS.std, "percentile_00_5": STATISTICS.low, "percentile_99_5": STATISTICS.high}
    plans = {
        "transpose_forward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": configuration},
    }
    manager = PlansManager(plans)
    preprocessor = DefaultPreprocessor(verbose=False)

    def preprocess(case: Case, folder: Path) -> None:
        preprocessor.run_case_save(
            str(folder / case.identifier), [str(path) for path in case.images], None, manager, manager.get_configuration("3d_fullres"), {}
        )

    return preprocess


def largest_difference(cases: list[Case], our_folder: Path, peer_folder: Path) -> float:
    """Of the stored voxels, as a share of the range."""
    store = CaseStore(our_folder)
    differences = []
    for case in cases:
        found = store.read(list(store.identifiers).index(case.identifier))
        expected = blosc2.open(str(peer_folder / f"{case.identifier}.b2nd"))[:]
        if found.shape != expected.shape:
            raise RuntimeError(f"{case.identifier}: {found.shape} and {expected.shape} voxels")
        differences.append(float(np.abs(found - expected).max() / np.ptp(expected)))
    return max(differences)


def measure(cases: list[Case], folder: Path) -> dict[str, Any]:
    """CPU seconds per case of both and of decompressing alone."""
    sides: dict[str, Callable[[Case, Path], None]] = {"ours": ours, "peer": nnunet()}
    seconds: dict[str, list[float]] = {"ours": [], "peer": [], "gzip": []}
    for side, function in sides.items():
        (folder / side).mkdir()
        function(cases[0], Path(tempfile.mkdtemp(dir=folder)))  # imports
    for index, case in enumerate(cases):
        for side in sides if index % 2 == 0 else reversed(sides):
            began = time.process_time()
            sides[side](case, folder / side)
            seconds[side].append(time.process_time() - began)
        began = time.process_time()
        gzip.decompress(case.images[0].read_bytes())
        seconds["gzip"].append(time.process_time() - began)
    return {"seconds": seconds, "difference": largest_difference(cases, folder / "ours", folder / "peer")}


def work(side: str, image: str) -> Callable[[], None]:
    """Preprocessing of one file, for the measurement of memory."""
    case = Case("memory", "memory", "session", (Path(image),), ("CT",))
    function = ours if side == "ours" else nnunet()
    return lambda: function(case, Path(tempfile.mkdtemp(dir=Path(image).parent)))


def run(quick: bool) -> Result:
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary, threadpool_limits(1):
        folders = {name: Path(temporary) / name for name in ("phantoms", "torso")}
        for folder in folders.values():
            folder.mkdir()
        cases = {"phantoms": phantoms(folders["phantoms"], 3 if quick else 24, shape(quick), crop=True), "torso": torso_cts(folders["torso"], crop=True)}
        found = {name: measure(cases[name], folders[name]) for name in cases if cases[name]}
        largest = cases["phantoms"][0]
        imports = {"ours": "numpy", "peer": "nnunetv2.preprocessing.preprocessors.default_preprocessor"}
        held = {side: memory("preprocess", side, str(largest.images[0]), imports[side]) for side in imports}
        voxels = read_header(largest.images[0]).shape
    detail: dict[str, Any] = {
        "threads": 1,
        "bar": 4,
        "volumes": {name: len(of) for name, of in cases.items()},
        "memory_gb": held,
        "bytes_per_raw_voxel": {side: round((gb["peak"] - gb["base"]) * 1e9 / math.prod(voxels), 1) for side, gb in held.items()},
    }
    for name, result in found.items():
        seconds = result["seconds"]
        detail[name] = {
            "ratio": round(statistics.median(peer / our for our, peer in zip(seconds["ours"], seconds["peer"])), 2),
            "ours_s": round(statistics.median(seconds["ours"]), 4),
            "gzip_share": round(sum(seconds["gzip"]) / sum(seconds["ours"]), 3),
            "largest_difference": result["difference"],
        }
    pooled = {side: [value for result in found.values() for value in result["seconds"][side]] for side in ("ours", "peer")}
    return summarize(pooled["ours"], pooled["peer"], PEER, "CPU-s", detail)
