"""The units of a suite, and what each of them says in the results: baselines of each backbone family, then each method, for each seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import getsourcefile
from typing import Any

from nnssl_ext.benchmark import judge
from nnssl_ext.benchmark.data import CLASSIFICATION, REGISTRATION, SEGMENTATION, Data
from nnssl_ext.benchmark.finetune import finetuned
from nnssl_ext.benchmark.pretrain import config_of, pretrain, start, trainer_class
from nnssl_ext.benchmark.suite import BOUND_LONGER, Cells, Method, Quick, Suite
from nnssl_ext.benchmark.units import Unit
from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import sha256_file
from nnssl_ext.core.plan import ConfigPlan
from nnssl_ext.finetuning.export import find_trainer
from nnssl_ext.finetuning.plans import ENCODER, FREEZING, FULL, MODES, has_mode
from nnssl_ext.finetuning.trainers import Short, trainer_name
from nnssl_ext.nn.backbones.base import backbone_class, check_support
from nnssl_ext.planners.planner import Planner

METHOD, BASELINE, CONTROL, UPPER_BOUND = "method", "baseline", "negative control", "upper bound"
SCRATCH, RANDOM = "scratch", "random weights"
# Seconds on one core of a probe, a classification, a registration, a quick fine-tuning: to begin with the longest, and to guess.
COSTS = {"probe": 25.0, CLASSIFICATION: 60.0, REGISTRATION: 25.0}
FINETUNE_COSTS = {"resenc": 110.0, "primus": 75.0}
LONG = 36_000.0  # with a method's own epochs, or nnU-Net's


@dataclass(frozen=True)
class Planned:
    """A unit, and what its results are called: fields of a run in results.json; None where the unit only prepares others."""

    unit: Unit
    run: dict[str, Any] | None


def with_families(suite: Suite) -> Suite:
    """The same with the own backbone family of each method that names none.

    Raises:
        UserError: unknown trainers.
    """
    named = [replace(method, family=method.family or trainer_class(method.trainer).default_family) for method in suite.all_methods]
    count = len(suite.methods)
    return replace(suite, methods=tuple(named[:count]), negative_control=named[count] if suite.negative_control else None)


def check(suite: Suite, where: object) -> None:
    """Raise a `UserError` where trainers, hyper-parameters or modes don't exist, or no backbone family has a mode: before anything is computed."""
    for method in suite.all_methods:
        trainer_class(method.trainer)
        config_of(method, 0)
    for cells in suite.finetuning:
        if cells.mode not in MODES:
            raise UserError(f"there is no mode '{cells.mode}'", where, did_you_mean(cells.mode, MODES))
    suite = with_families(suite)
    _check_schedule(suite, where)
    families = dict.fromkeys(method.family for method in suite.methods)
    made = [Planner.families[family]((1.0,) * 3, (64,) * 3, "nano", 1e3, 2) for family in families if family in Planner.families]
    networks = [network.class_name for network in made if network is not None]
    offered = [mode for mode in MODES if len(networks) < len(families) or any(has_mode(network, mode) for network in networks)]
    for cells in suite.finetuning:
        if cells.mode not in offered:
            raise UserError(f"there is no mode {cells.mode} for {' and '.join(families)}", where, f"choose among {', '.join(offered)}")


def _check_schedule(suite: Suite, where: object) -> None:
    """Raise a `UserError` where the schedule isn't one of every backbone family's trainers."""
    if suite.schedule and suite.quick is not None:
        raise UserError("quick fine-tuning has a schedule of its own", where, "leave out one of quick and schedule")
    for family in dict.fromkeys(method.family for method in suite.all_methods if suite.schedule):
        name = trainer_name(family, suite.schedule)
        try:
            find_trainer(name)
        except UserError:
            fix = "take 150ep, or put a folder with a trainer of this name into $nnUNet_extTrainer"
            raise UserError(f"there is no trainer '{name}' for the schedule '{suite.schedule}'", where, fix) from None


def check_families(suite: Suite, config: ConfigPlan) -> None:
    """Raise a `UserError` where the plan lacks a backbone family, or a method can't use it."""
    for method in suite.all_methods:
        check_support(backbone_class(config, method.family), trainer_class(method.trainer).needs, method.trainer)


def grid(suite: Suite, data: Data, device: str) -> list[Planned]:
    """All units of a suite on prepared data."""
    return list(_Grid(suite, data, device).all())


class _Grid:
    def __init__(self, suite: Suite, data: Data, device: str) -> None:
        self.suite, self.device, record = suite, device, data.record
        self.plan = data.plan
        self.config = self.plan.configuration(suite.configuration)
        self.datasets: dict[str, dict[str, Any]] = record["datasets"]
        self.commands: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = record["digests"]
        self.common = {"data": self.digests[record["unlabelled"]], "configuration": suite.configuration, "network": suite.network and asdict(suite.network)}
        check_families(suite, self.config)

    def all(self) -> Iterator[Planned]:
        for number, family in enumerate(dict.fromkeys(method.family for method in self.suite.all_methods)):
            begins = [self._start(family, seed) for seed in range(self.suite.seeds)]
            yield from (Planned(unit, None) for unit in begins)
            yield from self._controls(begins[0], family, first=number == 0)
            for seed, unit in enumerate(begins):
                named = {"method": RANDOM, "family": family, "role": BASELINE, "pretrain_seed": None, "seed": seed}
                yield from self._features(unit, named)
                yield from self._finetunings(unit, named, self._cells(family, False))
            yield from self._upper_bound(begins, family)
        for method in self.suite.methods:
            yield from self._method(method)
        if control := self.suite.negative_control:
            yield from (replace(one, run={**(one.run or {}), "method": f"{control.trainer} on noise"}) for one in self._method(control))

    def _method(self, method: Method) -> Iterator[Planned]:
        code = sha256_file(str(getsourcefile(trainer_class(method.trainer))))
        cells = self._cells(method.family, True, handed_over=self._hands_over_decoder(method))
        role = CONTROL if method.noise else METHOD
        if method.noise:  # what it is for: the gain of full fine-tuning with the fewest labels
            fewest = min((count for one in cells if one.mode == FULL for count in one.labels), default=None)
            cells = [] if fewest is None else [Cells(FULL, (fewest,))]
        for seed in range(self.suite.seeds):
            settings = {**self.common, "method": asdict(method), "code": code, "seed": seed, "device": self.device}
            cost = self.suite.pretraining_seconds if method.steps is not None else LONG
            unit = Unit(f"pretrain_{method.name}_{seed}", pretrain, settings, cost=cost, goes_on=True)
            named = {"method": method.trainer, "family": method.family, "role": role, "pretrain_seed": seed, "seed": seed}
            yield Planned(unit, {"kind": "pretrain", **named, "dataset": None, "mode": None, "labels": None, "seed": None})
            if not method.noise:
                yield from self._features(unit, named)
            yield from self._finetunings(unit, named, cells)

    def _start(self, family: str, seed: int) -> Unit:
        return Unit(f"start_{family}_{seed}", start, {**self.common, "family": family, "seed": seed}, cost=1.0)

    def _hands_over_decoder(self, method: Method) -> bool:
        cls, backbone = trainer_class(method.trainer), backbone_class(self.config, method.family)
        return cls.trains_decoder and cls.transfers_decoder and "decoder" in backbone.supports

    def _cells(self, family: str, pretrained: bool, handed_over: bool = False) -> list[Cells]:
        """Fine-tunings of a method, or of its baselines: in modes that its network has, of an encoder alone only where a decoder could be handed over, too."""
        network = self.config.network(family).class_name
        found = [cells for cells in self.suite.finetuning if has_mode(network, cells.mode)]
        return [cells for cells in found if cells.mode != ENCODER or (pretrained and handed_over)]

    def _finetunings(self, unit: Unit, named: dict[str, Any], cells: Sequence[Cells]) -> Iterator[Planned]:
        for dataset in self._able(SEGMENTATION):
            for one in cells:
                if named["seed"] < (self.suite.seeds if one.seeds is None else one.seeds):
                    for labels in one.labels:
                        yield self._finetuning(unit, named, dataset, one.mode, labels)

    def _finetuning(self, unit: Unit, named: dict[str, Any], dataset: str, mode: str, labels: int | None, longer: int = 1) -> Planned:
        scratch = named["method"] == RANDOM and mode not in FREEZING
        family, how = named["family"], None if self.suite.quick is None else asdict(self.suite.quick.get(named["family"], Quick()))
        if how is not None:
            how["epochs"] *= longer
        settings = {"data": self.digests[dataset], "dataset": dataset, "mode": mode, "labels": labels, "seed": named["seed"], "scratch": scratch, "quick": how}
        title = f"{SCRATCH if scratch else named['method']}_{family}{'_noise' * (named['role'] == CONTROL)}".replace(" ", "_")
        name = f"finetune_{title}_{dataset.partition('_')[0]}_{mode}_{labels or 'all'}_{named['seed']}"
        settings |= self._commands(family) if how is None else {}
        cost = LONG if how is None else FINETUNE_COSTS.get(family, 60.0) * longer
        run = {"kind": SEGMENTATION, **named, "method": SCRATCH if scratch else named["method"], "role": named["role"]}
        run |= {"dataset": dataset, "mode": mode, "labels": labels or self.datasets[dataset]["cases"]}
        return Planned(Unit(name, finetuned, {**settings, "device": self.device}, unit, cost), run)

    def _commands(self, family: str) -> dict[str, Any]:
        """What nnU-Net's own commands train with."""
        if family not in self.commands:
            name = trainer_name(family, self.suite.schedule)
            trainer = find_trainer(name)
            self.commands[family] = {"trainer": name, "variables": trainer.lengths() if issubclass(trainer, Short) else {}}
        return self.commands[family]

    def _upper_bound(self, begins: Sequence[Unit], family: str) -> Iterator[Planned]:
        """All labels; quick fine-tuning goes on for longer, since its schedule limits it more than the labels do."""
        for seed, unit in enumerate(begins[: self.suite.upper_bound]):
            named = {"method": RANDOM, "family": family, "role": UPPER_BOUND, "pretrain_seed": None, "seed": seed}
            for dataset in self._able(SEGMENTATION):
                yield self._finetuning(unit, named, dataset, FULL, None, BOUND_LONGER)

    def _features(self, unit: Unit, named: dict[str, Any]) -> Iterator[Planned]:
        """What judges the frozen features of a checkpoint."""
        for kind, work, dataset, more in self._judgements():
            settings = {"data": self.digests[dataset], "dataset": dataset, "device": self.device, "controls": False, **more}
            title = f"{named['method']}_{named['family']}".replace(" ", "_")
            made = Unit(f"{kind}_{title}_{dataset.partition('_')[0]}_{named['seed']}", work, settings, unit, COSTS[kind])
            yield Planned(made, {"kind": kind, **named, "dataset": dataset, "mode": None, "labels": None})

    def _controls(self, unit: Unit, family: str, first: bool) -> Iterator[Planned]:
        """Raw intensities in cells as large as the family's; statistics of intensities, MIND and no registration, in which the family has no part."""
        for kind, work, dataset, more in self._judgements():
            if kind == "probe" or first:
                settings = {"data": self.digests[dataset], "dataset": dataset, "device": self.device, "controls": True, **more}
                made = Unit(f"{kind}_controls_{family}_{dataset.partition('_')[0]}", work, settings, unit, COSTS[kind])
                named = {"method": "raw intensities", "family": family if kind == "probe" else None, "role": BASELINE, "pretrain_seed": None, "seed": None}
                yield Planned(made, {"kind": kind, **named, "dataset": dataset, "mode": None, "labels": None})

    def _judgements(self) -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
        suite = self.suite
        if suite.probe:
            yield from (("probe", judge.probe, dataset, {"labels": list(suite.probe)}) for dataset in self._able(SEGMENTATION))
        if suite.classification:
            yield from ((CLASSIFICATION, judge.classification, dataset, {}) for dataset in self._able(CLASSIFICATION))
        if suite.registration is not None:
            yield from ((REGISTRATION, judge.registration, dataset, {"registration": asdict(suite.registration)}) for dataset in self._able(REGISTRATION))

    def _able(self, ability: str) -> list[str]:
        return [name for name, found in self.datasets.items() if ability in found["judges"]]
