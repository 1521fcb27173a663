"""Units side by side: the longest chain begins, what fails stops what needs it, the rest is told."""

import pytest

from nnssl_ext.benchmark.lanes import Progress, estimate, finish_all, missing
from nnssl_ext.benchmark.units import LATEST, RECORD, Unit, finish
from tests.toy_units import double


def unit(name, number=None, needs=None, cost=60.0, **more):
    return Unit(name, double, {"name": name} | ({} if number is None else {"number": number}), needs, cost, **more)


def test_what_begins_the_longest_chain_comes_first_and_nothing_twice(tmp_path):
    first, alone = unit("first", 1, cost=10), unit("alone", 2, cost=50)
    second, third = unit("second", needs=first, cost=30), unit("third", needs=first, cost=45)
    assert [one.name for one in missing([alone, second, third, first], tmp_path)] == ["first", "alone", "third", "second"]
    finish(first, tmp_path)
    assert [one.name for one in missing([alone, second, third], tmp_path)] == ["alone", "third", "second"]
    assert estimate([second, third, alone], tmp_path, 2) == "3 units, about 2 minutes of one core, 1 minutes with 2 lane(s)"


def test_only_what_needs_a_failed_unit_is_left_out(tmp_path):
    bad, said = unit("bad", -1), []
    units = [bad, unit("child", needs=bad), unit("good", 1), unit("grandchild", needs=unit("child", needs=bad))]
    (error,) = finish_all(units, tmp_path, 1, say=said.append)
    assert error.startswith("bad failed, negative") and "not begun, since they need it: child, grandchild" in error
    assert len(said) == 2 and units[2].record(tmp_path)["result"]["number"] == 2
    (again,) = finish_all(units, tmp_path, 1, say=said.append)
    assert "bad failed" in again and len(said) == 3  # what was finished isn't computed again, what failed is tried again


def test_a_unit_that_goes_on_keeps_its_folder_where_a_checkpoint_lies(tmp_path):
    for goes_on in (True, False):
        one = unit(f"one_{goes_on}", 1, goes_on=goes_on)
        folder = one.folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / LATEST).write_text("state")
        finish(one, tmp_path)
        assert (folder / LATEST).exists() == goes_on and (folder / RECORD).exists()


def test_cost_and_going_on_change_no_identity():
    assert unit("one", 1).digest == unit("one", 1, cost=5, goes_on=True).digest


def test_the_rest_is_told_at_the_pace_so_far():
    units = [unit(str(number), number) for number in range(4)]
    begin = unit("begin", 9, cost=1.0)
    assert Progress([begin, *units], 2).line(begin, 0.0, "") == "[1/5] begin 0 s; about 2 min left"  # it says nothing about the others
    progress = Progress(units, 2)
    assert progress.line(units[0], 120.0, "") == "[1/4] 0 120 s; about 2 min left"  # 3 minutes of work, half as long again, two lanes
    assert progress.line(units[1], 0.0, "broken") == "[2/4] 1 failed, broken; about 2 min left"
    progress.leave_out([units[2]])
    assert progress.line(units[3], 60.0, "") == "[3/3] 3 60 s"
    assert progress.rest == pytest.approx(0)
