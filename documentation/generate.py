"""``python -m documentation.generate``: the pages made from the code, reference/cli.md and methods/index.md."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import nnssl_ext.cli
from nnssl_ext.core.files import write_text
from nnssl_ext.core.registry import PLUGIN_VARIABLE, all_classes
from nnssl_ext.trainers.base import SSLTrainer

HERE = Path(__file__).parent
NOTE = "<!-- made by `python -m documentation.generate`; change the code instead -->"
COMMON = ("help", "version", "verbose", "print_completion")  # options of every command


def command_line() -> str:
    """The page about the commands, from their parsers."""
    parts = [
        f"{NOTE}\n\n# Commands",
        "Every command also takes `--help`, `--version` and `--verbose` (shows the traceback of an error).\n\n"
        "Exit codes: 0 done, 1 some cases failed (they are listed), 2 a mistake that the message says how to mend, 70 an internal error, 130 interrupted.",
    ]
    parsers = []
    for info in pkgutil.iter_modules(nnssl_ext.cli.__path__):
        module = importlib.import_module(f"nnssl_ext.cli.{info.name}")
        if hasattr(module, "main"):
            parsers.append(parser_of(module.main))
    for parser in sorted(parsers, key=lambda p: p.prog):
        rows = [_row(action) for action in parser._actions if action.dest not in COMMON]
        table = "\n".join(["| argument | meaning |", "|---|---|", *rows])
        example = re.sub(r"(?m)^example:\n\s*", "", parser.epilog or "").strip()
        parts.append(f"## {parser.prog}\n\n{parser.description}\n\n```\n{example}\n```\n\n{table}")
    return "\n\n".join(parts) + "\n"


class _Parsed(Exception):
    """Carries the parser out of a command that is about to use it."""


def parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser that a command's `main` builds; the command doesn't run."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Parsed(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main([])
        except _Parsed as caught:
            parser: argparse.ArgumentParser = caught.args[0]
            return parser
    raise AssertionError(f"{main} parses no arguments")


def _row(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or (str(action.metavar) if action.metavar else action.dest)
    value = "" if action.nargs == 0 or not action.option_strings else " " + _value(action)
    values = {**vars(action), "prog": ""}
    text = (action.help or "") % values
    return f"| `{name}{value}` | {text}{' (required)' if action.required and action.option_strings else ''} |".replace(" ` |", "` |")


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    name = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else str(action.metavar or action.dest.upper())
    return f"{name} ..." if action.nargs in ("+", "*") else name


def methods() -> str:
    """The index of the methods, from the trainers that are found."""
    former = os.environ.pop(PLUGIN_VARIABLE, None)
    try:
        found = all_classes(SSLTrainer, "nnssl_ext.trainers")
    finally:
        if former is not None:
            os.environ[PLUGIN_VARIABLE] = former
    rows = ["| trainer | what it does | backbone must offer | default family | source |", "|---|---|---|---|---|"]
    settings = []
    for name, cls in sorted(found.items()):
        summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
        source = re.search(r"Source:\s*(.+?)\.?\s*\Z", rest, re.DOTALL)
        module = cls.__module__.rsplit(".", 1)[-1]
        title = f"[{name}]({module}.md)" if (HERE / "methods" / f"{module}.md").is_file() else name
        needs = " or ".join(" + ".join(sorted(group)) for group in cls.needs)
        rows.append(f"| {title} | {summary} | {needs} | {cls.default_family} | {' '.join(source[1].split()) if source else ''} |")
        settings.append(_settings(name, cls.Config))
    shared = "Hyper-parameters are set with `-o KEY=VALUE ...`; `None` means that the recipe of the backbone family decides (`nnssl_ext/trainers/optim.py`)."
    tables = [_settings("all methods", SSLTrainer.Config), *settings]
    return "\n\n".join([NOTE, "# Methods", "\n".join(rows), shared, "\n".join(filter(None, tables))])


def _settings(title: str, config: type) -> str:
    """A table of the hyper-parameters that a Config class itself declares, with the comments beside them."""
    own = vars(config).get("__annotations__", {})
    if title != "all methods" and config is SSLTrainer.Config:
        own = {}
    comments = dict(re.findall(r"(?m)^\s*(\w+)\s*:.*?#\s*(.+)$", inspect.getsource(config)))
    rows = [f"| `{f.name}` | {_default(f.default)} | {comments.get(f.name, '')} |" for f in dataclasses.fields(config) if f.name in own]
    return "\n".join([f"## {title[0].upper() + title[1:]}", "", "| key | default | meaning |", "|---|---|---|", *rows, ""]) if rows else ""


def _default(value: object) -> str:
    return f"`{value}`"


PAGES = {HERE / "reference" / "cli.md": command_line, HERE / "methods" / "index.md": methods}


def main() -> None:
    for path, make in PAGES.items():
        write_text(path, make())


if __name__ == "__main__":
    main()
