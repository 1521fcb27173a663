"""What a benchmark runs: data, methods, seeds, how and with how many labels each is fine-tuned, what else is judged. A YAML file, or a command line."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import sha256_json

EMBEDDED = "embedded"  # in place of a dataset: phantoms that the suite makes itself
BOUND_LONGER = 4  # times the epochs of quick fine-tuning, of the upper bound
FULL_KEY = "full"  # of a suite's file: what the full grid changes


@dataclass(frozen=True)
class Generator:
    """Phantoms of a suite that brings its own data.

    Args:
        unlabelled: volumes to pretrain with.
        labelled, test: volumes to fine-tune with, at most, and to test; all of other subjects.
        lesions: volumes with a lesion, benign and malignant ones in turn.
        pairs: to register.
        size: voxels per edge.
        spacing: mm.
    """

    unlabelled: int = 200
    labelled: int = 16
    test: int = 8
    lesions: int = 48
    pairs: int = 4
    size: int = 64
    spacing: float = 3.0


@dataclass(frozen=True)
class Network:
    """A smaller network than the plan's.

    Args:
        size: name of a size of the planner, such as nano.
        patch: voxels per edge.
    """

    size: str = "nano"
    patch: int = 32


@dataclass(frozen=True)
class Method:
    """One pretraining.

    Args:
        trainer: name of the class.
        family: of the backbone; "": the method's own.
        steps: of the optimiser; None: as the method's own epochs and iterations say.
        batch: volumes per step; None: the plan's.
        options: hyper-parameters that differ from the method's defaults.
        noise: pretrain on volumes of noise, as a negative control.
    """

    trainer: str
    family: str = ""
    steps: int | None = None
    batch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    noise: bool = False

    @property
    def name(self) -> str:
        return f"{self.trainer}_{self.family}" + "_noise" * self.noise


@dataclass(frozen=True)
class Cells:
    """Fine-tunings of every method.

    Args:
        mode: one of `nnssl_finetune`: "full", "encoder", "frozen", "adapter", "mlp" or "linear"; left out for families that don't have it.
        labels: how many labelled cases; smaller subsets lie within larger ones.
        seeds: how many; None: all of the suite.
    """

    mode: str
    labels: tuple[int, ...]
    seeds: int | None = None


@dataclass(frozen=True)
class Quick:
    """Fine-tuning in this process for a given number of iterations, with our short trainers.

    Args:
        epochs: steps of the learning-rate schedule.
        iterations: of each epoch.
        batch: patches per iteration.
    """

    epochs: int = 40
    iterations: int = 10
    batch: int = 2


@dataclass(frozen=True)
class Registration:
    """Registration of pairs by frozen features.

    Args:
        preset: of `nnssl_evaluate_registration`.
        iterations: of the instance optimisation; None: the preset's.
        zoom, overlap: of the features, as the command's.
    """

    preset: str = "dinoreg"
    iterations: int | None = None
    zoom: float = 1.0
    overlap: float = 0.5


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Args:
        name: of the suite.
        methods: what is pretrained.
        unlabelled: dataset to pretrain with, in $nnssl_raw; "embedded": phantoms.
        labelled: datasets to judge with, in $nnUNet_raw; none with phantoms.
        generator: of the phantoms.
        network: None: the plan's.
        configuration: of the plan.
        seeds: of pretraining; each is fine-tuned with the seed of its own number, beside training from scratch with it.
        finetuning: modes and numbers of labels.
        quick: by backbone family; a family that is not named has `Quick()`. None: nnU-Net's own commands.
        schedule: of nnU-Net's own commands, as our trainers' names go on, such as "150ep"; "": 1000 epochs.
        probe: labelled volumes that the probe of frozen features learns from; none: no probe.
        classification: whether classes of volumes are told apart, where a dataset has classification.csv.
        registration: of pairs, where a dataset has pairs.json; None: none.
        negative_control: a method on noise; None: none.
        upper_bound: seeds of training from scratch with all labelled cases, where it is quick for four times as long; 0: none.
        pretraining_seconds: that a pretraining of given steps takes, about; only to begin with the longest and to tell what is left.
    """

    name: str
    methods: tuple[Method, ...]
    unlabelled: str = EMBEDDED
    labelled: tuple[str, ...] = ()
    generator: Generator = Generator()
    network: Network | None = None
    configuration: str = "3d_fullres"
    seeds: int = 3
    finetuning: tuple[Cells, ...] = ()
    quick: dict[str, Quick] | None = None
    schedule: str = ""
    probe: tuple[int, ...] = ()
    classification: bool = True
    registration: Registration | None = Registration()
    negative_control: Method | None = None
    upper_bound: int = 1
    pretraining_seconds: float = 95.0

    @property
    def embedded(self) -> bool:
        return self.unlabelled == EMBEDDED

    @property
    def all_methods(self) -> tuple[Method, ...]:
        return self.methods + ((self.negative_control,) if self.negative_control else ())

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return typing.cast("dict[str, Any]", _listed(dataclasses.asdict(self)))

    @property
    def digest(self) -> str:
        return sha256_json(self.as_dict())


def read_suite(file: Path, full: bool = False) -> Suite:
    """The suite of a YAML file; with `full`, what stands under "full" replaces what stands above.

    Raises:
        UserError: unreadable, an unknown key, a value of another type, no "full".
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        raise UserError(f"the suite can't be read: {reason}", file, "give a YAML file, such as benchmarks/learning/suite.yaml") from None
    if not isinstance(content, dict):
        raise UserError("the suite is no mapping of keys to values", file, "write name: ..., methods: ...")
    larger = content.pop(FULL_KEY, None)
    if full:
        if not isinstance(larger, dict):
            raise UserError("the suite has no full grid", file, f"leave out --full, or write what it changes under {FULL_KEY}:")
        content |= larger
    found = from_plain(Suite, content, file)
    check_numbers(found, file)
    return found


def check_numbers(suite: Suite, where: object) -> None:
    """Raise a `UserError` where a suite makes no sense, whatever data and methods there are."""
    labels = [count for cells in suite.finetuning for count in cells.labels]
    wrong = "no method is named" if not suite.methods else ""
    wrong = wrong or (f"{suite.seeds} seeds are impossible" if suite.seeds < 1 else "")
    wrong = wrong or ("numbers of labels and volumes must be at least 1" if any(count < 1 for count in (*labels, *suite.probe)) else "")
    wrong = wrong or ("labelled datasets are named beside embedded data" if suite.embedded and suite.labelled else "")
    wrong = wrong or ("no labelled dataset is named" if not suite.embedded and not suite.labelled else "")
    most = suite.generator.labelled
    wrong = wrong or (f"{max(labels)} labels are wanted, {most} cases are labelled" if suite.embedded and labels and max(labels) > most else "")
    names = [method.name for method in suite.all_methods]
    twice = [name for name in names if names.count(name) > 1]
    wrong = wrong or (f"two methods are called {twice[0]}" if twice else "")
    if wrong:
        raise UserError(wrong, where, "correct it, then run the same command again")


def from_plain(kind: Any, value: Any, where: object, key: str = "") -> Any:
    """A value of a YAML file as the type that a field has.

    Raises:
        UserError: an unknown or a missing key, a value of another type.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_plain(next(one for one in arguments if one is not types.NoneType), value, where, key)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(from_plain(arguments[0], item, where, f"{key}[{number}]") for number, item in enumerate(items))
    if origin is dict and isinstance(value, Mapping):
        return {str(name): from_plain(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a dataset's number
    if type(value) is not kind:
        raise UserError(f"'{value}' is no {_NAMES.get(kind, 'mapping')}", f"{where}, {key}", "see benchmarks/learning/suite.yaml for an example")
    return value


_NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _dataclass(kind: type, value: Any, where: object, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"'{value}' is no mapping of keys to values", f"{where}, {key or 'whole file'}", "see benchmarks/learning/suite.yaml for an example")
    types_, fields = typing.get_type_hints(kind), {one.name: one for one in dataclasses.fields(kind)}
    path = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise UserError(f"unknown key '{name}'", f"{where}, {path}{name}", did_you_mean(str(name), fields))
    for name, one in fields.items():
        if name not in value and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise UserError(f"the key '{name}' is missing", f"{where}, {key or 'whole file'}", f"write {name}: ...")
    return kind(**{name: from_plain(types_[name], item, where, f"{path}{name}") for name, item in value.items()})


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
