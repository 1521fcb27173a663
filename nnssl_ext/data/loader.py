"""Step-indexed batches: batch k is a pure function of (seed, k), whatever the number of workers or ranks."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import Step, apply
from nnssl_ext.data.views import View, ViewSpec, of_batch
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
        hidden: (M,) int64, ascending: places of the hidden cells in the flattened mask; None without a mask.
            Found by the loader, since a device would have to wait for their number.
    """

    image: Tensor
    mask: Tensor | None
    cases: tuple[int, ...]
    affine: Tensor
    intensity: tuple[tuple[Step, ...], ...] = ()
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> ViewBatch:
        """On the device, augmented there as far as the loader hasn't done it."""
        image = self.image.to(device, non_blocking=True)
        mask, hidden = (None if part is None else part.to(device, non_blocking=True) for part in (self.mask, self.hidden))
        if self.intensity:
            image = image.clone() if image is self.image else image
            for sample, steps in zip(image, self.intensity):
                apply(sample, steps)
        return replace(self, image=image, mask=mask, intensity=(), hidden=hidden)

    def pin_memory(self) -> ViewBatch:
        mask, hidden = (None if part is None else part.pin_memory() for part in (self.mask, self.hidden))
        return replace(self, image=self.image.pin_memory(), mask=mask, hidden=hidden)


Batch = dict[str, ViewBatch]


class StepDataset(Dataset[Batch]):
    """Item k is the batch of step k on this rank.

    The samples of all ranks are numbered through: sample n = (k * ranks + rank) * batch_size + i. Its case comes from
    a seeded permutation of all cases per pass, its views from ``sample_rng(seed, n)``; so one rank with batch 4 and two
    ranks with batch 2 see the same samples. What the samples of a batch share (`views.of_batch`) is drawn once for all ranks.

    A case is compared with its recorded hash when it is drawn for the first time, by whichever process.

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
        self._sound = torch.zeros(len(store), dtype=torch.bool).share_memory_()  # known to all loader processes

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
        for case in cases:
            self._check(case)
        specs = of_batch(self.spec, self.ranks * self.batch_size, sample_rng(self.seed, step, f"{self.stream} batch"))[self.rank * self.batch_size :]
        samples = [spec.sample(self.store, case, sample_rng(self.seed, n, self.stream)) for spec, case, n in zip(specs, cases, numbers)]
        for case in {view.case for sample in samples for view in sample.values() if view.case is not None}:
            self._check(case)
        return {name: _collate([sample[name] for sample in samples], cases, self.on_device) for name in samples[0]}

    def _check(self, case: int) -> None:
        if self._sound[case]:
            return
        try:
            self.store.verify(case)
        except OSError as error:
            raise UserError(f"a stored case can't be read: {error.strerror or error}", error.filename or "", "check the disk, then go on with --c") from error
        self._sound[case] = True


class _Reported(Dataset["Batch | UserError"]):
    """A dataset whose mistakes that a user can mend are items: torch would turn an exception of a worker into another one."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.dataset[step]
        except UserError as error:
            return error


def _collate(views: Sequence[View], cases: tuple[int, ...], on_device: bool) -> ViewBatch:
    image, steps = torch.from_numpy(np.stack([view.image for view in views])), tuple(view.intensity for view in views)
    if not on_device:
        for sample, drawn in zip(image, steps):
            apply(sample, drawn)
    masks = [torch.from_numpy(view.mask) for view in views if view.mask is not None]
    mask = torch.stack(masks) if masks else None
    hidden = None if mask is None else mask.flatten().nonzero().flatten()
    affine = torch.from_numpy(np.stack([view.affine for view in views]))
    cases = tuple(case if view.case is None else view.case for view, case in zip(views, cases))
    return ViewBatch(image, mask, cases, affine, steps if on_device and any(steps) else (), hidden)


def batches(dataset: Dataset[Batch], start: int, stop: int, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """Batches of the steps `start` to `stop` (exclusive), in order, prepared ahead by `workers` processes.

    Raises:
        UserError: a case is damaged, or whatever the dataset says, in a worker or not.
    """
    numbers, ahead = range(start, stop), 4 if workers else None
    options: dict[str, Any] = {"num_workers": workers, "prefetch_factor": ahead, "worker_init_fn": _ignore_stops, "pin_memory": pin}
    for item in DataLoader(_Reported(dataset), batch_size=None, sampler=numbers, **options):
        if isinstance(item, UserError):
            raise item
        yield item


def _ignore_stops(worker: int) -> None:
    """Schedulers and torchrun send their signals to loader processes too; these go on until the trainer has saved, and end with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\) (?:is killed by signal: (?P<signal>.*?)\. |exited unexpectedly)", re.DOTALL)
_REMEDIES: dict[int, str] = {
    signal.SIGKILL: "memory was short, it seems: use fewer loader processes (-o workers=N) or ask for more memory, then go on with --c",
    signal.SIGBUS: "shared memory was short, it seems: enlarge /dev/shm (docker: --shm-size) or use fewer loader processes (-o workers=N), then go on with --c",
}


@contextmanager
def deaths_explained() -> Iterator[None]:
    """Around all that happens while `batches` are in use: torch reports a worker that died in the middle of whatever this process does.

    Raises:
        UserError: a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        death = _DEATH.match(str(error))
        if death is None:
            raise
        number = next((s for s in signal.Signals if signal.strsignal(s) == death["signal"]), None)
        how = f" (killed by signal {number.value}, {number.name})" if number else ""
        fix = _REMEDIES.get(number or 0, "go on with --c; if it dies again, -o workers=0 shows why")
        raise UserError(f"a loader process died{how}", f"process {death['pid']}", fix) from error


def subject_numbers(store: CaseStore, cases: Sequence[int]) -> list[int]:
    """A number of each case's subject that is the same in every process."""
    return [int.from_bytes(hashlib.blake2b(store.subject(case).encode(), digest_size=7).digest(), "little") for case in cases]


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
