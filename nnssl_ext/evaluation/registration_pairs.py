"""The pairs of images that a registration is evaluated on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation import segmentation_metrics
from nnssl_ext.io.case import stem
from nnssl_ext.preprocessing.preprocessor import same_grid

ONE = ("name", "fixed", "moving", "field")  # keys with one value
BOTH = ("labels", "masks", "keypoints", "features", "modalities")  # keys with a value for the fixed and one for the moving image
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pair:
    """Two images and what is known of each, (fixed, moving); all but the images may be missing.

    Args:
        name: of its folder.
        images: the two.
        labels: label maps, each on the grid of its image.
        masks: of the region that matters, on the same grids.
        keypoints: CSV files of corresponding points: world (x, y, z) in mm a row, as SimpleITK counts; a line of names may come first.
        features: what `nnssl_features` wrote of the two, as npz.
        modalities: of the two, where the checkpoint's plan knows several.
        field: the true displacement, in the form of disp.nii.gz (see `registration_files`), on the grid of the fixed image.
    """

    name: str
    images: tuple[Path, Path]
    labels: tuple[Path, Path] | None = None
    masks: tuple[Path, Path] | None = None
    keypoints: tuple[Path, Path] | None = None
    features: tuple[Path, Path] | None = None
    modalities: tuple[str, str] | None = None
    field: Path | None = None


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON file: a list of objects with "fixed" and "moving", perhaps "name" and "field", and two values each of `BOTH`.

    Paths are relative to the file. Without a name a pair is called FIXED_MOVING.

    Raises:
        UserError: unreadable, another structure, or a name twice.
    """
    if not path.is_file():
        raise UserError("there is no list of pairs", path, 'write a JSON file: [{"fixed": "a.nii.gz", "moving": "b.nii.gz"}, ...]')
    content = read_json(path)
    if not (isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content)):
        raise UserError("the file is no list of pairs", path, 'write [{"fixed": "a.nii.gz", "moving": "b.nii.gz"}, ...]')
    pairs = [_pair(entry, number, path) for number, entry in enumerate(content, 1)]
    twice = [name for name, count in Counter(pair.name for pair in pairs).items() if count > 1]
    if twice:
        raise UserError(f"several pairs are called {twice[0]}", path, 'give each another "name"')
    return pairs


def _pair(entry: dict[str, Any], number: int, path: Path) -> Pair:
    unknown = sorted(set(entry) - {*ONE, *BOTH})
    if unknown:
        raise UserError(f"pair {number} has the unknown key '{unknown[0]}'", path, f"known: {', '.join((*ONE, *BOTH))}")
    if not all(isinstance(entry.get(key), str) for key in ("fixed", "moving")):
        raise UserError(f"pair {number} doesn't name its two images", path, 'give it "fixed" and "moving"')
    values: dict[str, Any] = {"field": path.parent / str(entry["field"])} if entry.get("field") else {}
    for key in BOTH:
        value = entry.get(key)
        if value is not None:
            if not (isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)):
                raise UserError(f'"{key}" of pair {number} is no list of two', path, "give one for the fixed and one for the moving image")
            values[key] = tuple(value) if key == "modalities" else (path.parent / value[0], path.parent / value[1])
    images = path.parent / entry["fixed"], path.parent / entry["moving"]
    name = str(entry.get("name") or "_".join(stem(image.name) for image in images))
    if not name.strip(".") or "/" in name:
        raise UserError(f"'{name}' of pair {number} is no name of a folder", path, "use letters, digits, _ and -")
    return Pair(name, images, **values)


def both(read: Callable[[Path, Geometry], _T], files: tuple[Path, Path] | None, geometries: tuple[Geometry, Geometry]) -> tuple[_T, _T] | None:
    """What is read of the two files, for the two images' grids; None without files."""
    return None if files is None else (read(files[0], geometries[0]), read(files[1], geometries[1]))


def read_labels(path: Path, geometry: Geometry) -> np.ndarray:
    """A label map or mask, int32 (z, y, x).

    Raises:
        UserError: unreadable, no label map, or on another grid than the image.
    """
    labels, other = segmentation_metrics.read_labels(path)
    if not same_grid(geometry, other):
        raise UserError("the label map isn't on the grid of its image", path, "resample it, or take it out of the pairs")
    return labels


def read_keypoints(path: Path) -> np.ndarray:
    """Points (n, 3), world (x, y, z) in mm.

    Raises:
        UserError: unreadable or other than three numbers a row.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        named = bool(lines) and any(character.isalpha() and character not in "eE" for character in lines[0])
        points = np.array([[float(value) for value in line.split(",")] for line in lines[named:]])
    except (OSError, ValueError) as error:
        raise UserError(f"the keypoints can't be read: {error}", path, "write x,y,z in mm, a point a line") from None
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise UserError("the keypoints are not three numbers a line", path, "write x,y,z in mm, a point a line")
    return points
