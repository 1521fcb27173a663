"""The tutorial does what it says: its shell blocks run in order, as they stand, and print what the page quotes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from documentation.generate import parser_of
from nnssl_ext.cli import evaluate_probe, evaluate_segmentation, finetune, plan_and_preprocess, plan_experiment, train, verify

PAGE = Path(__file__).parents[2] / "documentation" / "tutorial.md"
COMMANDS = (evaluate_probe, evaluate_segmentation, finetune, plan_and_preprocess, plan_experiment, train, verify)
PARTS = re.compile(r"(?P<dots>\.\.\.)|(?P<number>[+-]?\d+(?:\.\d+)?)|(?P<space>\s+)|.")
ANY = {"dots": ".*", "number": r"[+-]?\d+(?:\.\d+)?", "space": r"\s*"}  # in a quoted line: `...` is anything, a number any number, space any space
QUICK = 4  # blocks that every run of the tests executes: up to the preprocessed store


class Step(NamedTuple):
    """A shell block and the lines that the page quotes of its output."""

    commands: str
    quoted: list[str]


def steps(page: str) -> list[Step]:
    found: list[Step] = []
    for language, content in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page):
        if language == "bash":
            found.append(Step(content, []))
        else:
            assert language == "text" and found, "a block is either bash, which is executed, or text, which is its output"
            found[-1].quoted.extend(line for line in content.splitlines() if line.strip("| -.:"))
    return found


STEPS = steps(PAGE.read_text(encoding="utf-8"))


def execute(chosen: list[Step], folder: Path) -> list[str]:
    """What each step prints, run one after the other in one shell that ends at the first error."""
    end = "----- end of step {} -----"
    script = "\n".join(f"{step.commands}\necho; echo '{end.format(number)}'" for number, step in enumerate(chosen))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=dict(os.environ) | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    rest, printed = done.stdout, []
    for number in range(len(chosen)):
        text, rest = rest.split(end.format(number), 1)
        printed.append(text)
    return printed


def pattern(quoted: str) -> re.Pattern[str]:
    """What a quoted line stands for."""
    return re.compile("".join(ANY.get(str(part.lastgroup)) or re.escape(part[0]) for part in PARTS.finditer(quoted.strip())))


def check(chosen: list[Step], printed: list[str]) -> None:
    for step, text in zip(chosen, printed, strict=True):
        lines = text.splitlines()
        for quoted in step.quoted:
            assert any(pattern(quoted).search(line) for line in lines), f"not printed: {quoted}\n{text[-4000:]}"


def test_a_quoted_line_is_found_whatever_its_numbers_are_and_no_other_one():
    assert pattern("| dice | all | 8 | 0.012 [0.010, 0.014] | -0.003 |").search("| dice   | all | 16 | 0.112 [0.01, 0.2] | +0.5 |")
    assert pattern("page: .../integrity.html").search("page: /home/me/trial/integrity.html")
    assert not pattern("24 ok, 0 with warnings").search("24 ok, no warnings")


def test_every_command_of_the_page_has_the_options_that_it_is_given():
    parsers = {parser.prog: parser for parser in (parser_of(module.main) for module in COMMANDS)}
    used = set()
    for step in STEPS:
        for line in step.commands.replace("\\\n", " ").splitlines():
            if line.startswith("nnssl_"):
                name, *arguments = shlex.split(line)
                parsers[name].parse_args(arguments)
                used.add(name)
    assert used == set(parsers)


def test_the_first_steps_run_and_print_what_is_quoted(tmp_path):
    check(STEPS[:QUICK], execute(STEPS[:QUICK], tmp_path))


@pytest.mark.slow
@pytest.mark.nnunet
def test_all_steps_run_and_print_what_is_quoted(tmp_path):
    check(STEPS, execute(STEPS, tmp_path))
    assert all((tmp_path / "trial" / name).is_file() for name in ("probe.csv", "probe.json", "report.csv", "report.json"))
