"""What the planner must know of a case, from its .nii.gz, against nnU-Net's DatasetFingerprintExtractor on the same files, one thread each.

nnU-Net is given a segmentation to sample intensities from (here the body, as a second file); we find the body ourselves.
It crops to voxels that are not 0 and samples 10,000 voxels like us.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from threadpoolctl import threadpool_limits

from benchmarks.common import Result, summarize
from benchmarks.volumes import phantoms, torso_cts
from nnssl_ext.io.index import Case
from nnssl_ext.io.readers import read_header
from nnssl_ext.planners.fingerprint import _describe as describe
from nnssl_ext.preprocessing.crop import AIR_HU

PEER = "nnunetv2 DatasetFingerprintExtractor.analyze_case"


def segmentation(case: Case) -> str:
    """File of the voxels above air's threshold."""
    path = str(case.images[0]).replace("_0000.nii.gz", "_seg.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(case.images[0])) > AIR_HU, path, True)
    return path


def run(quick: bool) -> Result:
    seconds: dict[str, list[float]] = {"ours": [], "peer": [], "header": []}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary, threadpool_limits(1):
        folder = Path(temporary)
        cases = [*phantoms(folder, 3 if quick else 12, (64, 96, 96) if quick else (160, 256, 256)), *torso_cts(folder)]
        files = [segmentation(case) for case in cases]
        work = {
            "ours": lambda case, file: describe(case),
            "peer": lambda case, file: DatasetFingerprintExtractor.analyze_case([str(case.images[0])], file, SimpleITKIO),
            "header": lambda case, file: read_header(case.images[0]),
        }
        for function in work.values():
            function(cases[0], files[0])
        for index, pair in enumerate(zip(cases, files)):
            for side in work if index % 2 == 0 else reversed(work):
                began = time.process_time()
                work[side](*pair)
                seconds[side].append(time.process_time() - began)
    return summarize(
        seconds["ours"], seconds["peer"], PEER, "CPU-s", {"threads": 1, "volumes": len(cases), "header_only_s": round(statistics.median(seconds["header"]), 5)}
    )
