"""The documentation agrees with the code, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from documentation.generate import PAGES

ROOT = Path(__file__).parents[2]
MARKDOWN = [path for path in ROOT.rglob("*.md") if not any(part.startswith(".") or part == "demo" for part in path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("page", list(PAGES), ids=lambda page: page.name)
def test_a_generated_page_is_up_to_date(page):
    assert page.read_text(encoding="utf-8") == PAGES[page](), "run: python -m documentation.generate"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_inside_the_repository_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
