"""Raw case -> body crop -> normalisation -> resampling -> store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import DiskError, UserError
from nnssl_ext.core.files import FolderLock, read_json, sha256_json
from nnssl_ext.core.geometry import Box, Geometry, box_slices, resampled_shape
from nnssl_ext.core.paths import index_cache, preprocessed_folder, raw_folder
from nnssl_ext.core.plan import ConfigPlan, Normalization, Plan
from nnssl_ext.io.index import MASKS, Case, read_index, sessions
from nnssl_ext.io.readers import TOLERANCE_MM, read_case, read_header, read_volume, stamps
from nnssl_ext.preprocessing.crop import body_mask, bounding_box
from nnssl_ext.preprocessing.normalize import find_normalizer, percentiles
from nnssl_ext.preprocessing.parallel import SomeFailed, Workers, run_all
from nnssl_ext.preprocessing.resample import resample
from nnssl_ext.preprocessing.resample_labels import resample_labels
from nnssl_ext.preprocessing.store import is_current, pack_body, write_case
from nnssl_ext.preprocessing.store_index import load_index

VERSION = 2  # counts up when the same case would be stored with other numbers; older stores are then redone
BYTES_PER_RAW_VOXEL, BYTES_PER_STORED_VOXEL = 18, 16  # peak memory of a case, per channel; benchmarks/preprocess.py measures it


@dataclass(frozen=True)
class Loaded:
    """A case as read.

    Args:
        array: (C, z, y, x) float32.
        body: bool (z, y, x), the voxels whose intensities count.
        box: around the body.
        masks: bool (z, y, x), the masks that came with the case, by name.
    """

    case: Case
    array: np.ndarray
    geometry: Geometry
    body: np.ndarray
    box: Box
    masks: dict[str, np.ndarray]

    def cropped(self, box: Box | None = None) -> Loaded:
        """Arrays cropped to a box, by default to the body's; `geometry` stays that of the whole image."""
        inside = box_slices(box or self.box)
        masks = {name: mask[inside[1:]] for name, mask in self.masks.items()}
        return dataclasses.replace(
            self, array=np.require(self.array[inside], requirements=("C", "W")), body=self.body[inside[1:]], box=box or self.box, masks=masks
        )


@dataclass(frozen=True)
class Finished:
    """A case as it will be stored: array (C, z, y, x) float32, what to keep beside it, its masks on the same grid."""

    array: np.ndarray
    info: dict[str, Any]
    masks: dict[str, np.ndarray]


def load(case: Case) -> Loaded:
    """Read a case and find its body: the given anatomy mask or else what the intensities say, less what was anonymised.

    Raises:
        UserError: unreadable case, or a mask on another grid.
    """
    array, geometry = read_case(case)
    masks = {name: _read_mask(getattr(case, name), geometry) for name in MASKS if getattr(case, name) is not None}
    body = masks["anatomy_mask"] if "anatomy_mask" in masks else reduce(np.logical_or, [body_mask(*pair) for pair in zip(array, case.modalities)])
    body = body & ~masks["anonymization_mask"] if "anonymization_mask" in masks else body
    return Loaded(case, array, geometry, body if body.any() else np.ones_like(body), bounding_box(body), masks)


def _read_mask(path: Path, geometry: Geometry) -> np.ndarray:
    mask, other = read_volume(path, constant=True)
    if not same_grid(geometry, other):
        raise UserError("the mask isn't on the grid of its image", path, "resample it, or take it out of the index")
    return mask > 0


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether two images have the same voxels: equal shape, and spacing, origin and direction within the readers' tolerance."""
    return a.shape == b.shape and all(np.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=TOLERANCE_MM) for name in ("spacing", "origin", "direction"))


@dataclass(frozen=True)
class Preprocessor:
    """Preprocesses cases as a configuration says.

    Args:
        config: the configuration.
        device: "cpu", or "cuda" to resample on the card.
    """

    config: ConfigPlan
    device: str = "cpu"

    def run(self, case: Case) -> Finished:
        """Read and preprocess one case by itself.

        Raises:
            UserError: unreadable case, or a modality that the plan does not know.
        """
        return self.finish(load(case).cropped())

    def run_session(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Finished | UserError]]:
        """The images of one visit. Those on the same grid are cropped to a common box, so that they stay registered voxel by voxel.

        Yields:
            each case with its result, or with the error that concerns it alone.
        """
        loaded: list[Loaded] = []
        for case in cases:
            try:
                loaded.append(load(case))
            except DiskError:
                raise
            except UserError as error:
                yield case, error
        while loaded:
            group = [other for other in loaded if same_grid(loaded[0].geometry, other.geometry)]
            loaded = [other for other in loaded if other not in group]
            box = tuple((min(low for low, _ in edges), max(high for _, high in edges)) for edges in zip(*(other.box for other in group)))
            names = [other.case.identifier for other in group]
            while group:
                other = group.pop(0).cropped(box)  # the full image is let go
                try:
                    yield other.case, self.finish(other, [name for name in names if name != other.case.identifier])
                except UserError as error:
                    yield other.case, error

    def finish(self, loaded: Loaded, registered: Sequence[str] = ()) -> Finished:
        """Normalise and resample what was read and cropped.

        Args:
            loaded: a cropped case; its voxels are overwritten.
            registered: identifiers of the other images on the same grid, cropped to the same box.
        """
        case, result, geometry, masks = loaded.case, loaded.array, loaded.geometry.cropped(loaded.box), loaded.masks
        applied, fill = [], []
        for channel, modality in zip(result, case.modalities):
            plan = self._normalization(modality)
            normalizer = find_normalizer(plan.scheme)
            parameters = normalizer.parameters(channel, loaded.body, plan)
            channel[:] = normalizer.apply(channel, parameters)
            applied.append({"scheme": plan.scheme, **parameters})
            fill.append(percentiles(channel, (0.5,))[0])
        if self.config.spacing is not None:
            target = self.config.spacing_for(geometry.spacing)
            shape = resampled_shape(geometry.shape, geometry.spacing, target)
            result = self._resample(result, shape, geometry.spacing, target)
            masks = {name: resample_labels(mask, shape, geometry.spacing, target) for name, mask in masks.items()}
            geometry = geometry.resampled(shape)
        info = {
            "identifier": case.identifier,
            "subject": case.subject,
            "session": case.session,
            "modalities": list(case.modalities),
            "registered": list(registered),
            "raw": loaded.geometry.as_dict(),
            "body_box": [list(edge) for edge in loaded.box],
            "stored": geometry.as_dict(),
            "normalization": applied,
            "fill": fill,
            "body": pack_body(loaded.body, result.shape[1:]),
        }
        return Finished(result, info, masks)

    def _resample(self, array: np.ndarray, shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> np.ndarray:
        order = {key: self.config.resampling[key] for key in ("order", "order_z")}
        if self.device == "cpu":
            return resample(array, shape, spacing, target, **order)
        from nnssl_ext.preprocessing.resample_torch import resample_on  # PyTorch takes seconds to load

        return resample_on(self.device, array, shape, spacing, target, **order)

    def _normalization(self, modality: str) -> Normalization:
        if modality not in self.config.normalization:
            known = ", ".join(self.config.normalization)
            raise UserError(f"the plan has no normalisation for modality '{modality}' (it has: {known})", "plan", "extract the fingerprint and plan again")
        return self.config.normalization[modality]


def preprocess(
    dataset_name: str, plan: Plan, configuration: str, workers: Workers, storage: str = "float32", part: tuple[int, int] | None = None, device: str = "cpu"
) -> dict[str, str]:
    """Preprocess all cases of a dataset for one configuration; finished and unchanged cases are skipped.

    Args:
        dataset_name: `DatasetXXX_NAME`.
        plan: its plan.
        configuration: name of one of the plan's configurations.
        workers: who does the work.
        storage: number format of the stored voxels, see `store.encode`.
        device: "cuda" resamples on the card; the numbers differ in the last bits.
        part: (k, n) does every n-th session from the k-th on; the n parts may run at the same time, on different machines.

    Returns:
        messages of the cases that failed, by identifier.

    Raises:
        UserError: unknown configuration, unreadable index, folder in use.
        DiskError: the disk is full or failing.
    """
    config = plan.configuration(configuration)
    folder = preprocessed_folder(dataset_name) / config.data_identifier
    relevant = {key: value for key, value in dataclasses.asdict(config).items() if key in ("spacing", "patch_size", "normalization", "resampling")}
    settings = sha256_json({"version": VERSION, "storage": storage, **relevant})
    cases = read_index(raw_folder(dataset_name), index_cache(dataset_name), workers.processes)
    units = sessions(cases)[slice(None) if part is None else slice(part[0], None, part[1])]
    title = f"{dataset_name} {configuration}" + (f" part {part[0]} of {part[1]}" if part else "")
    with FolderLock(folder, part):
        waiting = [unit for unit in units if not all(is_current(folder, case.identifier, settings, _source(case)) for case in unit)]
        done, count = sum(map(len, units)) - sum(map(len, waiting)), sum(map(len, units))
        if done:
            print(f"{title}: {done} of {count} cases are finished already")
        gone = sorted({file.stem for file in folder.glob("*.json")} - {case.identifier for case in cases})
        if gone:
            print(f"{title}: {len(gone)} stored cases are not in the raw dataset and stay in the store: {', '.join(gone[:5])}")
        work = partial(_preprocess_session, config=config, folder=folder, settings=settings, storage=storage, device=device)
        names = [unit[0].identifier if len(unit) == 1 else f"{unit[0].subject}, session {unit[0].session}" for unit in waiting]
        memory = partial(_memory, config=config, known=_described(dataset_name))
        failed = run_all(work, waiting, names, workers, f"preprocessing {title}", memory, [len(unit) for unit in waiting])[1]
    if part is None:
        load_index(folder)  # made now, so that training opens at once
    return failed


def _preprocess_session(cases: Sequence[Case], config: ConfigPlan, folder: Path, settings: str, storage: str, device: str) -> None:
    """Preprocess and store the images of a session.

    Raises:
        SomeFailed: errors of single images; the others are stored.
    """
    for case in cases:
        (folder / f"{case.identifier}.json").unlink(missing_ok=True)
    failed: dict[str, UserError] = {}
    for case, result in Preprocessor(config, device).run_session(cases):
        if isinstance(result, UserError):
            failed[case.identifier] = result
            continue
        info = {**result.info, "settings_sha256": settings, "source": _source(case)}
        write_case(folder, case.identifier, result.array, info, config.patch_size, storage, result.masks)
    if failed:
        raise SomeFailed(failed)


def _described(dataset_name: str) -> dict[str, Any]:
    """The cases of the fingerprint; empty without one."""
    file = preprocessed_folder(dataset_name) / "dataset_fingerprint.json"
    return dict(read_json(file)["cases"]) if file.is_file() else {}


def _memory(cases: Sequence[Case], config: ConfigPlan, known: dict[str, Any]) -> int:
    """Peak memory in bytes of preprocessing a session; 0 for a case whose header can't be read, since it will fail at once."""
    held, working = 0, 0
    for case in cases:
        try:
            found = known.get(case.identifier) or read_header(case.images[0]).as_dict()
        except UserError:
            continue
        channels, raw = len(case.images), math.prod(found["shape"])
        stored = math.prod(resampled_shape(found["shape"], found["spacing"], config.spacing_for(found["spacing"])))
        held += 5 * channels * raw  # float32 voxels and the body
        working = max(working, channels * ((BYTES_PER_RAW_VOXEL - 5) * raw + BYTES_PER_STORED_VOXEL * stored))
    return held + working


def _source(case: Case) -> list[list[Any]]:
    """State of every file of a case."""
    return stamps([*case.images, *(mask for mask in (case.anatomy_mask, case.anonymization_mask) if mask is not None)])
