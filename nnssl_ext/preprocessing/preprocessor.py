"""Raw case -> body crop -> normalisation -> resampling -> store."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, sha256_json
from nnssl_ext.core.geometry import box_slices, resampled_shape
from nnssl_ext.core.paths import preprocessed_folder, raw_folder
from nnssl_ext.core.plan import ConfigPlan, Normalization, Plan
from nnssl_ext.io.index import Case, read_index
from nnssl_ext.io.readers import read_case
from nnssl_ext.preprocessing.crop import body_mask, bounding_box
from nnssl_ext.preprocessing.normalize import find_normalizer
from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.resample import resample
from nnssl_ext.preprocessing.store import is_current, write_case


@dataclass(frozen=True)
class Preprocessor:
    """Preprocesses single cases as a configuration says."""

    config: ConfigPlan

    def run(self, case: Case) -> tuple[np.ndarray, dict[str, Any]]:
        """A case's array (C, z, y, x) float32 and what to keep beside it.

        Raises:
            UserError: unreadable case, or a modality that the plan does not know.
        """
        array, raw = read_case(case)
        body = np.any([body_mask(channel, modality) for channel, modality in zip(array, case.modalities)], axis=0)
        box = bounding_box(body)
        inside = box_slices(box)
        array, body, geometry = array[inside], body[inside[1:]], raw.cropped(box)
        normalized, applied, fill = [], [], []
        for channel, modality in zip(array, case.modalities):
            plan = self._normalization(modality)
            normalizer = find_normalizer(plan.scheme)
            parameters = normalizer.parameters(channel, body, plan)
            normalized.append(normalizer.apply(channel, parameters))
            applied.append({"scheme": plan.scheme, **parameters})
            fill.append(float(np.percentile(normalized[-1], 0.5)))
        result = np.stack(normalized)
        if self.config.spacing is not None:
            shape = resampled_shape(geometry.shape, geometry.spacing, self.config.spacing)
            order = {key: self.config.resampling[key] for key in ("order", "order_z")}
            result = resample(result, shape, geometry.spacing, self.config.spacing, **order)
            geometry = geometry.resampled(shape)
        return result, {
            "identifier": case.identifier,
            "subject": case.subject,
            "modalities": list(case.modalities),
            "raw": raw.as_dict(),
            "body_box": [list(edge) for edge in box],
            "stored": geometry.as_dict(),
            "normalization": applied,
            "fill": fill,
        }

    def _normalization(self, modality: str) -> Normalization:
        if modality not in self.config.normalization:
            known = ", ".join(self.config.normalization)
            raise UserError(f"the plan has no normalisation for modality '{modality}' (it has: {known})", "plan", "extract the fingerprint and plan again")
        return self.config.normalization[modality]


def preprocess(dataset_name: str, plan: Plan, configuration: str, workers: Workers) -> dict[str, str]:
    """Preprocess all cases of a dataset for one configuration; finished and unchanged cases are skipped.

    Args:
        dataset_name: `DatasetXXX_NAME`.
        plan: its plan.
        configuration: name of one of the plan's configurations.
        workers: who does the work.

    Returns:
        messages of the cases that failed, by identifier.

    Raises:
        UserError: unknown configuration, unreadable index, folder in use.
        DiskError: the disk is full or failing.
    """
    config = plan.configuration(configuration)
    folder = preprocessed_folder(dataset_name) / config.data_identifier
    settings = sha256_json({key: value for key, value in dataclasses.asdict(config).items() if key in ("spacing", "patch_size", "normalization", "resampling")})
    cases = read_index(raw_folder(dataset_name))
    with FolderLock(folder):
        waiting = [case for case in cases if not is_current(folder, case.identifier, settings, _source(case))]
        if len(waiting) < len(cases):
            print(f"{dataset_name} {configuration}: {len(cases) - len(waiting)} of {len(cases)} cases are finished already")
        gone = sorted({file.stem for file in folder.glob("*.json")} - {case.identifier for case in cases})
        if gone:
            print(f"{dataset_name} {configuration}: {len(gone)} stored cases are not in the raw dataset and stay in the store: {', '.join(gone[:5])}")
        work = partial(_preprocess_case, config=config, folder=folder, settings=settings)
        return run_all(work, waiting, [case.identifier for case in waiting], workers, f"preprocessing {dataset_name} {configuration}")[1]


def _preprocess_case(case: Case, config: ConfigPlan, folder: Path, settings: str) -> None:
    (folder / f"{case.identifier}.json").unlink(missing_ok=True)
    array, info = Preprocessor(config).run(case)
    write_case(folder, case.identifier, array, {**info, "settings_sha256": settings, "source": _source(case)}, config.patch_size)


def _source(case: Case) -> list[list[Any]]:
    """Name, size and time of change of every file of a case."""
    found = [(path, path.stat() if path.is_file() else None) for path in case.images]
    return [[path.name, stat.st_size if stat else 0, stat.st_mtime_ns if stat else 0] for path, stat in found]
