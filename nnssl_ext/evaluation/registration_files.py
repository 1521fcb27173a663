"""Registers pairs of images by several features and writes fields, warped images, pictures and the table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from torch import Tensor

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_json, write_text
from nnssl_ext.core.geometry import Geometry, resampled_shape
from nnssl_ext.evaluation.cost import COSTS, Cost
from nnssl_ext.evaluation.placement import place, to_index
from nnssl_ext.evaluation.registration import PRESETS, Settings, register_features
from nnssl_ext.evaluation.registration_features import Describer, Images
from nnssl_ext.evaluation.registration_metrics import label_metrics, landmark_errors, regularity
from nnssl_ext.evaluation.registration_pairs import Pair, both, read_keypoints, read_labels
from nnssl_ext.io.itk import write_image
from nnssl_ext.io.readers import read_volume
from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.preprocessor import same_grid
from nnssl_ext.trainers.colours import pca_rgb
from nnssl_ext.trainers.pictures import draw_volumes

INITIAL = "initial"  # the row before any registration
METRICS = ("dice", "hd95_mm", "assd_mm", "tre_mm", "epe_mm", "sd_log_j", "folded", *COSTS)
_SHOWN, _TILES = 128, 8  # voxels of a picture's longest edge and tiles of a checkerboard along it, about
_FIELD = {
    "unit": "mm",
    "components": "x, y, z in the world of SimpleITK (LPS)",
    "meaning": "what is at the world point p of the fixed image is at p + displacement(p) in the moving one; SimpleITK.DisplacementFieldTransform takes it",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class RegistrationRun:
    """Registers pairs by several features.

    Args:
        describe: gives the features.
        kinds: which ones, of `registration_features.KINDS`.
        folder: of all files.
        settings: for all features but MIND-SSC, which has "mind_default".
        mind: its settings.
        spacing: mm at which images are registered, along each axis; None: that of the fixed image.
    """

    describe: Describer
    kinds: Sequence[str]
    folder: Path
    settings: Settings = PRESETS["dinoreg"]
    mind: Settings = PRESETS["mind_default"]
    spacing: float | None = None

    def run(self, pairs: Sequence[Pair]) -> tuple[list[Row], dict[str, str]]:
        """Write FOLDER/PAIR/FEATURES/ for all pairs and features, then results.csv, labels.csv and results.json.

        Returns:
            the mean over pairs of each metric, features by features, and messages of the pairs that failed, by name.

        Raises:
            DiskError: the disk is full or failing.
            UserError: a folder that can't be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder can't be made: {error.strerror or error}", self.folder, "check the path and its permissions") from error
        done, failed = run_all(self._pair, pairs, [pair.name for pair in pairs], Workers(), "registration")
        rows, labels = ([row for name in sorted(done) for row in done[name][part]] for part in (0, 1))
        means = [{"features": kind, **_means([row for row in rows if row["features"] == kind])} for kind in (INITIAL, *self.kinds)] if rows else []
        _write_csv(self.folder / "results.csv", ("pair", "features", *METRICS), rows)
        _write_csv(self.folder / "labels.csv", ("pair", "features", "label", *METRICS[:3]), labels)
        pretrained = self.describe.pretrained
        about: Row = {"checkpoint": pretrained and str(pretrained.path), "identity": pretrained and pretrained.identity, "nnssl_ext": __version__}
        about |= {"settings": asdict(self.settings), "settings_mind": asdict(self.mind), "spacing_mm": self.spacing, "failed": failed}
        write_json(self.folder / "results.json", _finite({**about, "means": means, "pairs": rows, "labels": labels}))
        return means, failed

    def _pair(self, pair: Pair) -> tuple[list[Row], list[Row]]:
        """Rows of the pair, and of its labels."""
        (fixed, where), (moving, there) = (read_volume(path) for path in pair.images)
        geometries = where, there
        images, labels = Images((fixed, moving), geometries, both(read_labels, pair.masks, geometries)), both(read_labels, pair.labels, geometries)
        truth = Truth(where, there, labels, images.masks and images.masks[0] > 0, pair)
        grid = where if self.spacing is None else where.resampled(resampled_shape(where.shape, where.spacing, [self.spacing] * 3))
        rows, label_rows = [], []
        for kind in (INITIAL, *self.kinds):
            displacement, cost = torch.zeros(3, *where.shape), dict.fromkeys(COSTS, math.nan)
            if kind != INITIAL:
                with Cost(self.describe.device) as measured:
                    features = self.describe(kind, pair, images, grid)
                    found = register_features(*features, self.mind if kind == "mind" else self.settings).cpu()
                    displacement = _rescaled(found, grid, where)
                cost = measured.figures()
            row, of_labels = truth.judge(displacement)
            rows.append({"pair": pair.name, "features": kind, **row, **cost})
            label_rows += [{"pair": pair.name, "features": kind, "label": label, **values} for label, values in of_labels.items()]
            if kind != INITIAL:
                folder = self.folder / pair.name / kind
                write_field(folder, displacement, where)
                warped = write_warped(folder, moving, truth, displacement)
                draw_features(folder / "features_pca_rgb.png", features, grid, f"{pair.name}, {kind}")
                before = place(torch.from_numpy(moving)[None], there, where)[0].numpy()
                draw_checkerboard(folder / "checkerboard.png", fixed, before, warped, where, f"{pair.name}, {kind}")
        return rows, label_rows


@dataclass(frozen=True)
class Truth:
    """What is known of a pair: the grids of the two images, label maps, the fixed image's mask."""

    fixed: Geometry
    moving: Geometry
    labels: tuple[np.ndarray, np.ndarray] | None
    mask: np.ndarray | None
    pair: Pair

    def judge(self, displacement: Tensor) -> tuple[Row, dict[int, dict[str, float]]]:
        """Metrics of a displacement (3, z, y, x) in voxels of the fixed image, and those of each label; NaN where nothing is known."""
        of_labels = {} if self.labels is None else label_metrics(self.labels[0], self.warped_labels(displacement), self.fixed.spacing)
        row = {metric: _mean([values[metric] for values in of_labels.values()]) for metric in METRICS[:3]}
        row["tre_mm"] = math.nan
        if self.pair.keypoints is not None:
            fixed, moving = (to_index(read_keypoints(path), self.fixed) for path in self.pair.keypoints)
            if len(fixed) != len(moving):
                raise UserError(f"{len(fixed)} and {len(moving)} keypoints don't correspond", self.pair.keypoints[1], "give as many for both images")
            row["tre_mm"] = float(landmark_errors(fixed, moving, displacement.numpy(), self.fixed.spacing).mean())
        row["epe_mm"] = math.nan
        if self.pair.field is not None:
            away = np.linalg.norm(world_field(displacement, self.fixed) - read_field(self.pair.field, self.fixed), axis=-1)
            row["epe_mm"] = float((away if self.mask is None else away[self.mask]).mean())
        return row | regularity(displacement.numpy(), self.mask), of_labels

    def warped_labels(self, displacement: Tensor) -> np.ndarray:
        """The moving image's labels on the grid of the fixed one, nearest neighbour; 0 beyond the moving image."""
        assert self.labels is not None
        values = torch.from_numpy(self.labels[1].astype(np.float64))[None]  # whole numbers stay exact
        return place(values, self.moving, self.fixed, displacement, "nearest", "zeros")[0].numpy().astype(np.int32)


def _rescaled(displacement: Tensor, grid: Geometry, onto: Geometry) -> Tensor:
    """A displacement in voxels of a grid, on another one with the same axes and in its voxels."""
    if grid == onto:
        return displacement
    mm = displacement * displacement.new_tensor(grid.spacing).view(3, 1, 1, 1)
    return place(mm, grid, onto) / displacement.new_tensor(onto.spacing).view(3, 1, 1, 1)


def world_field(displacement: Tensor, geometry: Geometry) -> np.ndarray:
    """A displacement (3, z, y, x) in voxels as world vectors (z, y, x, 3), mm, (x, y, z)."""
    mm = displacement.numpy().astype(np.float64) * np.reshape(geometry.spacing, (3, 1, 1, 1))
    return np.einsum("ij,jzyx->zyxi", np.reshape(geometry.direction, (3, 3)), mm[::-1])


def read_field(path: Path, geometry: Geometry) -> np.ndarray:
    """World vectors (z, y, x, 3), mm, (x, y, z), as `write_field` writes them.

    Raises:
        UserError: unreadable, no vectors, or on another grid than `geometry`.
    """
    try:
        image = SimpleITK.ReadImage(str(path), SimpleITK.sitkVectorFloat64)
    except RuntimeError as error:
        raise UserError("the displacement can't be read", path, "write it as disp.nii.gz of a registration") from error
    found = SimpleITK.GetArrayFromImage(image)
    if image.GetDimension() != 3 or found.shape != (*geometry.shape, 3):
        raise UserError(f"a displacement of {list(found.shape)} doesn't belong to an image of {list(geometry.shape)}", path, "give one vector for each voxel")
    if not same_grid(geometry, Geometry(found.shape[:3], image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())):
        raise UserError("the displacement isn't on the grid of the fixed image", path, "resample it, or take it out of the pairs")
    return np.asarray(found)


def write_field(folder: Path, displacement: Tensor, geometry: Geometry) -> None:
    """Write disp.nii.gz and what it means, disp.json."""
    _write_itk(folder / "disp.nii.gz", world_field(displacement, geometry).astype(np.float32), geometry, vectors=True)
    write_json(folder / "disp.json", {**_FIELD, **geometry.as_dict()})


def write_warped(folder: Path, moving: np.ndarray, truth: Truth, displacement: Tensor) -> np.ndarray:
    """Write the moving image on the grid of the fixed one, warped.nii.gz, and its labels, warped_label.nii.gz; returns the first."""
    warped = place(torch.from_numpy(moving)[None], truth.moving, truth.fixed, displacement)[0].numpy()
    _write_itk(folder / "warped.nii.gz", warped, truth.fixed)
    if truth.labels is not None:
        _write_itk(folder / "warped_label.nii.gz", truth.warped_labels(displacement), truth.fixed)
    return warped


def _write_itk(path: Path, array: np.ndarray, geometry: Geometry, vectors: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array, isVector=vectors)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    write_image(path, image, "the registration")


def draw_features(path: Path, features: tuple[Tensor, Tensor], grid: Geometry, title: str) -> None:
    """Picture of the features of both images: their three directions of most variance, common to both, as colours."""
    step = _step(grid.shape)
    fixed, moving = pca_rgb(torch.stack([values[:, ::step, ::step, ::step] for values in features]))
    draw_volumes([{"fixed": fixed, "moving": moving}], path, title, grid.spacing)


def draw_checkerboard(path: Path, fixed: np.ndarray, before: np.ndarray, after: np.ndarray, geometry: Geometry, title: str) -> None:
    """Picture of tiles that show the fixed and the moving image in turn, before and after the registration."""
    step = _step(geometry.shape)
    images = [_grey(image[::step, ::step, ::step]) for image in (fixed, before, after)]
    edge = max(1, max(images[0].shape) // _TILES)
    odd = sum(np.ogrid[tuple(slice(n) for n in images[0].shape)][axis] // edge for axis in range(3)) % 2 == 1
    draw_volumes([{"before": np.where(odd, images[1], images[0]), "after": np.where(odd, images[2], images[0])}], path, title, geometry.spacing)


def _step(shape: Sequence[int]) -> int:
    return max(1, -(-max(shape) // _SHOWN))


def _grey(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, (1, 99))
    return np.asarray(np.clip((image - low) / max(high - low, 1e-6), 0, 1))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _means(rows: Sequence[Row]) -> Row:
    return {metric: _mean([row[metric] for row in rows]) for metric in METRICS}


def _finite(content: Any) -> Any:
    """The same with None for NaN, which JSON doesn't have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()} for row in rows])
    write_text(path, text.getvalue())


def table(means: Sequence[Row]) -> str:
    """The mean over pairs of each metric as text, a line for each kind of features; "-" where nothing is known."""
    lines = [["features", *METRICS]] + [[row["features"], *("-" if math.isnan(row[metric]) else f"{row[metric]:.4g}" for metric in METRICS)] for row in means]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
