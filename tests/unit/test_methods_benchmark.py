"""The table of what the methods cost."""

from benchmarks.common import summarize
from benchmarks.methods import methods, table


def test_a_method_that_takes_twice_as_long_as_its_peer_is_said_to():
    detail = {"family": "resenc", "wall_s": {"ours": 0.4, "peer": 0.2}, "above_base_gb": 0.3, "above_base_of_peer": 1.5}
    lines = table({"B": summarize([1.0, 1.0], [0.5, 0.4], "A", "CPU-s", detail), "A": summarize([1.0], [1.0], "A", "CPU-s", detail)}).splitlines()
    assert lines[2].startswith("| A |") and lines[3] == "| B | resenc | 1.000 | 0.400 | 2.22 (2.00 to 2.50) | 0.300 | 1.50 |"
    assert {line.count("|") for line in lines} == {8}


def test_every_method_can_be_measured():
    assert {cls.default_family for cls in methods().values()} <= {"resenc", "primus"} and "MAETrainer" in methods()
