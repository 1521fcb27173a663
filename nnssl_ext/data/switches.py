"""Augmentations that are switched off, in the views of any method."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass, replace
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.data.augment import Chance, Intensity
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.spatial import Spatial

OF_INTENSITY = tuple(field.name for field in fields(Intensity))
OF_SPACE: dict[str, dict[str, Any]] = {"mirror": {"mirror": (False, False, False)}, "rotation": {"p_rotation": 0.0}, "zoom": {"p_zoom": 0.0}}
NAMES = (*OF_INTENSITY, *OF_SPACE)
WHERE = "option -o no_augment"


def check_names(names: Collection[str]) -> None:
    """Raise a `UserError` unless all are names of augmentations."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"there is no augmentation '{name}'", WHERE, f"give some of: {', '.join(NAMES)}")


def without(spec: Any, names: Collection[str]) -> Any:
    """The same views, without some augmentations; what a method has to undo or to tell stays (`TurnedPair`'s turns, corruptions, masks).

    Args:
        spec: a specification of views, or a part of one.
        names: of `NAMES`; "rotation" includes the quarter turns of an `IoUPair`.

    Raises:
        UserError: the views don't have one of them.
    """
    for name in names:
        changed = _without(spec, name)
        if changed is spec:
            held = [other for other in NAMES if _without(spec, other) is not spec]
            raise UserError(f"these views have no {name} that could be left out", WHERE, f"give some of: {', '.join(held)}" if held else "leave it out")
        spec = changed
    return spec


def _without(spec: Any, name: str) -> Any:
    """`spec` itself where nothing changes."""
    if isinstance(spec, Intensity):
        return _changed(spec, {name: Chance()} if name in OF_INTENSITY else {})
    if isinstance(spec, Spatial):
        return _changed(spec, OF_SPACE.get(name, {}))
    if isinstance(spec, type) or not is_dataclass(spec):
        return spec
    parts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
    changed = {part: new for part, old in parts.items() if (new := _without(old, name)) is not old}
    if isinstance(spec, IoUPair) and spec.turning and name == "rotation" and spec.turning.turns != (0,):
        changed["turning"] = replace(spec.turning, turns=(0,))
    return replace(spec, **changed) if changed else spec


def _changed(spec: Any, values: dict[str, Any]) -> Any:
    return replace(spec, **values) if any(getattr(spec, name) != value for name, value in values.items()) else spec
