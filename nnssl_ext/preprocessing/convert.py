"""A dataset in any layout -> a raw dataset folder: images checked, then copied or written, labels beside them."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from nnssl_ext.core.errors import ImageError, UserError
from nnssl_ext.core.files import FolderLock, atomic_path, write_text
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.paths import raw_folder
from nnssl_ext.io.case import ENDINGS, MASKS, Case
from nnssl_ext.io.layouts import Entry, Source
from nnssl_ext.io.raw_dataset import TEST, TRAINING, UNLABELLED, Record, claim, indexes, load, load_all, remove, save, write_image, write_indexes, write_nifti
from nnssl_ext.io.readers import files_of, read_case, read_header, read_volume, stamps
from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.preprocessor import same_grid

COPIED = (".nii.gz", ".nii", ".nrrd", ".mha")  # whole images in one file, which nnU-Net reads as they are
BYTES_PER_VOXEL = 16  # peak memory of a case, per channel or label; up to 10 were measured, without what SimpleITK takes
_SCRATCH = ".split-"


def convert(source: Source, dataset_name: str, settings: Mapping[str, Any], workers: Workers, wanted: str | None = None) -> dict[str, str]:
    """Write all cases of a source into `nnssl_raw/DATASET_NAME`; finished cases whose files did not change are skipped.

    Files that nnU-Net can read are copied byte by byte. They are not linked: a link would let whoever edits the dataset
    change the source, and an archive that is unmounted or cleaned up would take the dataset with it.

    Args:
        source: what to convert.
        dataset_name: `DatasetXXX_NAME`.
        settings: what decides the result; a folder that was begun with others is refused.
        workers: who does the work.
        wanted: format of the index, see `raw_dataset.indexes`.

    Returns:
        messages of the cases that failed, by identifier.

    Raises:
        UserError: the folder holds something else, or the cases don't fit the wanted index.
        DiskError: the disk is full or failing.
    """
    indexes([entry.case.modalities for entry in source.entries], wanted)
    folder, ending = raw_folder(dataset_name), _ending(source)
    labelled = any(entry.label for entry in source.entries if not entry.test)
    with FolderLock(folder):
        claim(folder, settings)
        for abandoned in folder.glob(f"{_SCRATCH}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        items = [(entry, _record(entry, ending, labelled)) for entry in source.entries]
        waiting = [(entry, record) for entry, record in items if not _is_current(folder, record)]
        if len(waiting) < len(items):
            print(f"{dataset_name}: {len(items) - len(waiting)} of {len(items)} cases are finished already")
        gone = sorted({record.identifier for record in load_all(folder)} - {record.identifier for _, record in items})
        if gone:
            print(f"{dataset_name}: {len(gone)} converted cases are no longer in the source and stay: {', '.join(gone[:5])}")
        work = partial(_convert, source=dataclasses.replace(source, entries=[]), folder=folder)
        failed = run_all(work, waiting, [record.identifier for _, record in waiting], workers, f"converting {dataset_name}", _memory)[1]
        write_indexes(folder, ending, source.description, wanted)
        _write_classes(folder)
    return failed


def _ending(source: Source) -> str:
    """The ending that all files have already if every one can be copied, else `.nii.gz`; nnU-Net wants one for all."""
    paths = [path for entry in source.entries for path in (*entry.case.images, *_beside(entry))]
    found = {next((ending for ending in ENDINGS if path.name.endswith(ending)), "") for path in paths}
    copied = len(found) == 1 and found <= set(COPIED) and not source.relabel and not any(_is_4d(entry.case) for entry in source.entries)
    return found.pop() if copied and all(files_of(path) == [path] for path in paths) else ".nii.gz"


def _beside(entry: Entry) -> list[Path]:
    """Label and masks of an entry."""
    return [path for path in (entry.label, *(getattr(entry.case, name) for name in MASKS)) if path is not None]


def _is_4d(case: Case) -> bool:
    return len(case.modalities) > len(case.images)


def _record(entry: Entry, ending: str, labelled: bool) -> Record:
    """What will be known of a case when it is finished, but for the values of its label.

    Args:
        entry: the case.
        ending: of all files.
        labelled: some of the training cases have labels, so that those without are kept apart.
    """
    case, name = entry.case, entry.case.identifier
    subfolder = TEST if entry.test else TRAINING if entry.label or not labelled else UNLABELLED
    return Record(
        identifier=name,
        subject=case.subject,
        session=case.session,
        modalities=list(case.modalities),
        images=[f"{subfolder}/{name}_{channel:04d}{ending}" for channel in range(len(case.modalities))],
        source=stamps((*entry.case.images, *_beside(entry))),
        label=f"labels{subfolder.removeprefix('images')}/{name}{ending}" if entry.label else "",
        masks={key: f"masks/{name}_{key}{ending}" for key in MASKS if getattr(case, key) is not None},
        category=entry.category,
        fold=entry.fold,
    )


def _is_current(folder: Path, record: Record) -> bool:
    known = load(folder, record.identifier)
    return known is not None and dataclasses.replace(known, label_values=[]) == record


def _memory(item: tuple[Entry, Record]) -> int:
    """Peak memory in bytes; 0 for a case whose header can't be read, since it will fail at once."""
    entry = item[0]
    try:
        path = entry.case.images[0]
        image: Any = nibabel.load(path) if _is_4d(entry.case) else read_header(path)
        shape = image.shape[:3]
    except (UserError, OSError, nibabel.filebasedimages.ImageFileError):
        return 0
    return BYTES_PER_VOXEL * (len(entry.case.modalities) + (entry.label is not None)) * math.prod(shape)


def _convert(item: tuple[Entry, Record], source: Source, folder: Path) -> None:
    """Convert one case; nothing of it is written before all its files are read.

    Raises:
        UserError: an unreadable image, label or mask, or one on another grid.
    """
    entry, record = item
    for stale in (load(folder, record.identifier), record):
        if stale is not None:
            remove(folder, stale)
    case = entry.case
    if not _is_4d(case):
        _write(entry, record, source, folder)
        return
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        images = split_4d(case.images[0], len(case.modalities), Path(scratch))
        _write(dataclasses.replace(entry, case=dataclasses.replace(case, images=images)), record, source, folder)


def _write(entry: Entry, record: Record, source: Source, folder: Path) -> None:
    """Check all images of an entry, then write them as its record says."""
    array, geometry = read_case(entry.case)
    label, values = (None, []) if entry.label is None else _read_label(entry.label, geometry, source)
    masks = {key: _read_on(getattr(entry.case, key), geometry) for key in record.masks}
    for path, target, volume in zip(entry.case.images, record.images, array):
        _place(path, folder / target, volume, geometry)
    if label is not None:
        _place(None if source.relabel else entry.label, folder / record.label, label, geometry)
    for key, mask in masks.items():
        _place(getattr(entry.case, key), folder / record.masks[key], mask, geometry)
    save(folder, dataclasses.replace(record, label_values=values))


def split_4d(path: Path, count: int, folder: Path) -> tuple[Path, ...]:
    """Write the volumes of a 4D NIfTI image as 3D files; number type and position stay as they are, free text in the header is left out.

    Args:
        path: the 4D image.
        count: how many volumes it has to hold.
        folder: where to write them.

    Raises:
        ImageError: unreadable, not 4D, or of another number of volumes.
    """
    try:
        image: Any = nibabel.load(path)
        shape = image.shape
        if len(shape) != 4 or shape[3] != count:
            what = f"the image has the shape {' x '.join(map(str, shape))}, one volume for each of {count} modalities is needed"
            raise ImageError("dimensions", what, path, "check the modalities")
        values = np.asanyarray(image.dataobj)
    except FileNotFoundError:
        raise ImageError("missing", "image file not found", path, "restore the file or take the case out") from None
    except nibabel.filebasedimages.ImageFileError:
        raise ImageError("format", "the 4D image is not a NIfTI file", path, "convert it, or split it into channels") from None
    except (EOFError, OSError, ValueError) as error:
        raise ImageError("truncated", f"the image is truncated or damaged: {str(error)[:120]}", path, "copy or download the file again") from None
    files = []
    for channel in range(count):
        volume = nibabel.Nifti1Image(values[..., channel], image.affine, image.header)
        volume.set_data_dtype(np.float32 if values.dtype.kind == "f" else values.dtype)
        for name in ("descrip", "aux_file", "db_name", "intent_name"):
            volume.header[name] = b""
        volume.header.extensions.clear()
        files.append(folder / f"{channel:04d}.nii.gz")
        write_image(files[-1], volume)
    return tuple(files)


def _read_label(path: Path, geometry: Geometry, source: Source) -> tuple[np.ndarray, list[int]]:
    """A segmentation on the grid of its image, renumbered as the source says, and its values.

    Raises:
        UserError: unreadable, on another grid, values that are no labels or that the description lacks.
    """
    label = _read_on(path, geometry)
    found = np.unique(label)
    if not np.array_equal(found, np.rint(found)) or found[0] < 0:
        raise UserError("the label has values that are no label numbers", path, "restore the file")
    label = np.select([label == old for old in source.relabel], list(source.relabel.values()), label).astype(np.float32) if source.relabel else label
    values = sorted({source.relabel.get(int(value), int(value)) for value in found})
    described = source.description.get("labels")
    if described:
        known = {number for numbers in described.values() for number in (numbers if isinstance(numbers, list) else [numbers])} | {0}
        if not set(values) <= known:
            raise UserError(f"the label has values without a name: {sorted(set(values) - known)}", path, f"known labels: {sorted(known)}")
    return label, values


def _read_on(path: Path, geometry: Geometry) -> np.ndarray:
    """A label or mask as float32 (z, y, x) that lies on the grid `geometry`; it may be constant."""
    try:
        array, other = read_volume(path)
    except ImageError as error:
        if error.kind != "constant":
            raise
        array, other = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat32)), read_header(path)
    if not same_grid(geometry, other):
        raise ImageError("mismatch", "the label or mask is not on the grid of its image", path, "resample it, or take it out")
    return array


def _place(path: Path | None, target: Path, volume: np.ndarray, geometry: Geometry) -> None:
    """Copy a file that has the right format already, else write its voxels."""
    ending = next(ending for ending in COPIED if target.name.endswith(ending))
    if path is not None and path.name.endswith(ending) and files_of(path) == [path]:
        with atomic_path(target) as temporary:
            shutil.copyfile(path, temporary)
    else:
        write_nifti(target, volume, geometry)


def _write_classes(folder: Path) -> None:
    """`classes.csv`: class and fold of every volume, where the source has them."""
    rows = [(record.identifier, record.subject, record.category, record.fold) for record in load_all(folder) if record.category or record.fold]
    if rows:
        write_text(folder / "classes.csv", csv_text(("case", "subject", "class", "fold"), rows))


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
