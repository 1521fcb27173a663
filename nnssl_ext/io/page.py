"""Self-contained HTML pages: text, tables and pictures in one file, no external request."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from nnssl_ext import __version__
from nnssl_ext.core.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    def charts(self, charts: Sequence[tuple[str, str, str]]) -> None:
        """Charts side by side: title, what it means ("" to say nothing) and SVG (see `curves`) of each."""
        self.parts.append({"kind": "charts", "charts": charts})

    def image(self, picture: Path | Figure, caption: str) -> None:
        """A PNG file or a matplotlib figure."""
        if isinstance(picture, Path):
            content = picture.read_bytes()
        else:
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=90)
            content = buffer.getvalue()
        self.parts.append({"kind": "image", "data": base64.b64encode(content).decode(), "caption": caption})


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], note: str = "", template: str = "page.html", **values: Any) -> None:
    """Write a page.

    Args:
        path: HTML file.
        title: heading.
        lead: what the page shows, one or two sentences.
        sections: its content.
        note: what a reader must not overlook, in a box.
        template: file of the folder templates; a special page's extends page.html.
        values: what such a template shows besides.
    """
    today = datetime.date.today().isoformat()
    values |= {"title": title, "lead": lead, "note": note, "sections": sections, "version": __version__, "date": today}
    write_text(path, _template(template).render(**values))


@cache
def _template(name: str) -> jinja2.Template:
    return jinja2.Environment(loader=jinja2.PackageLoader("nnssl_ext.io"), autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " × ".join(_cell(v) for v in value)
    return str(value)
