"""Collections of crops: fixed size, fixed spacing, a minimal share of body, position drawn at random."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, sha256_json, write_text
from nnssl_ext.core.geometry import Geometry, resampled_shape
from nnssl_ext.core.paths import raw_folder
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io.case import Case
from nnssl_ext.io.raw_dataset import TRAINING, Record, claim, indexes, load, load_all, save, write_indexes, write_nifti
from nnssl_ext.io.readers import read_header
from nnssl_ext.preprocessing.convert import csv_text
from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.preprocessor import load as load_case
from nnssl_ext.preprocessing.resample import resample

BYTES_PER_VOXEL = 16  # peak memory of a case, per channel and voxel before or after resampling; 11 were measured, without what SimpleITK takes


@dataclass(frozen=True)
class CropPlan:
    """What crops to cut.

    Args:
        size: voxels (z, y, x).
        spacing: mm (z, y, x); volumes are resampled to it as nnU-Net does, so that it is met up to rounding of the volume's size.
        foreground: least share of the body's voxels in a crop, 0 to 1.
        seed: crop i depends on (seed, i) and the cases alone.
    """

    size: Sequence[int] = (128, 128, 128)
    spacing: Sequence[float] = (1.5, 1.5, 1.5)
    foreground: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not all(math.isfinite(mm) and mm > 0 for mm in self.spacing):
            raise UserError("size and spacing must be positive", "options -size and -spacing", "such as -size 128 128 128 -spacing 1.5 1.5 1.5")
        if not 0 <= self.foreground <= 1 or self.seed < 0:
            raise UserError("the share of body lies between 0 and 1, the seed is not negative", "options -foreground and -seed", "such as -foreground 0.7")


def window_sums(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Number of true voxels in every window of a size, by a summed-area table.

    Args:
        mask: bool (z, y, x).
        size: voxels of the window, (z, y, x).

    Returns:
        int (z - size_z + 1, ...), by the window's first voxel; without elements where the window is larger than the mask.

    Source: Crow 1984, Summed-area tables for texture mapping, doi:10.1145/800031.808600.
    """
    table = np.zeros([n + 1 for n in mask.shape], np.int32 if mask.size < 2**31 else np.int64)
    table[1:, 1:, 1:] = mask
    for axis in range(3):
        np.cumsum(table, axis, out=table)
    for axis, n in enumerate(size):
        starts = max(0, table.shape[axis] - n)
        table = table.take(range(n, n + starts), axis) - table.take(range(starts), axis)
    return table


def valid_starts(mask: np.ndarray, size: Sequence[int], fraction: float) -> np.ndarray:
    """First voxels of all windows that hold at least a fraction of true voxels.

    Args:
        mask: bool (z, y, x).
        size: voxels of the window, (z, y, x).
        fraction: 0 to 1, taken as the decimal number that it prints as.

    Returns:
        bool (z - size_z + 1, ...), by the window's first voxel.
    """
    return np.asarray(window_sums(mask, size) >= _needed(size, fraction))


def _needed(size: Sequence[int], fraction: float) -> int:
    return math.ceil(Fraction(str(fraction)) * math.prod(size))  # 0.3 * 10 in floating point is a little more than 3


def cut_crops(
    cases: Sequence[Case], dataset_name: str, count: int, plan: CropPlan, settings: Mapping[str, Any], workers: Workers, wanted: str | None = None
) -> dict[str, str]:
    """Cut crops into `nnssl_raw/DATASET_NAME`; finished ones are kept.

    Every crop picks its volume uniformly among those with a valid position: it goes through the cases in an order of its
    own, drawn from (seed, crop), until one has any. Then it picks uniformly among that volume's valid positions. So no
    crop depends on how many others are cut or by whom, and volumes that no crop picks are never read.

    Args:
        cases: whole volumes.
        dataset_name: `DatasetXXX_NAME` of the collection.
        count: how many crops.
        plan: their size, spacing, share of body and seed.
        settings: what else decides the result, such as the source; a folder that was begun with others is refused.
        workers: who does the work, one volume each at a time.
        wanted: format of the index, see `raw_dataset.indexes`.

    Returns:
        messages of the cases that failed, by identifier.

    Raises:
        UserError: no case has a valid position; the folder holds something else.
        DiskError: the disk is full or failing.
    """
    if not cases or count < 1:
        raise UserError("there is nothing to cut", "option --crops", "give a number of crops, and a source with cases outside its test set")
    indexes([case.modalities for case in cases], wanted)
    folder = raw_folder(dataset_name)
    with FolderLock(folder):
        # another list of cases would give other crops
        claim(folder, {**settings, **asdict(plan), "cases": sha256_json([case.identifier for case in cases])})
        pending = [crop for crop in range(count) if load(folder, crop_name(crop)) is None]
        failed: dict[str, str] = {}
        best: dict[int, float] = {}  # cases without a valid position, and the largest share in them
        while pending:
            groups = _picked(pending, len(cases), best, plan.seed)
            work = partial(_cut, folder=folder, plan=plan)
            names = [cases[case].identifier for case in groups]
            memory = partial(_memory, spacing=plan.spacing)
            items = [(cases[case], crops) for case, crops in groups.items()]
            done, errors = run_all(work, items, names, workers, f"cutting {dataset_name}", memory)
            failed |= errors
            shares = {case: 0.0 if name in errors else done[name] for case, name in zip(groups, names)}
            best |= {case: share for case, share in shares.items() if share is not None}
            pending = [crop for case, crops in groups.items() if case in best for crop in crops]
            if pending and len(best) == len(cases):
                break
        without = [cases[case].identifier for case in sorted(best) if cases[case].identifier not in failed]
        if without:
            listed = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            print(f"{dataset_name}: {len(without)} cases have no place with a share of {plan.foreground:g} of body: {listed}")
        write_indexes(folder, ".nii.gz", {}, wanted)
        _write_list(folder)
        if pending and without:
            what = f"no volume has a crop of {'x'.join(map(str, plan.size))} voxels with a share of {plan.foreground:g} of body"
            raise UserError(f"{what}; the largest share is {max(best.values()):.3f}", folder, "lower -foreground or -size, or choose a finer -spacing")
    return failed


def crop_name(crop: int) -> str:
    return f"crop{crop:06d}"


def _picked(crops: Sequence[int], cases: int, without: Mapping[int, float], seed: int) -> dict[int, list[int]]:
    """Case -> its crops; each takes the first case, in the crop's own order, that is not known to be without a valid position."""
    groups: dict[int, list[int]] = defaultdict(list)
    for crop in crops:
        order = sample_rng(seed, crop, "crops").permutation(cases)
        groups[next(int(case) for case in order if int(case) not in without)].append(crop)
    return dict(sorted(groups.items()))


def _cut(item: tuple[Case, list[int]], folder: Path, plan: CropPlan) -> float | None:
    """Cut all crops of a case; None, or where it has no valid position, the largest share of body in any window."""
    case, crops = item
    array, body, geometry = _resampled(case, plan.spacing)
    sums = window_sums(body, plan.size)
    starts = np.flatnonzero(sums >= _needed(plan.size, plan.foreground))
    if not len(starts):
        return float(sums.max(initial=0)) / math.prod(plan.size)
    for crop in crops:
        chosen = starts[sample_rng(plan.seed, crop, "crop positions").integers(len(starts))]
        start = [int(n) for n in np.unravel_index(chosen, sums.shape)]
        box = tuple((low, low + n) for low, n in zip(start, plan.size))
        files = [f"{TRAINING}/{crop_name(crop)}_{channel:04d}.nii.gz" for channel in range(len(array))]
        for file, volume in zip(files, array):
            write_nifti(folder / file, volume[tuple(slice(*edge) for edge in box)], geometry.cropped(box))
        origin = {"case": case.identifier, "start": start, "foreground": int(sums.flat[chosen]) / math.prod(plan.size)}
        save(folder, Record(crop_name(crop), case.subject, case.session, list(case.modalities), files, [], crop=origin))
    return None


def _resampled(case: Case, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """A case at a spacing: voxels (C, z, y, x) float32, body (z, y, x) bool, geometry."""
    loaded = load_case(case)
    before = loaded.geometry
    shape = resampled_shape(before.shape, before.spacing, spacing)
    array = resample(loaded.array, shape, before.spacing, spacing)
    body = resample(loaded.body[None].astype(np.float32), shape, before.spacing, spacing, order=1)[0] >= 0.5
    return array, body, before.resampled(shape)


def _memory(item: tuple[Case, list[int]], spacing: Sequence[float]) -> int:
    """Peak memory in bytes; 0 for a case whose header can't be read, since it will fail at once."""
    case = item[0]
    try:
        geometry = read_header(case.images[0])
    except UserError:
        return 0
    return BYTES_PER_VOXEL * len(case.images) * (math.prod(geometry.shape) + math.prod(resampled_shape(geometry.shape, geometry.spacing, spacing)))


def _write_list(folder: Path) -> None:
    """`crops.csv`: where each crop comes from; the start counts voxels of the resampled volume."""
    rows = [(r.identifier, r.crop["case"], *r.crop["start"], f"{r.crop['foreground']:.6f}") for r in load_all(folder)]
    write_text(folder / "crops.csv", csv_text(("crop", "case", "start_z", "start_y", "start_x", "foreground"), rows))
