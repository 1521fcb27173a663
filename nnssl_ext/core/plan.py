"""The plan: everything that preprocessing, pretraining and export have to agree on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import read_json, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Normalization:
    """How intensities of one modality are normalised.

    Args:
        scheme: "ct" (clip to [low, high], subtract mean, divide by std), "zscore" (mean and std of the case's body),
            "percentile" (0.5-99.5 % of the case's body to [0, 1]), "none", or the name of a plug-in.
        mean, std, low, high: foreground statistics of the whole collection; low/high are its 0.5 / 99.5 percentiles.
    """

    scheme: str
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class NetworkPlan:
    """One backbone family's network for one configuration.

    Args:
        size: "S", "M", "L", ... or "tiny".
        class_name: dotted name of the class, of dynamic-network-architectures or this package.
        kwargs: its keyword arguments without input_channels and num_classes, JSON types only, classes as dotted names. Those of a
            2D network have an entry for each axis of a slice.
        imports: those keys of `kwargs` that hold dotted names.
        batch_size: samples per step that fit the memory target.
        memory_gb: estimated training memory at that batch size.
    """

    size: str
    class_name: str
    kwargs: Mapping[str, Any]
    imports: tuple[str, ...]
    batch_size: int
    memory_gb: float

    @property
    def cell(self) -> tuple[int, ...]:
        """Voxels of a cell of the deepest map along the network's axes: a token's edges, or the product of all strides."""
        token = self.kwargs.get("patch_embed_size")
        return tuple(token) if token else tuple(math.prod(steps) for steps in zip(*self.kwargs["strides"]))

    @property
    def axes(self) -> int:
        """3, or 2 for a network that reads slices."""
        return len(self.cell)


@dataclass(frozen=True)
class ConfigPlan:
    """One configuration.

    Args:
        data_identifier: name of the folder of the preprocessed cases.
        spacing: mm, (z, y, x); None keeps each case's own. None for one axis alone: the configuration is one of slices, which
            lie across this axis and are as far apart as they are in each case.
        patch_size: voxels, (z, y, x); divisible by the strides of every family; 1 across slices.
        median_shape: voxels, median case after cropping and resampling.
        normalization: by modality.
        resampling: keyword arguments of the resampling (order, order_z, force_separate_z).
        networks: by backbone family.
    """

    data_identifier: str
    spacing: tuple[float | None, ...] | None
    patch_size: tuple[int, ...]
    median_shape: tuple[int, ...]
    normalization: Mapping[str, Normalization]
    resampling: Mapping[str, Any]
    networks: Mapping[str, NetworkPlan]

    def network(self, family: str) -> NetworkPlan:
        """The network of a backbone family.

        Raises:
            UserError: the plan has no such family.
        """
        if family not in self.networks and self.slice_axis is not None:
            raise UserError(f"'{family}' has no network for slices", "option -b", f"give -b {next(iter(self.networks))}, or train a 3D configuration")
        if family not in self.networks:
            raise UserError(f"unknown backbone family '{family}'", "option -b", did_you_mean(family, self.networks))
        return self.networks[family]

    @property
    def slice_axis(self) -> int | None:
        """The axis across which slices lie; None for a 3D configuration."""
        return self.spacing.index(None) if self.spacing is not None and None in self.spacing else None

    def spacing_for(self, own: Sequence[float]) -> tuple[float, ...]:
        """Spacing in mm of a case after resampling, (z, y, x), where it was `own` before."""
        return tuple(mm if planned is None else planned for mm, planned in zip(own, self.spacing or (None,) * 3, strict=True))

    def in_volume(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Voxels along the axes of a network, such as a stride or a cell, as (z, y, x): 1 across slices."""
        axis = self.slice_axis
        return tuple(sizes) if axis is None else (*sizes[:axis], 1, *sizes[axis:])


@dataclass(frozen=True)
class Plan:
    """What `nnssl_plan_experiment` writes; see `ConfigPlan`.

    Args:
        channels: input channels of every case.
        fingerprint_sha256: hash of the fingerprint it was made from.
        decisions: plain sentences that explain the choices.
    """

    dataset_name: str
    plans_name: str
    planner: str
    channels: int
    gpu_memory_target_gb: float
    fingerprint_sha256: str
    decisions: tuple[str, ...]
    configurations: Mapping[str, ConfigPlan]
    schema_version: int = SCHEMA_VERSION

    def configuration(self, name: str) -> ConfigPlan:
        """A configuration by name.

        Raises:
            UserError: the plan has no such configuration.
        """
        if name not in self.configurations:
            raise UserError(f"unknown configuration '{name}'", f"plans {self.plans_name} of {self.dataset_name}", did_you_mean(name, self.configurations))
        return self.configurations[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def save(self, path: Path | str) -> None:
        content = self.as_dict()
        check(content, path)
        write_json(path, content)

    @staticmethod
    def load(path: Path | str) -> Plan:
        """Read and check a plans file.

        Raises:
            UserError: missing file, invalid content, other schema version.
        """
        return Plan.from_dict(read_json(path), path)

    @staticmethod
    def from_dict(content: dict[str, Any], where: object = "plan") -> Plan:
        check(content, where)
        return Plan(**{**content, "decisions": tuple(content["decisions"]), "configurations": {k: _config(v) for k, v in content["configurations"].items()}})


def _config(content: dict[str, Any]) -> ConfigPlan:
    values = dict(content)
    for key in ("spacing", "patch_size", "median_shape"):
        values[key] = None if values[key] is None else tuple(values[key])
    values["normalization"] = {k: Normalization(**v) for k, v in values["normalization"].items()}
    values["networks"] = {k: NetworkPlan(**{**v, "imports": tuple(v["imports"])}) for k, v in values["networks"].items()}
    return ConfigPlan(**values)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values, "minProperties": 1}


def _triple(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 3, "maxItems": 3}


_TEXT, _COUNT, _NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}, {"type": "number"}
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_SPACING = {**_triple({"anyOf": [{"type": "null"}, _POSITIVE]}), "contains": {"type": "null"}, "minContains": 0, "maxContains": 1}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "nnssl_ext plan",
    **_object(
        {
            "schema_version": {"const": SCHEMA_VERSION},
            "dataset_name": _TEXT,
            "plans_name": _TEXT,
            "planner": _TEXT,
            "channels": _COUNT,
            "gpu_memory_target_gb": _POSITIVE,
            "fingerprint_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "decisions": {"type": "array", "items": {"type": "string"}},
            "configurations": _map(
                _object(
                    {
                        "data_identifier": _TEXT,
                        "spacing": {"anyOf": [{"type": "null"}, _SPACING]},
                        "patch_size": _triple(_COUNT),
                        "median_shape": _triple(_COUNT),
                        "normalization": _map(_object({"scheme": _TEXT, "mean": _NUMBER, "std": _POSITIVE, "low": _NUMBER, "high": _NUMBER})),
                        "resampling": {"type": "object"},
                        "networks": _map(
                            _object(
                                {
                                    "size": _TEXT,
                                    "class_name": _TEXT,
                                    "kwargs": {"type": "object"},
                                    "imports": {"type": "array", "items": {"type": "string"}},
                                    "batch_size": _COUNT,
                                    "memory_gb": _POSITIVE,
                                }
                            )
                        ),
                    }
                )
            ),
        }
    ),
}


def check(content: Any, where: object = "plan") -> None:
    """Check a plan's JSON content.

    Raises:
        UserError: names the first offending field.
    """
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"plan schema version {version}, this version reads {SCHEMA_VERSION}", where, "plan again: nnssl_plan_experiment -d ID")
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content))
    if error is not None:
        field = "/".join(str(part) for part in error.absolute_path) or "top level"
        raise UserError(f"invalid plan: {field}: {error.message[:200]}", where, "plan again: nnssl_plan_experiment -d ID")
