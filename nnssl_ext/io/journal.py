"""Records that survive an interruption: each process appends to a file of its own, a later run takes them up."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import DiskError
from nnssl_ext.core.files import write_text

_ALL = "all.jsonl"  # what `compact` leaves


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to the journal in `folder`; several processes of several hosts may do so at once.

    Raises:
        DiskError: it can't be written.
    """
    file = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    content = f"\n{_line(record)}\n".encode()  # the first line break ends a line that was cut off by a kill
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while content:
                content = content[os.write(handle, content) :]
        finally:
            os.close(handle)
    except OSError as error:
        raise DiskError(f"could not write: {error.strerror}", file, "free or change the disk and run the same command again") from error


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """All whole records of a journal, those of an earlier `compact` first; cut-off and damaged lines are left out."""
    for file in sorted(folder.glob("*.jsonl"), key=lambda file: (file.name != _ALL, file.name)):
        with open(file, "rb") as lines:
            for line in lines:
                checksum, _, text = line.rstrip(b"\n").partition(b" ")
                if text and checksum == b"%08x" % zlib.crc32(text):
                    yield json.loads(text)


def compact(folder: Path, kept: Iterable[dict[str, Any]]) -> None:
    """Replace the journal by these records."""
    write_text(folder / _ALL, "".join(f"{_line(record)}\n" for record in kept))
    for file in folder.glob("*.jsonl"):
        if file.name != _ALL:
            file.unlink()


def _line(record: dict[str, Any]) -> str:
    text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}"
