"""Method files hold what their method alone has: none repeats a passage of another file of the trainers."""

from collections import defaultdict
from pathlib import Path

import nnssl_ext.trainers

RUN = 6  # lines in a row that two files may not share


def lines_of(text):
    """Its lines, but for blank ones, imports and what is inside an import over several lines."""
    kept, inside = [], False
    for line in map(str.strip, text.splitlines()):
        if inside or line.startswith(("import ", "from ")):
            inside = (inside or line.endswith("(")) and not line.startswith(")")
        elif line:
            kept.append(line)
    return kept


def shared(texts):
    """Pairs of names whose texts share a run of lines, with its first line."""
    places = defaultdict(dict)
    for name, text in texts.items():
        lines = lines_of(text)
        for start in range(len(lines) - RUN + 1):
            places[tuple(lines[start : start + RUN])].setdefault(name, start)
    found = {}
    for run, names in places.items():
        first, *others = names
        for other in others:
            found.setdefault((first, other), run[0])
    return [f"{first} and {other} share {RUN} lines from: {line}" for (first, other), line in found.items()]


def test_no_two_files_of_the_trainers_share_a_passage():
    files = sorted(Path(nnssl_ext.trainers.__file__).parent.glob("*.py"))
    assert len(files) > 20
    assert not shared({file.name: file.read_text(encoding="utf-8") for file in files})


def test_a_passage_that_is_shared_is_found_whatever_its_indentation_and_blank_lines():
    passage = [f"line {number}" for number in range(RUN)]
    imports = "from a import (\n    b,\n    c,\n)\nimport d\n"
    one, other = imports + "\n".join(passage) + "\nend", "begin\n    " + "\n\n    ".join(passage)
    assert shared({"one": one, "other": other}) == [f"one and other share {RUN} lines from: line 0"]
    assert shared({"one": one, "other": other.replace("line 3", "line three")}) == []
    assert shared({"one": imports * 3 + "a", "other": imports * 3 + "b"}) == []
