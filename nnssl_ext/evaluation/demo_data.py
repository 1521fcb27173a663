"""The embedded data sets 801/901 (derived from five real scans) and 802/902 (phantoms), written as raw data sets.

801 and 802 are unlabelled, for pretraining (nnssl's pretrain_data.json); 901 and 902 are labelled, for fine-tuning
(nnU-Net's raw format). 901 is a smoke set: its training and test volumes are deformations of one scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, read_json, sha256_file, sha256_json, write_json
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.paths import RAW
from nnssl_ext.evaluation.anatomy import LABELS
from nnssl_ext.evaluation.cohort import DerivedVolume, derive_volume, merge_organs, source_of
from nnssl_ext.evaluation.phantom import Phantom, make_phantom
from nnssl_ext.evaluation.torso import ORGANS, SCANS
from nnssl_ext.io.itk import write_image

COHORT, ORGAN_SET = "Dataset801_TorsoCohort", "Dataset901_TorsoOrgans"
PHANTOM_COHORT, PHANTOM_SET = "Dataset802_PhantomCohort", "Dataset902_PhantomOrgans"
FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
_RECORD = "generator.json"  # settings and hashes of a finished data set
_VERSION = 1  # raise when the same settings give other volumes
_TEST_INDEX = 100_000  # indices of test volumes begin here: the training set may grow without touching the test set
Job = tuple[str, Callable[[], tuple[np.ndarray, Geometry]]]  # file below the data set, what it holds


def semi_synthetic_sentence(volumes: int) -> str:
    """The sentence that goes wherever results on derived volumes are shown."""
    return f"semi-synthetic: {volumes} volumes derived from {len(SCANS)} scans; no evidence of generalisation"


def make_demo_data(raw_root: Path | str, nnunet_raw_root: Path | str, phantom: bool = False, seed: int = 0, workers: int = 2) -> dict[str, Any]:
    """Write the unlabelled and the labelled data set of the demonstration and print where the volumes come from.

    Args:
        raw_root: nnssl_raw; gets 801 (802 with `phantom`).
        nnunet_raw_root: nnUNet_raw; gets 901 (902 with `phantom`).
        phantom: use procedural phantoms, which need no download.
        seed: of every volume.
        workers: threads.

    Returns:
        "unlabelled" and "labelled" (each: id, name, folder, volumes, written), "phantom", "seed" and "sentence".

    Raises:
        UserError: the scans cannot be fetched, or the disk does not take the files.
    """
    if phantom:
        unlabelled, labelled = write_dataset_802(raw_root, seed=seed, workers=workers), write_dataset_902(nnunet_raw_root, seed=seed, workers=workers)
        sentence = f"synthetic: {unlabelled['volumes'] + labelled['volumes']} procedural phantoms; no evidence of clinical performance"
    else:
        unlabelled, labelled = write_dataset_801(raw_root, seed=seed, workers=workers), write_dataset_901(nnunet_raw_root, seed=seed, workers=workers)
        sentence = semi_synthetic_sentence(unlabelled["volumes"] + labelled["volumes"])
    print(sentence)
    return {"unlabelled": unlabelled, "labelled": labelled, "phantom": phantom, "seed": seed, "sentence": sentence}


def write_dataset_801(raw_root: Path | str, count: int = 24, seed: int = 0, workers: int = 2) -> dict[str, Any]:
    """Unlabelled volumes derived from the five scans; subject = source scan, session = derived volume.

    Args:
        raw_root: nnssl_raw.
        count: volumes, at least 5 to see every scan.
    """
    volumes: dict[str, dict[str, Any]] = {}
    jobs = []
    for index in range(count):
        source = source_of(index)
        name = f"{source}_{index:04d}"
        file = f"images/{name}.nii.gz"
        jobs.append((file, _derived_image(seed, index, volumes.setdefault(name, {"source": source, "file": file}))))
    folder = Path(raw_root) / COHORT

    def metadata() -> dict[str, Any]:
        entries = [(v["source"], SCANS[v["source"]].package.name, name, v["modality"], v["file"], v["info"]) for name, v in volumes.items()]
        return {"pretrain_data.json": pretrain_data(801, COHORT, entries, semi_synthetic_sentence(count))}

    return write_dataset(folder, {"data": "torso cohort", "count": count, "seed": seed}, jobs, metadata, workers)


def write_dataset_901(raw_root: Path | str, train: int = 6, test: int = 4, seed: int = 0, workers: int = 2) -> dict[str, Any]:
    """Labelled volumes derived from the abdominal CT alone: a smoke set, not a benchmark.

    Args:
        raw_root: nnUNet_raw.
        train, test: volumes; train at least 2.
    """
    description = (
        f"{semi_synthetic_sentence(train + test)}. Smoke set: training and test volumes are deformations of one abdominal CT; "
        f"the labels are pseudo-labels of a segmentation model, merged to {len(ORGANS)} classes."
    )

    def volume(index: int) -> tuple[np.ndarray, np.ndarray, Geometry]:
        derived = derive_volume(seed, index, "abdomen_ct", stream="organs", pseudo_mr=0.0)
        return derived.image, merge_organs(derived.labels), derived.geometry

    settings = {"data": "torso organs", "train": train, "test": test, "seed": seed}
    return _write_nnunet(Path(raw_root) / ORGAN_SET, "torso", settings, {"background": 0, **ORGANS}, description, "CT", volume, train, test, workers)


def write_dataset_802(
    raw_root: Path | str,
    count: int = 24,
    seed: int = 0,
    size: int = 64,
    spacing: float = 3.0,
    workers: int = 2,
    modalities: Sequence[str] = ("CT", "MR"),
) -> dict[str, Any]:
    """Unlabelled phantoms, every one its own subject.

    Args:
        raw_root: nnssl_raw.
        count: volumes.
        size: voxels per axis.
        spacing: mm.
        modalities: of the volumes, in turn.
    """
    names = [f"phantom_{index:04d}" for index in range(count)]
    each = [modalities[index % len(modalities)] for index in range(count)]
    files = [f"images/{name}.nii.gz" for name in names]
    jobs = []
    for index in range(count):

        def image(index: int = index) -> tuple[np.ndarray, Geometry]:
            phantom = make_phantom(seed, index, (size,) * 3, (spacing,) * 3, each[index])
            return rounded(phantom.image), phantom_geometry(phantom)

        jobs.append((files[index], image))

    def metadata() -> dict[str, Any]:
        entries = [(name, "phantom", "scan_0", modality, file, {"synthetic": True}) for name, modality, file in zip(names, each, files, strict=True)]
        return {"pretrain_data.json": pretrain_data(802, PHANTOM_COHORT, entries, f"{count} procedural phantoms")}

    settings: dict[str, Any] = {"data": "phantom cohort", "count": count, "seed": seed, "size": size, "spacing": spacing}
    if tuple(modalities) != ("CT", "MR"):  # records of data sets that are already there name none
        settings["modalities"] = list(modalities)
    return write_dataset(Path(raw_root) / PHANTOM_COHORT, settings, jobs, metadata, workers)


def write_dataset_902(
    raw_root: Path | str, train: int = 8, test: int = 8, seed: int = 0, modality: str = "CT", size: int = 64, spacing: float = 3.0, workers: int = 2
) -> dict[str, Any]:
    """Labelled phantoms; training, test and the unlabelled cohort 802 have no subject in common.

    Args:
        raw_root: nnUNet_raw.
        train, test: volumes; train at least 2.
        modality: of all volumes.
        size: voxels per axis.
        spacing: mm.
    """

    def volume(index: int) -> tuple[np.ndarray, np.ndarray, Geometry]:
        phantom = make_phantom(seed, 2 * _TEST_INDEX + index, (size,) * 3, (spacing,) * 3, modality)
        return phantom.image, phantom.labels, phantom_geometry(phantom)

    settings = {"data": "phantom organs", "train": train, "test": test, "seed": seed, "modality": modality, "size": size, "spacing": spacing}
    description = f"{train + test} procedural phantoms; every volume is another subject."
    return _write_nnunet(Path(raw_root) / PHANTOM_SET, "phantom", settings, LABELS, description, modality, volume, train, test, workers)


def _derived_image(seed: int, index: int, entry: dict[str, Any]) -> Callable[[], tuple[np.ndarray, Geometry]]:
    def image() -> tuple[np.ndarray, Geometry]:
        derived: DerivedVolume = derive_volume(seed, index)
        entry.update(modality=derived.modality, info={"semi_synthetic": True, "contrast_remapped": derived.pseudo})
        return rounded(derived.image), derived.geometry

    return image


def _write_nnunet(
    folder: Path,
    case: str,
    settings: Mapping[str, Any],
    labels: Mapping[str, int],
    description: str,
    modality: str,
    volume: Callable[[int], tuple[np.ndarray, np.ndarray, Geometry]],
    train: int,
    test: int,
    workers: int,
) -> dict[str, Any]:
    if train < 2:
        raise UserError("a labelled data set needs at least 2 training volumes", folder, "raise the number of training volumes")
    training = [f"{case}_{index:04d}" for index in range(train)]
    cases = [(name, "Tr", index) for index, name in enumerate(training)]
    cases += [(f"{case}_test_{index:04d}", "Ts", _TEST_INDEX + index) for index in range(test)]
    jobs: list[Job] = []
    for name, part, index in cases:
        made: dict[str, tuple[np.ndarray, np.ndarray, Geometry]] = {}

        def image(index: int = index, made: dict[str, Any] = made) -> tuple[np.ndarray, Geometry]:
            made["volume"] = volume(index)
            return rounded(made["volume"][0]), made["volume"][2]

        def label(made: dict[str, Any] = made) -> tuple[np.ndarray, Geometry]:
            _, array, geometry = made.pop("volume")
            return array, geometry

        jobs += [(f"images{part}/{name}_0000.nii.gz", image), (f"labels{part}/{name}.nii.gz", label)]

    def metadata() -> dict[str, Any]:
        held_out = max(1, train // 4)
        return {
            "splits_final.json": [{"train": training[:-held_out], "val": training[-held_out:]}],
            "dataset.json": {
                "name": folder.name.split("_", 1)[1],
                "description": description,
                "channel_names": {"0": modality},
                "labels": dict(labels),
                "numTraining": train,
                "file_ending": ".nii.gz",
            },
        }

    return write_dataset(folder, settings, jobs, metadata, workers, files_per_task=2)


def write_dataset(
    folder: Path, settings: Mapping[str, Any], jobs: Sequence[Job], metadata: Callable[[], dict[str, Any]], workers: int, files_per_task: int = 1
) -> dict[str, Any]:
    """Write all files of a data set, each atomically, its record last; a finished data set with the same settings is kept."""
    settings = {**settings, "version": _VERSION}
    summary = {"id": int(folder.name[7:10]), "name": folder.name, "folder": str(folder), "volumes": len(jobs) // files_per_task}
    if _finished(folder, settings):
        return {**summary, "written": False}
    tasks = [jobs[i : i + files_per_task] for i in range(0, len(jobs), files_per_task)]
    with FolderLock(folder):
        volumes = [file for name in ("images", *FOLDERS) for file in (folder / name).glob("*.nii.gz")]
        if volumes and not (folder / _RECORD).is_file():
            raise UserError("the folder holds volumes that this program did not write", folder, "move the folder away or choose another root")
        write_json(folder / _RECORD, {"settings": settings, "sha256": None})  # null until finished
        for stale in volumes:  # of former settings, or of a run that was stopped
            stale.unlink()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(lambda task: _write_volumes(folder, task), tasks))
        contents = metadata()
        for file, content in contents.items():
            write_json(folder / file, content)
        hashes = {file: sha256_file(folder / file) for file in [*contents, *(file for file, _ in jobs)]}
        write_json(folder / _RECORD, {"settings": settings, "sha256": hashes, "data_sha256": sha256_json(hashes)})
    return {**summary, "written": True}


def _finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    if not (folder / _RECORD).is_file():
        return False
    try:
        record = read_json(folder / _RECORD)
    except UserError:
        return False
    if record.get("settings") != settings or not record.get("sha256"):
        return False
    return all((folder / file).is_file() and sha256_file(folder / file) == digest for file, digest in record["sha256"].items())


def _write_volumes(folder: Path, task: Sequence[Job]) -> None:
    for file, make in task:
        _write_volume(folder / file, *make())


def _write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a NIfTI file atomically."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    write_image(path, image, "a volume")


def rounded(image: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(image), -32768, 32767), np.int16)


def phantom_geometry(phantom: Phantom) -> Geometry:
    return Geometry(phantom.image.shape, phantom.spacing)


def pretrain_data(number: int, name: str, entries: Sequence[tuple[str, str, str, str, str, dict[str, Any]]], information: str) -> dict[str, Any]:
    """nnssl's description of a collection from (subject, source data set, session, modality, file, information) of every volume."""
    datasets: dict[str, Any] = {}
    for subject, source, session, modality, file, info in entries:
        dataset = datasets.setdefault(
            source, {"dataset_index": source, "name": source, "dataset_info": {"description": information, "labels": "none"}, "subjects": {}}
        )
        person = dataset["subjects"].setdefault(subject, {"subject_id": subject, "subject_info": None, "sessions": {}})
        image = {"name": Path(file).name, "modality": modality, "image_path": f"${RAW}/{name}/{file}", "image_info": info, "associated_masks": None}
        visit = person["sessions"].setdefault(session, {"session_id": session, "session_info": None, "images": []})
        visit["images"].append(image)
    return {"collection_index": number, "collection_name": name, "datasets": datasets}
