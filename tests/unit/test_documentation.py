"""The documentation agrees with the code, its links lead somewhere, and they lead everywhere."""

import re
from pathlib import Path

import pytest

from documentation.generate import PAGES

ROOT = Path(__file__).parents[2]
MARKDOWN = [path for path in ROOT.rglob("*.md") if not any(part.startswith(".") or part == "demo" for part in path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("page", list(PAGES), ids=lambda page: page.name)
def test_a_generated_page_is_up_to_date(page):
    assert page.read_text(encoding="utf-8") == PAGES[page](), "run: python -m documentation.generate"


def without_code(page):
    """Text of a page, without its blocks of code: a # is a heading here."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


def links(page):
    """(file or folder, anchor or "") of each link of a page that stays inside the repository."""
    found = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", without_code(page))
    return [((page.parent / target).resolve() if target else page, anchor) for target, anchor in found if "://" not in target]


def anchors(page):
    """Names that a page's headings have as targets of links, by GitHub's rule."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_code(page))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def reachable():
    """The pages to which links lead from the README; a folder stands for the README in it."""
    found, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in found:
            found.add(page)
            targets = (target / "README.md" if target.is_dir() else target for target, _ in links(page))
            ahead += [target for target in targets if target.suffix == ".md" and target.is_file()]
    return found


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_inside_the_repository_lead_to_files_and_headings(page):
    for target, anchor in links(page):
        assert target.exists(), f"{page.name}: {target}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading for #{anchor}"


def test_every_page_is_reached_from_the_readme_by_links():
    lost = {str(page.relative_to(ROOT)) for page in MARKDOWN} - {str(page.relative_to(ROOT)) for page in reachable()}
    assert not lost, "link them from documentation/README.md"


def test_the_index_names_every_command_and_a_page_about_it_does_too():
    scripts = re.search(r"(?ms)^\[project.scripts\]$(.*?)^\[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    commands = re.findall(r"(?m)^(nnssl_\w+) = ", scripts[1])
    index = (ROOT / "documentation" / "README.md").read_text(encoding="utf-8")
    pages = [ROOT / "README.md", *(ROOT / "documentation" / "how-to").glob("*.md")]
    said = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert commands
    for command in commands:
        assert re.search(rf"\b{command}\b", index), f"documentation/README.md lacks {command}"
        assert re.search(rf"\b{command}\b", said), f"no page says how to use {command}"
