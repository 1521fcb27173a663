"""Self-contained HTML pages: text, tables and pictures in one file, no external request."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from nnssl_ext import __version__
from nnssl_ext.core.files import write_text


@dataclass
class Section:
    """A heading with parts below it, in the order in which they are added."""

    title: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.parts.append({"kind": "text", "text": text})

    def list(self, items: Sequence[str]) -> None:
        self.parts.append({"kind": "list", "entries": items})

    def code(self, text: str) -> None:
        self.parts.append({"kind": "code", "text": text})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are shown with four significant digits, NaN as a dash."""
        self.parts.append({"kind": "table", "header": header, "rows": [[_cell(value) for value in row] for row in rows]})

    def image(self, picture: Path | Figure, caption: str) -> None:
        """A PNG file or a matplotlib figure."""
        if isinstance(picture, Figure):
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=90)
            content = buffer.getvalue()
        else:
            content = picture.read_bytes()
        self.parts.append({"kind": "image", "data": base64.b64encode(content).decode(), "caption": caption})


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], note: str = "") -> None:
    """Write a page.

    Args:
        path: HTML file.
        title: heading.
        lead: what the page shows, one or two sentences.
        sections: its content.
        note: what a reader must not overlook, in a box.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("nnssl_ext.evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    today = datetime.date.today().isoformat()
    write_text(path, environment.get_template("page.html").render(title=title, lead=lead, note=note, sections=sections, version=__version__, date=today))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " × ".join(_cell(v) for v in value)
    return str(value)
