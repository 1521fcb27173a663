"""The units of a study: baselines of each backbone family, then pretraining, probe and fine-tuning of each method, for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import getsourcefile
from typing import Any

from benchmarks.common import PAIRED
from benchmarks.learning import quality
from benchmarks.learning.clusters import clustered
from benchmarks.learning.finetune import finetune
from benchmarks.learning.pretrain import pretrain
from benchmarks.learning.suite import CLUSTERED, FINE_TUNING, LABELS, PATCH, SUITE, Entry
from benchmarks.methods import methods
from nnssl_ext.benchmark.units import Unit
from nnssl_ext.core.files import sha256_file


@dataclass(frozen=True)
class Baseline:
    """What the methods of a backbone family are compared with.

    Args:
        family: backbone family.
        intensities: k-NN of the voxels themselves.
        untrained: k-NN of random weights, by seed.
        scratch: training from scratch, by seed.
    """

    family: str
    intensities: Unit
    untrained: dict[int, Unit]
    scratch: dict[int, Unit]

    def chains(self) -> list[list[Unit]]:
        return [[self.intensities], *([self.untrained[seed], self.scratch[seed]] for seed in self.scratch)]


@dataclass(frozen=True)
class Trial:
    """A method with its units by seed."""

    entry: Entry
    pretrained: dict[int, Unit]
    probed: dict[int, Unit]
    finetuned: dict[int, Unit]

    def chains(self) -> list[list[Unit]]:
        return [[self.pretrained[seed], self.probed[seed], self.finetuned[seed]] for seed in self.pretrained]


def baseline(family: str, seeds: Sequence[int], digest: str) -> Baseline:
    """Baselines of a backbone family on data with this hash."""
    common = {"family": family, "patch": PATCH, "data": digest}
    return Baseline(
        family,
        Unit(f"intensities_{family}", quality.intensities, common),
        {seed: Unit(f"untrained_{family}_{seed}", quality.untrained, {**common, "seed": seed}) for seed in seeds},
        {seed: Unit(f"scratch_{family}_{seed}", finetune, finetuning(family, seed, digest)) for seed in seeds},
    )


def trial(entry: Entry, seeds: Sequence[int], digest: str, pairs: str | None = None) -> Trial:
    """Units of one method on data with this hash; a change of the method's file makes them new ones.

    Args:
        pairs: digest of the second images, for a method that learns from pairs.
    """
    code = sha256_file(str(getsourcefile(methods()[entry.method])))
    earlier = CLUSTERED.get(entry.method)
    needed = {} if earlier is None else trial(next(one for one in SUITE if one.method == earlier and one.family == entry.family), seeds, digest).pretrained
    pretrained = {}
    for seed in seeds:
        settings = {"entry": asdict(entry), "code": code, "patch": PATCH, "data": digest, "seed": seed}
        settings |= {"pairs": pairs} if entry.method in PAIRED else {}
        labels = Unit(f"clusters_{earlier}_{entry.family}_{seed}", clustered, {"data": digest, "seed": seed}, needed[seed]) if needed else None
        pretrained[seed] = Unit(f"pretrain_{entry.name}_{seed}", pretrain, settings, labels)
    return Trial(
        entry,
        pretrained,
        {seed: Unit(f"probe_{entry.name}_{seed}", quality.trained, {"data": digest}, unit) for seed, unit in pretrained.items()},
        {seed: Unit(f"finetune_{entry.name}_{seed}", finetune, finetuning(entry.family, seed, digest), unit) for seed, unit in pretrained.items()},
    )


def finetuning(family: str, seed: int, digest: str) -> dict[str, Any]:
    """Settings of quick fine-tuning with a seed on data with this hash."""
    return {"family": family, "patch": PATCH, "data": digest, "labels": LABELS, "training": asdict(FINE_TUNING[family]), "seed": seed}
