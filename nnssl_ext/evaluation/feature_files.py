"""Dense features of image files: which images make a case, and what is written of each."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, write_json
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.features import Extractor, FeatureMap, PrincipalComponents
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.io.bids import is_bids
from nnssl_ext.io.case import ENDINGS, Case, join_name, split_selector, stem
from nnssl_ext.io.index import read_index
from nnssl_ext.io.itk import write_image
from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.preprocessor import Preprocessor, load
from nnssl_ext.trainers.colours import pca_rgb
from nnssl_ext.trainers.pictures import blend, draw_volumes

FORMATS = {"npz": ".npz", "nifti": ".nii.gz"}
SAMPLES = 8192  # cells of a case, at most, that principal components are fitted to
_SHOWN = 256  # voxels of a picture's longest edge, about
_INDEXES = ("pretrain_data.json", "dataset.json", "cases.csv")
_CHANNEL = re.compile(r"(.+)_(\d{4})")


def find_cases(sources: Sequence[Path], pretrained: Pretrained, modalities: Sequence[str] = ()) -> list[Case]:
    """The cases that paths stand for, sorted by identifier; nothing is read but names and indexes.

    Args:
        sources: an image (also `folder#SERIES_UID`, `file.h5#dataset`); a folder of images; whatever `read_index` knows; `imagesTs/CASE` for
            `imagesTs/CASE_0000.nii.gz`, ... Where the network has several channels, images are grouped by nnU-Net's names.
        pretrained: its plan knows channels and modalities.
        modalities: of each channel, for images that no index describes; none are needed where the plan knows one modality only.

    Raises:
        UserError: a path that doesn't exist, a folder without images, two cases of one name, modalities that are unknown or not given.
    """
    names = _modalities(pretrained, modalities)
    cases = [case for source in sources for case in _cases_of(source, pretrained.channels, names)]
    if not all(case.modalities for case in cases):
        what = f"the plan knows the modalities {', '.join(pretrained.config.normalization)}, and nothing tells that of the images"
        raise UserError(what, "option -modality", "name that of each channel")
    twice = [name for name, count in Counter(case.identifier for case in cases).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} names stand for several images: {', '.join(twice[:5])}", "option -i", "give them in separate runs, or rename them")
    return sorted(cases, key=lambda case: case.identifier)


def _modalities(pretrained: Pretrained, given: Sequence[str]) -> tuple[str, ...]:
    """Of each channel: what the user says, else the only one that the plan knows; empty where only an index can tell."""
    known = list(pretrained.config.normalization)
    if given and (len(given) != pretrained.channels or set(given) - set(known)):
        what = f"'{' '.join(given)}' doesn't name the modality of each of the {pretrained.channels} channel(s); the plan has: {', '.join(known)}"
        raise UserError(what, "option -modality", "name them as the plan does, in the order of the channels")
    return tuple(given) or (tuple(known) * pretrained.channels if len(known) == 1 else ())


def _cases_of(source: Path, channels: int, modalities: Sequence[str]) -> list[Case]:
    if source.is_dir():
        images = _images(source)
        return (
            read_index(source) if not images or is_bids(source) or any((source / name).is_file() for name in _INDEXES) else _group(images, channels, modalities)
        )
    if not split_selector(source)[0].exists():
        images = [path for path in _images(source.parent) if _case_of(path) == source.name]
        if not images:
            raise UserError("image not found", source, "give an image, a folder of images, or imagesTs/CASE for imagesTs/CASE_0000.nii.gz")
        return _group(images, channels, modalities)
    images = [path for path in _images(source.parent) if _case_of(path) == _case_of(source)] if channels > 1 and _case_of(source) else [source]
    return _group(images, channels, modalities)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.endswith(ENDINGS) and not path.name.startswith(".")) if folder.is_dir() else []


def _case_of(image: Path) -> str:
    """CASE of CASE_0000.nii.gz; "" for another name."""
    match = _CHANNEL.fullmatch(stem(image.name))
    return match[1] if match else ""


def _group(images: Sequence[Path], channels: int, modalities: Sequence[str]) -> list[Case]:
    """A case for each image, or for those that differ in nnU-Net's channel number only."""
    groups: dict[str, list[Path]] = {}
    for path in images:
        name = stem(path.name).removesuffix("_0000") if channels == 1 else _case_of(path) or stem(path.name)
        groups.setdefault(join_name(name), []).append(path)
    return [Case(name, name, "1", tuple(paths), tuple(modalities)) for name, paths in groups.items()]


@dataclass(frozen=True)
class FeatureWriter:
    """Writes the features of cases into a folder.

    Args:
        pretrained: the checkpoint; its plan says how images are preprocessed.
        extractor: with the checkpoint's backbone.
        folder: of all files.
        form: "npz" or "nifti".
        components: write that many principal components, fitted to the bodies of all cases together, instead of the features.
        dtype: number format of features in npz files, "float16" or "float32"; components and NIfTI are float32.
    """

    pretrained: Pretrained
    extractor: Extractor
    folder: Path
    form: str = "npz"
    components: int | None = None
    dtype: str = "float16"

    def run(self, cases: Sequence[Case]) -> dict[str, str]:
        """Write CASE.npz (or CASE.nii.gz) and CASE.png for every case, then features.json about all of them.

        Returns:
            messages of the cases that failed, by identifier.

        Raises:
            DiskError: the disk is full or failing.
            UserError: more components than features, a folder that can't be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder can't be made: {error.strerror or error}", self.folder, "check the path and its permissions") from error
        names = [case.identifier for case in cases]
        if self.components is None:
            done, failed = run_all(self._write_features, cases, names, Workers(), "features")
            about: dict[str, Any] = {"components": None}
        else:
            with tempfile.TemporaryDirectory(prefix=".features_", dir=self.folder) as store:
                done, failed = run_all(partial(self._keep, Path(store)), list(enumerate(cases)), names, Workers(), "features")
                about = {"components": self._write_components(Path(store), done) if done else None}
        about |= {"checkpoint": str(self.pretrained.path), "identity": self.pretrained.identity, "cases": sorted(done), "nnssl_ext": __version__}
        about |= {"window": self.extractor.size, "overlap": self.extractor.overlap, "zoom": self.extractor.zoom, "cell": self.extractor.cell}
        write_json(self.folder / "features.json", about)
        return failed

    def _write_features(self, case: Case) -> None:
        found = self._extract(case)[0]
        self._write(case.identifier, found, self.dtype)

    def _keep(self, store: Path, numbered: tuple[int, Case]) -> tuple[np.ndarray, Geometry]:
        """Features of some cells of the body (n, C), and where the map lies; the map itself waits on the disk."""
        number, case = numbered
        found, body = self._extract(case)
        np.save(store / f"{case.identifier}.npy", found.values)
        inside = np.flatnonzero(body)
        chosen = np.sort(sample_rng(0, number, "feature cells").permutation(inside)[:SAMPLES])
        return found.values.reshape(len(found.values), -1)[:, chosen].T, found.geometry

    def _write_components(self, store: Path, kept: dict[str, tuple[np.ndarray, Geometry]]) -> list[float]:
        """Project what `_keep` left; gives the share of the variance along each component."""
        assert self.components is not None
        fitted = PrincipalComponents.fit(np.concatenate([samples for samples, _ in kept.values()]), self.components)
        for name, (_, geometry) in kept.items():
            self._write(name, FeatureMap(fitted.project(np.load(store / f"{name}.npy")), geometry, self.extractor.cell), "float32")
        return [float(share) for share in fitted.explained]

    def _extract(self, case: Case) -> tuple[FeatureMap, np.ndarray]:
        """Features of a case and which cells are body, bool (d, h, w); draws its picture."""
        found, body, image, geometry = extract(case, self.pretrained, self.extractor)
        draw(self.folder / f"{case.identifier}.png", image, geometry, found, body)
        return found, body

    def _write(self, name: str, found: FeatureMap, dtype: str) -> None:
        path = self.folder / (name + FORMATS[self.form])
        write_nifti(path, found) if self.form == "nifti" else write_npz(path, found, dtype)


def extract(case: Case, pretrained: Pretrained, extractor: Extractor) -> tuple[FeatureMap, np.ndarray, np.ndarray, Geometry]:
    """The features of a case, preprocessed as for the pretraining; which cells are body, bool (d, h, w); the first channel's voxels and where they lie.

    Raises:
        UserError: unreadable or other images than the network takes.
    """
    if len(case.images) != pretrained.channels:
        what = f"the case has {len(case.images)} image(s), the network takes {pretrained.channels} channel(s)"
        raise UserError(what, case.images[0], "name the channels CASE_0000, CASE_0001, ..., or use another checkpoint")
    loaded = load(case).cropped()
    finished = Preprocessor(pretrained.config).finish(loaded)
    geometry = Geometry.from_dict(finished.info["stored"])
    found = extractor.features(finished.array, geometry, finished.info["fill"])
    if not np.isfinite(found.values).all():
        raise UserError("the features hold NaN or infinity", case.images[0], "look at the image, or use another checkpoint")
    body = loaded.body[np.ix_(*(_nearest(n, extent, old) for n, extent, old in zip(found.geometry.shape, _extents(found, geometry), loaded.body.shape)))]
    return found, body if body.any() else np.ones_like(body), finished.array[0], geometry


def _extents(found: FeatureMap, geometry: Geometry) -> list[float]:
    """Cells of a map over the length of its volume, by axis; the last cell may count in part."""
    return [n * mm / edge for n, mm, edge in zip(geometry.shape, geometry.spacing, found.geometry.spacing)]


def _nearest(new: int, extent: float, old: int) -> np.ndarray:
    """Of `old` points that share an axis evenly, those at the middles of `new` cells, of which `extent` share the axis."""
    at: np.ndarray = ((np.arange(new) + 0.5) / extent * old).astype(int).clip(0, old - 1)
    return at


def write_npz(path: Path, found: FeatureMap, dtype: str = "float32") -> None:
    """Write a map: features (C, d, h, w); spacing (mm, (z, y, x)), origin and direction of the cells as in `Geometry`; cell (voxels, (z, y, x)).

    Raises:
        UserError: values that float16 can't hold.
    """
    if dtype == "float16" and abs(found.values).max() > np.finfo(np.float16).max:
        raise UserError(f"float16 can't hold features up to {abs(found.values).max():g}", "option -dtype", "use float32")
    where: dict[str, Any] = {key: np.asarray(getattr(found.geometry, key), float) for key in ("spacing", "origin", "direction")}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, features=found.values.astype(dtype), cell=np.asarray(found.cell), **where)


def read_npz(path: Path) -> FeatureMap:
    """What `write_npz` wrote, as float32."""
    with np.load(path) as content:
        values = content["features"].astype(np.float32)
        spacing, origin, direction = (tuple(content[key].tolist()) for key in ("spacing", "origin", "direction"))
        return FeatureMap(values, Geometry(values.shape[1:], spacing, origin, direction), tuple(content["cell"].tolist()))


def write_nifti(path: Path, found: FeatureMap) -> None:
    """Write a map as 4-D NIfTI, channels last, that lies over its image in a viewer; SimpleITK goes by the suffix, so it writes in a folder of its own.

    Raises:
        UserError: the file can't be written.
    """
    direction = np.eye(4)
    direction[:3, :3] = np.reshape(found.geometry.direction, (3, 3))
    image = SimpleITK.GetImageFromArray(found.values, isVector=False)
    image.SetSpacing((*found.geometry.spacing[::-1], 1.0))
    image.SetOrigin((*found.geometry.origin, 0.0))
    image.SetDirection(direction.flatten().tolist())
    write_image(path, image, "the features")


def draw(path: Path, image: np.ndarray, geometry: Geometry, found: FeatureMap, body: np.ndarray) -> None:
    """Picture of a volume (z, y, x), and over it the three principal components of the features of the body as colours."""
    tokens = torch.from_numpy(found.values[:, body])[None, :, :, None, None]
    colours = np.zeros((*body.shape, 3), np.float32)
    colours[body] = pca_rgb(tokens)[0, :, 0, 0]
    step = max(1, -(-max(image.shape) // _SHOWN))
    shown = image[::step, ::step, ::step]
    at = [
        np.minimum((np.arange(0, n, step) + 0.5) / n * extent, cells - 1).astype(int)
        for n, extent, cells in zip(image.shape, _extents(found, geometry), body.shape)
    ]
    rows = {"image": shown, "features (PCA)": blend(shown, colours[np.ix_(*at)])}
    edges = " x ".join(f"{mm:.3g}" for mm in found.geometry.spacing)
    draw_volumes([rows], path, f"{path.stem}, cells of {edges} mm", geometry.spacing)
