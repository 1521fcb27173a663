"""Step-indexed batches: batch k is a pure function of (seed, k), whatever the number of workers or ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import Step, apply
from nnssl_ext.data.views import View, ViewSpec
from nnssl_ext.preprocessing.store import CaseStore


@dataclass
class ViewBatch:
    """The same view of several samples.

    Args:
        image: (B, C, z, y, x) float32.
        mask: (B, d, h, w) bool, True = hidden; None when nothing is hidden.
        cases: index of each sample's case in the store.
        affine: (B, 3, 4) float64 on the CPU, from voxels of the view to voxels of the case.
        intensity: augmentation of each sample that the loader left to the device.
    """

    image: Tensor
    mask: Tensor | None
    cases: tuple[int, ...]
    affine: Tensor
    intensity: tuple[tuple[Step, ...], ...] = ()

    def to(self, device: torch.device) -> ViewBatch:
        """On the device, augmented there as far as the loader hasn't done it."""
        image, mask = self.image.to(device, non_blocking=True), None if self.mask is None else self.mask.to(device, non_blocking=True)
        if self.intensity:
            image = torch.stack([apply(sample, steps) for sample, steps in zip(image, self.intensity)])
        return replace(self, image=image, mask=mask, intensity=())

    def pin_memory(self) -> ViewBatch:
        return replace(self, image=self.image.pin_memory(), mask=None if self.mask is None else self.mask.pin_memory())


Batch = dict[str, ViewBatch]


class StepDataset(Dataset[Batch]):
    """Item k is the batch of step k on this rank.

    The samples of all ranks are numbered through: sample n = (k * ranks + rank) * batch_size + i. Its case comes from
    a seeded permutation of all cases per pass, its views from ``sample_rng(seed, n)``; so one rank with batch 4 and two
    ranks with batch 2 see the same samples.

    Args:
        cases: indices into the store that may be drawn.
        stream: name of the random stream; "train" or "val".
        on_device: leave the intensity augmentation to `ViewBatch.to`.
    """

    def __init__(
        self,
        store: CaseStore,
        spec: ViewSpec,
        cases: Sequence[int],
        seed: int,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        stream: str = "train",
        on_device: bool = False,
    ) -> None:
        self.on_device = on_device
        self.store, self.spec, self.cases = store, spec, tuple(cases)
        self.seed, self.batch_size, self.rank, self.ranks, self.stream = seed, batch_size, rank, ranks, stream
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, number: int) -> np.ndarray:
        return sample_rng(self.seed, number, f"{self.stream} order").permutation(len(self.cases))

    def __getstate__(self) -> dict[str, object]:  # the cache can't travel to a worker
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def case(self, sample: int) -> int:
        """Index into the store of sample number `sample`."""
        turn, place = divmod(sample, len(self.cases))
        return self.cases[int(self._order(turn)[place])]

    def __getitem__(self, step: int) -> Batch:
        first = (step * self.ranks + self.rank) * self.batch_size
        numbers = range(first, first + self.batch_size)
        cases = tuple(self.case(n) for n in numbers)
        samples = [self.spec.sample(self.store, case, sample_rng(self.seed, n, self.stream)) for case, n in zip(cases, numbers)]
        return {name: _collate([sample[name] for sample in samples], cases, self.on_device) for name in samples[0]}


def _collate(views: Sequence[View], cases: tuple[int, ...], on_device: bool) -> ViewBatch:
    images, steps = [torch.from_numpy(view.image) for view in views], tuple(view.intensity for view in views)
    if not on_device:
        images = [apply(image, drawn) for image, drawn in zip(images, steps)]
    masks = [torch.from_numpy(view.mask) for view in views if view.mask is not None]
    affine = torch.from_numpy(np.stack([view.affine for view in views]))
    return ViewBatch(torch.stack(images), torch.stack(masks) if masks else None, cases, affine, steps if on_device and any(steps) else ())


def batches(dataset: StepDataset, start: int, stop: int, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """Batches of the steps `start` to `stop` (exclusive), in order, prepared ahead by `workers` processes."""
    loader = DataLoader(dataset, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin, prefetch_factor=4 if workers else None)
    return iter(loader)


def split_subjects(subjects: Sequence[str], seed: int, share: float = 0.1) -> tuple[list[int], list[int]]:
    """Indices of training and validation cases; whole subjects go to one side.

    Args:
        subjects: subject of each case.
        share: of the subjects for validation; at least one, none when there are fewer than three.
    """
    names = sorted(set(subjects))
    count = 0 if len(names) < 3 else max(1, round(share * len(names)))
    held_out = {names[i] for i in sample_rng(seed, 0, "split").permutation(len(names))[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, subject in enumerate(subjects):
        sides[subject in held_out].append(index)
    return sides
