"""Clusters of the voxels of a preprocessed dataset in the feature space of a pretrained backbone.

Shape suffixes: C channels of the features, N principal components, K clusters.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, atomic_path, sha256_json
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.evaluation.features import Extractor, FeatureMap, PrincipalComponents
from nnssl_ext.evaluation.upsample import Upsampler
from nnssl_ext.preprocessing.clusters import are_current, read_model, write_labels
from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.store import BODY_CELL, CaseStore
from nnssl_ext.trainers.colours import label_rgb
from nnssl_ext.trainers.pictures import blend, draw_volumes

VOXELS, COMPONENTS = 2_000_000, 64  # of all cases that the clusters are fitted to; principal components, both at most
_FOR_COMPONENTS = 65_536  # of these voxels that the components are fitted to, about
_AT_ONCE = 2**18  # voxels that are interpolated together
_BATCH = 2**14  # voxels of an iteration of k-means
_DRAWN, _SHOWN = 20, 256  # cases that get a picture; voxels of a picture's longest edge, about


@dataclass(frozen=True)
class ClusterModel:
    """What assigns a voxel to a cluster: that whose centre is nearest to its features, projected to their principal components.

    Args:
        components: of the features, C to N.
        centres: (K, N) float32, of the largest cluster first.
        settings: how it was made, in JSON types; "checkpoint" (identity of the backbone), "window", "overlap" and "upsampling" say how it is applied.
    """

    components: PrincipalComponents
    centres: np.ndarray
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        """Hexadecimal SHA-256 of arrays and settings."""
        arrays = {name: [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()] for name, array in self._arrays().items()}
        return sha256_json([arrays, self.settings])

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"centres": self.centres, **{name: getattr(self.components, name) for name in ("mean", "directions", "explained")}}

    def save(self, path: Path, checkpoint: Path) -> None:
        """Write it to an npz file, with the path of the checkpoint, which is no part of its identity."""
        texts = {"identity": self.identity, "settings": json.dumps(self.settings), "path": str(checkpoint.resolve())}
        content: dict[str, Any] = {**self._arrays(), **{name: np.array(text) for name, text in texts.items()}}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **content)

    @staticmethod
    def load(path: Path) -> tuple[ClusterModel, Path]:
        """A model and the path of its checkpoint.

        Raises:
            UserError: there is none, or the file is damaged.
        """
        content = read_model(path)
        try:
            components = PrincipalComponents(content["mean"], content["directions"], content["explained"])
            model = ClusterModel(components, content["centres"], json.loads(str(content["settings"])))
            if model.identity != str(content["identity"]):
                raise ValueError("its hash differs from the recorded one")
            return model, Path(str(content["path"]))
        except (KeyError, ValueError) as error:
            raise UserError(f"the cluster model is damaged: {error}", path, "fit it again with nnssl_cluster fit") from None

    def labels(self, found: FeatureMap, volume: np.ndarray, body: np.ndarray) -> np.ndarray:
        """Clusters of the voxels of a volume, 1 to K; 0 outside of the body.

        |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2): the nearest centre has the largest x c - |c|^2 / 2, which is affine in the features and
        therefore the same whether features or these K scores are interpolated; the scores are fewer.

        Args:
            found: features of the volume.
            volume: (channels, z, y, x).
            body: bool (z, y, x).

        Returns:
            (z, y, x) int64.
        """
        components = self.components.project(found.values)
        scores = np.tensordot(self.centres, components, 1) - (self.centres.astype(np.float64) ** 2).sum(1)[:, None, None, None] / 2
        upsampler = upsampler_of(self.settings["upsampling"], found, volume)
        labels, maps, inside = np.zeros(volume[0].size, np.int64), torch.from_numpy(scores.astype(np.float32)), np.flatnonzero(body)
        for start in range(0, len(inside), _AT_ONCE):
            points = inside[start : start + _AT_ONCE]
            labels[points] = 1 + upsampler(maps, torch.from_numpy(points)).argmax(0).numpy()
        return labels.reshape(body.shape)


def upsampler_of(name: str, found: FeatureMap, volume: np.ndarray) -> Upsampler:
    """ "trilinear" or "bilateral" interpolation of the features of a volume (channels, z, y, x)."""
    return Upsampler(volume.shape[1:], found.cell, volume if name == "bilateral" else None)


def fit(
    store: CaseStore,
    extractor: Extractor,
    identity: str,
    classes: int = 10,
    upsampling: str = "trilinear",
    seed: int = 0,
    scratch: Path | None = None,
    voxels: int = 0,
) -> ClusterModel:
    """Cluster the body's voxels of all cases.

    Up to `VOXELS` of them (or `voxels`) are drawn, evenly over the bodies of all cases, and all count at once: neither the order of the cases nor that
    of the voxels matters.

    Args:
        identity: of the checkpoint that the extractor's backbone is from.
        classes: K.
        upsampling: from cells to voxels, "trilinear" or "bilateral".
        seed: of the drawn voxels and of the starts of k-means.
        scratch: folder for the features of the drawn voxels; None: the system's.
        voxels: that are drawn at most; 0: `VOXELS`.

    Raises:
        UserError: other channels than the backbone takes, a case that can't be read, no body, fewer different voxels than clusters.
        DiskError: the disk is full or failing.
    """
    if len(store.fill(0)) != extractor.backbone.channels:
        what = f"the cases have {len(store.fill(0))} channel(s), the checkpoint's backbone takes {extractor.backbone.channels}"
        raise UserError(what, "option -ckpt", "give a checkpoint that was pretrained with the channels of this dataset")
    bounds = np.cumsum([0, *(int(body_voxels(store, case).sum()) for case in range(len(store)))])
    total = min(voxels or VOXELS, int(bounds[-1]))
    if total < classes:
        raise UserError(
            f"the bodies of all cases have {total} voxels, too few for {classes} clusters", "option -k", "choose fewer, or look at the dataset's page"
        )
    counts = np.diff([int(bound) * total // int(bounds[-1]) for bound in bounds])
    with tempfile.TemporaryDirectory(prefix=".voxels_", dir=scratch) as folder:
        keep = partial(_keep, store=store, extractor=extractor, upsampling=upsampling, seed=seed, folder=Path(folder))
        drawn = [(case, count) for case, count in enumerate(counts.tolist()) if count]
        failed = run_all(keep, drawn, [store.identifiers[case] for case, _ in drawn], Workers(), "features")[1]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(store)} cases failed", ", ".join(sorted(failed)[:5]), "mend or remove them: nnssl_verify --store checks all"
            )
        parts = [np.load(Path(folder) / f"{case}.npy", mmap_mode="r") for case, _ in drawn]
        some = np.concatenate([part[:: -(-total // _FOR_COMPONENTS)] for part in parts])
        components = PrincipalComponents.fit(some, min(COMPONENTS, *some.shape))
        points = np.concatenate([components.project(part[rows].T).T for part in parts for rows in _parts(len(part))])
    centres, counts, inertia = cluster(points, classes, seed)
    settings = {"checkpoint": identity, "window": list(extractor.size), "overlap": extractor.overlap, "upsampling": upsampling, "seed": seed}
    sizes = {"cases": len(store), "voxels": total, "shares": [round(int(n) / total, 4) for n in counts], "variance": inertia / total}
    return ClusterModel(components, centres, settings | sizes | {"data_hash": store.data_hash()})


def cluster(points: np.ndarray, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """K-means of points (n, N) by mini-batches from the best of five starts by k-means++; on one thread, since sums of several differ.

    Returns:
        centres (K, N) float32, of the largest cluster first; points of each cluster, (K,); sum of the squared distances to the nearest centre.

    Raises:
        UserError: the points fall into fewer clusters.

    Source: Sculley 2010, doi:10.1145/1772690.1772862, as implemented in scikit-learn.
    """
    state = int(sample_rng(seed, 0, "clusters").integers(2**32))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: said below
        found = MiniBatchKMeans(classes, n_init=5, batch_size=_BATCH, random_state=state).fit(points)
        labels = found.predict(points)
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        held = int((counts > 0).sum())
        raise UserError(f"the features fall into {held} clusters, not into {classes}", "option -k", f"choose at most {held}, or another checkpoint")
    inertia = float(((points - found.cluster_centers_[labels]) ** 2).sum(dtype=np.float64))
    order = np.argsort(-counts, kind="stable")
    return found.cluster_centers_[order].astype(np.float32), counts[order], inertia


def assign(store: CaseStore, model: ClusterModel, extractor: Extractor, folder: Path, patch_size: tuple[int, ...]) -> dict[str, str]:
    """Write the labels of every case that has none of this model, or damaged ones, or is another case by now; and pictures of the first cases.

    Args:
        folder: of the labels.
        patch_size: voxels of a training patch, (z, y, x).

    Returns:
        messages of the cases that failed, by identifier.
    """
    names, identity = store.identifiers, model.identity
    with FolderLock(folder):
        waiting = [case for case in range(len(store)) if not are_current(folder, names[case], identity, store.info(case)["sha256"])]
        work = partial(_assign, store=store, model=model, identity=identity, extractor=extractor, folder=folder, patch_size=patch_size)
        return run_all(work, waiting, [names[case] for case in waiting], Workers(), f"clusters ({len(store) - len(waiting)} cases were done before)")[1]


def body_voxels(store: CaseStore, case: int) -> np.ndarray:
    """Which voxels lie in cells of the body, bool (z, y, x)."""
    body, shape = store.body(case), store.shape(case)
    for axis, size in enumerate(shape):
        body = np.repeat(body, BODY_CELL, axis).take(range(size), axis)
    return body


def features_of(store: CaseStore, case: int, extractor: Extractor) -> tuple[np.ndarray, FeatureMap]:
    """A case's voxels (channels, z, y, x) and their features.

    Raises:
        UserError: the case is damaged, or its features are not finite.
    """
    store.verify(case)
    volume = store.read(case)
    found = extractor.features(volume, store.geometry(case), store.fill(case))
    if not np.isfinite(found.values).all():
        raise UserError("the features hold NaN or infinity", store.identifiers[case], "look at the case, or use another checkpoint")
    return volume, found


def _keep(numbered: tuple[int, int], store: CaseStore, extractor: Extractor, upsampling: str, seed: int, folder: Path) -> None:
    """Features (n, C) of n random voxels of a case's body, in CASE NUMBER.npy."""
    case, count = numbered
    volume, found = features_of(store, case, extractor)
    inside = np.flatnonzero(body_voxels(store, case))
    points = np.sort(sample_rng(seed, case, "cluster voxels").choice(inside, count, replace=False, shuffle=False))
    upsampler, maps = upsampler_of(upsampling, found, volume), torch.from_numpy(found.values)
    kept = np.lib.format.open_memmap(folder / f"{case}.npy", "w+", np.float32, (count, len(maps)))
    for rows in _parts(count):
        kept[rows] = upsampler(maps, torch.from_numpy(points[rows])).T


def _assign(case: int, store: CaseStore, model: ClusterModel, identity: str, extractor: Extractor, folder: Path, patch_size: tuple[int, ...]) -> None:
    volume, found = features_of(store, case, extractor)
    labels = model.labels(found, volume, body_voxels(store, case))
    name = store.identifiers[case]
    write_labels(folder, name, labels, identity, store.info(case)["sha256"], patch_size)
    if case < _DRAWN:
        draw(folder / f"{name}.png", volume[0], labels, found.geometry.spacing)


def draw(path: Path, image: np.ndarray, labels: np.ndarray, spacing: tuple[float, ...]) -> None:
    """Picture of a volume (z, y, x), and of its clusters (z, y, x) over it."""
    step = max(1, -(-max(image.shape) // _SHOWN))
    shown, clusters = (volume[::step, ::step, ::step] for volume in (image, labels))
    draw_volumes([{"image": shown, "clusters": blend(shown, label_rgb(clusters))}], path, path.stem, spacing)


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)]
