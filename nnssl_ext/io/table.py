"""`cases.csv` -> cases: one line per image file."""

from __future__ import annotations

import csv
import difflib
from pathlib import Path

from nnssl_ext.core.errors import UserError
from nnssl_ext.io.case import MASKS, Case, join_name, resolve, stem

COLUMNS = ("image", "subject", "session", "modality", "identifier", "channel", *MASKS)
UNKNOWN = "unknown"  # modality of an image that has none; normalised as everything but CT: z-score in the body


def read_table(file: Path) -> list[Case]:
    """The cases of a table, in the order of their first lines.

    Columns: `image` (needed; a path as in `pretrain_data.json`), `subject` (default: the case itself), `session` (default: 1), `modality` (default:
    unknown), `identifier` (default: subject, session and the image's name), `channel` (0, 1, ...: lines of one identifier, or without it of one subject
    and session, are channels of one case), `anatomy_mask`, `anonymization_mask`. Other columns are ignored. Separator: comma, semicolon or tab.

    Raises:
        UserError: no column `image`, a misspelt one, a line without image or with too many fields, channels that are not 0, 1, ...
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the table is not UTF-8: {error.reason}", file, "save it as UTF-8") from None
    start = next((number for number, line in enumerate(lines) if line.strip()), 0)
    head = lines[start]
    rows = csv.reader(lines[start:], delimiter=max(",;\t", key=head.count))
    columns = [name.strip().lower() for name in next(rows, [])]
    _check_columns(columns, file)
    groups: dict[str, dict[int, tuple[int, dict[str, str]]]] = {}
    for values in rows:
        line = start + rows.line_num
        if not any(value.strip() for value in values):
            continue
        if len(values) > len(columns):
            raise _error(f"{len(values)} fields, the first line names {len(columns)} columns", file, line, "put fields with a separator in quotes")
        row = {column: value.strip() for column, value in zip(columns, values) if column in COLUMNS and value.strip()}
        if "image" not in row:
            raise _error("the line names no image", file, line, "fill the column image")
        channel, name = _channel(row, file, line), _identifier(row)
        if channel in groups.setdefault(name, {}):
            what = f"channel {channel} of case {name}" if "channel" in row else f"the case {name}"
            raise _error(f"{what} is named in line {groups[name][channel][0]} already", file, line, "give each image an identifier or channel of its own")
        groups[name][channel] = (line, row)
    return [_case(name, channels, file) for name, channels in groups.items()]


def _check_columns(columns: list[str], file: Path) -> None:
    twice = [name for name in columns if name in COLUMNS and columns.count(name) > 1]
    if "image" not in columns or twice:
        what = f"the column {twice[0]} is there twice" if twice else "the first line names no column 'image'"
        raise _error(what, file, 1, f"columns: {', '.join(COLUMNS)}")
    for name in set(columns) - set(COLUMNS):
        close = [known for known in difflib.get_close_matches(name, COLUMNS, 1, 0.8) if known not in columns]
        if close:
            raise _error(f"unknown column '{name}'", file, 1, f"did you mean '{close[0]}'? Otherwise rename it")


def _channel(row: dict[str, str], file: Path, line: int) -> int:
    text = row.get("channel", "0")
    if not text.isdecimal():
        raise _error(f"the channel '{text}' is no number", file, line, "number the channels of a case 0, 1, ...")
    return int(text)


def _identifier(row: dict[str, str]) -> str:
    if "identifier" in row:
        return join_name(row["identifier"])
    visit = [row[key] for key in ("subject", "session") if key in row]
    return join_name(*visit) if "channel" in row and visit else join_name(*visit, stem(Path(row["image"]).name))


def _case(name: str, channels: dict[int, tuple[int, dict[str, str]]], file: Path) -> Case:
    line, first = channels[min(channels)]
    if sorted(channels) != list(range(len(channels))):
        raise _error(f"case {name} has the channels {sorted(channels)}", file, line, "number the channels of a case 0, 1, ...")
    rows = [channels[channel][1] for channel in sorted(channels)]
    for key in ("subject", "session"):
        if len({row.get(key) for row in rows}) > 1:
            raise _error(f"the channels of case {name} name different {key}s", file, line, "give each case an identifier of its own")
    masks = {key: next((resolve(row[key], file) for row in rows if key in row), None) for key in MASKS}
    images, modalities = tuple(resolve(row["image"], file) for row in rows), tuple(row.get("modality", UNKNOWN) for row in rows)
    return Case(name, first.get("subject", name), first.get("session", "1"), images, modalities, **masks)


def _error(what: str, file: Path, line: int, fix: str) -> UserError:
    return UserError(what, f"{file}, line {line}", fix)
