"""Many cases at once: a failure concerns its own case."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nnssl_ext.core.errors import DiskError, UserError
from nnssl_ext.preprocessing import parallel
from nnssl_ext.preprocessing.parallel import SomeFailed, Workers, run_all

ROOT = Path(__file__).parents[3]


def _square(number):
    if number == 3:
        raise UserError("three is bad", "here", "take four")
    if number == 5:
        raise ZeroDivisionError("five")
    if number == 7:
        raise DiskError("could not write: the disk is full", "there", "free it")
    return number**2


def test_failures_are_listed_at_the_end_and_the_others_are_done(capsys):
    results, failures = run_all(_square, [1, 3, 4, 5, 6], list("abcde"), Workers(1), "squares")
    assert results == {"a": 1, "c": 16, "e": 36}
    assert failures["b"] == "three is bad\n  where: here\n  fix: take four"
    assert failures["d"].startswith("unexpected ZeroDivisionError: five\n  where: ") and "test_parallel.py" in failures["d"]
    out = capsys.readouterr().out
    assert out.endswith(f"squares: 3 of 5 cases done, 2 failed:\nfailed: b: {failures['b']}\nfailed: d: {failures['d']}\n")


def test_a_full_disk_stops_the_work():
    with pytest.raises(DiskError, match="the disk is full"):
        run_all(_square, [1, 7, 3], list("abc"), Workers(1), "squares")


def test_progress_is_told_in_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "PLAIN_EVERY_S", 0.0)
    run_all(_square, [1, 2], list("ab"), Workers(1), "squares")
    assert "squares: 1 of 2, about 0 min left" in capsys.readouterr().out


SCRIPT = """
    import os, sys, time
    from nnssl_ext.preprocessing.parallel import Workers, run_all

    def work(number):
        if number == 2 or number == int(sys.argv[1]):
            os._exit(9)
        time.sleep(0.05)
        return number

    if __name__ == "__main__":
        results, failures = run_all(work, range(12), [str(i) for i in range(12)], Workers(2), "test")
        print(sorted(int(name) for name in results), sorted(failures), set(failures.values()))
"""


@pytest.mark.parametrize("second", [2, 9])
def test_a_worker_that_dies_loses_only_its_own_case(second, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ended = subprocess.run([sys.executable, str(script), str(second)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    dead = {2, second}
    expected = f"{[i for i in range(12) if i not in dead]} {sorted(str(i) for i in dead)} "
    assert expected in ended.stdout and "worker process died" in ended.stdout, ended.stdout + ended.stderr


def _some(numbers):
    bad = {f"case{n}": UserError(f"{n} is odd") for n in numbers if n % 2}
    if bad:
        raise SomeFailed(bad)
    return numbers


def test_an_item_of_several_cases_fails_case_by_case(capsys):
    results, failures = run_all(_some, [(2, 4), (1, 2, 3)], ["even", "mixed"], Workers(1), "sessions", cases=[2, 3])
    assert results == {"even": (2, 4)} and failures == {"case1": "1 is odd", "case3": "3 is odd"}
    assert "sessions: 3 of 5 cases done, 2 failed:" in capsys.readouterr().out
