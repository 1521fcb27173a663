"""What all commands share: a reader of their output that goes away is no error of theirs."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from nnssl_ext.cli import common
sys.exit(common.run(common.parser("program", "description", "example"), lambda options: print("text" * int(sys.argv[1])), sys.argv[2:]))
"""


@pytest.mark.parametrize("arguments", [["1", "--help"], ["1", "--version"], ["1", "--print-completion", "bash"], ["1"], ["100000"]], ids=lambda a: " ".join(a))
def test_nothing_is_said_when_nobody_reads(arguments):
    if "--print-completion" in arguments:
        pytest.importorskip("shtab")
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)
