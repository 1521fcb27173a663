"""``python -m tests.conformance.freeze``: what others build on, as it is now, into frozen.json.

Commands and their options, keys of the checkpoints with the shapes of their tensors, schema of the plan, fields of the adaptation plan.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import nnssl_ext.cli
from documentation.generate import parser_of
from nnssl_ext import __version__
from nnssl_ext.core.files import write_json
from nnssl_ext.core.plan import SCHEMA
from tests.conformance.pairs import PAIRS, Pair, registered

FROZEN = Path(__file__).with_name("frozen.json")


def snapshot() -> dict[str, Any]:
    return {
        "version": __version__,
        "commands": {parser.prog: {name: option(action) for action in parser._actions for name in names(action)} for parser in parsers()},
        "checkpoints": {str(pair): checkpoint(pair) for pair in PAIRS if pair.method in registered()},
        "plan": SCHEMA,
    }


def parsers() -> list[argparse.ArgumentParser]:
    """Of every console script."""
    modules = [importlib.import_module(f"nnssl_ext.cli.{info.name}") for info in pkgutil.iter_modules(nnssl_ext.cli.__path__)]
    return sorted((parser_of(module.main) for module in modules if hasattr(module, "main")), key=lambda parser: parser.prog)


def names(action: argparse.Action) -> list[str]:
    return list(action.option_strings) or [action.dest]


def option(action: argparse.Action) -> str:
    """What a command line has to look like: required or not, number of values, choices."""
    parts = ["required" if action.required else "optional", "any value" if action.choices is None else " | ".join(map(str, action.choices))]
    return ", ".join(["no value" if action.nargs == 0 else parts[1] + ("" if action.nargs is None else f" x {action.nargs}"), parts[0]])


def checkpoint(pair: Pair) -> dict[str, Any]:
    """Kind or shape of everything in a checkpoint; hyper-parameters, plan and health by their names alone."""
    trainer = pair.trainer(Path(tempfile.gettempdir()) / "unused")
    trainer.initialize()
    content = trainer.state()
    shown = {key: kind(content[key]) for key in content if key not in ("optimizer_state", "plan", "config", "health_state", "versions")}
    return {
        **shown,
        "optimizer_state": sorted(content["optimizer_state"]),
        "config": sorted(content["config"]),
        "health_state": sorted(content["health_state"]),
    }


def kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): kind(part) for key, part in value.items()}
    return type(value).__name__


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Lines that say what appeared, disappeared or changed."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"{where}: {before} -> {now}"]
    gone = [f"{where}/{key}: gone" for key in before if key not in now]
    new = [f"{where}/{key}: new" for key in now if key not in before]
    return gone + new + [line for key in before if key in now for line in differences(before[key], now[key], f"{where}/{key}")]


if __name__ == "__main__":
    write_json(FROZEN, snapshot())
