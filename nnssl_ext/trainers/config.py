"""Hyper-parameters on the command line: ``-o lr=1e-4 mask_ratio=0.6``, checked against a trainer's Config."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from nnssl_ext.core.errors import UserError, did_you_mean

SPEED_ONLY = {"folder": False}  # metadata of a field that changes no result: it stays out of the results folder's name
AT_LEAST_ONE = {"range": (1, math.inf)}  # metadata of a number; without it 0 is the smallest
SHARE = {"range": (0, 1)}
_TIGHT = str.maketrans("", "", " '")  # what of a value stays out of a folder's name
_EXAMPLES = {int: "a whole number, such as 2", float: "a number, such as 1e-4", bool: "true or false"}


def parse_overrides(cls: type, texts: Sequence[str]) -> dict[str, Any]:
    """Values of ``key=value`` texts, converted to the types of the dataclass `cls`.

    Raises:
        UserError: malformed text, unknown key (with the closest one), value of another type or out of range.
    """
    types_ = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"'{text}' is not of the form key=value", "option -o", "write for example -o lr=1e-4")
        if key not in known:
            raise UserError(f"unknown hyper-parameter '{key}'", f"option -o of {cls.__qualname__.removesuffix('.Config')}", did_you_mean(key, known))
        values[key] = _convert(value, types_[key], text)
        _check_range(values[key], known[key].metadata.get("range", (0, math.inf)), text)
    return values


def _check_range(value: Any, limits: tuple[float, float], text: str) -> None:
    low, high = limits
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not (low <= number <= high and math.isfinite(number)):
            kind = f"of at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{number} is out of range", f"option -o {text}", f"give a number {kind}")


def _convert(value: str, kind: Any, text: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value.lower() == "none":
            return None
        kind = next(argument for argument in arguments if argument is not type(None))
        return _convert(value, kind, text)
    if origin is tuple:
        return tuple(_convert(part, arguments[0], text) for part in value.strip("()").split(",") if part)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise UserError(f"'{value}' is not a valid {kind.__name__}", f"option -o {text}", f"give {_EXAMPLES.get(kind, 'another value')}") from None


def check_several(samples: int, method: str) -> None:
    """Raise a `UserError` where a method that compares the samples of a batch would get one alone."""
    if samples < 2:
        raise UserError(f"{method} compares samples and needs two of them at a time, not {samples}", "batch size", "give -o batch_size=2 or more")


def check_interval(values: Sequence[float], name: str) -> None:
    """Raise a `UserError` unless the field `name` holds two numbers, the lower one first."""
    if len(values) != 2 or values[0] > values[1]:
        raise UserError(f"{name} needs two numbers, the lower one first, not {tuple(values)}", f"option -o {name}", f"write for example -o {name}=0.3,0.6")


def speed_only(config: Any) -> set[str]:
    """Names of the fields that change no result."""
    return {field.name for field in dataclasses.fields(config) if not field.metadata.get("folder", True)}


def as_plain(config: Any) -> dict[str, Any]:
    """The fields of a configuration in JSON types."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}


def folder_suffix(config: Any, family: str, default_family: str) -> str:
    """What of the configuration differs from the defaults, for the results folder's name; "" when nothing does."""
    parts = [] if family == default_family else [f"b={family}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.metadata.get("folder", True):
            parts.append(f"{field.name}={str(value).translate(_TIGHT)}")
    suffix = "_".join(parts).replace("/", "-")
    if len(suffix) > 100:
        suffix = suffix[:90] + "-" + hashlib.sha256(suffix.encode()).hexdigest()[:8]
    return suffix
