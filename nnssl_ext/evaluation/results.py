"""Results of an evaluation as files: one line per measurement (CSV), the summary (JSON), a table for reading (Markdown)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, write_json


def check_writable(out: Path) -> None:
    """Raise a `UserError` unless files can be written beside `out`; told before hours of work."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder can't be made: {error.strerror or error}", out.parent, "check the path and its permissions") from error


def write_results(out: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write OUT.csv and OUT.json (`out` with or without one of these endings), each atomically; figures that don't exist stay empty and null.

    Args:
        out: path of the files.
        rows: lines of the CSV; the first one names the columns.
        summary: for the JSON.
    """
    base = out.with_suffix("") if out.suffix in (".csv", ".json") else out
    table, record = (base.with_name(base.name + ending) for ending in (".csv", ".json"))
    write_table(table, rows)
    write_json(record, {**without_nan(summary), "nnssl_ext": __version__})
    return table, record


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; the first one names the columns, figures that don't exist stay empty."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: "" if _unknown(value) else value for key, value in row.items()} for row in rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def without_nan(value: Any) -> Any:
    """A value for JSON: null in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if _unknown(value) else value
