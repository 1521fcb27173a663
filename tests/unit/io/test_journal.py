"""Records of several processes, some of them killed while they wrote."""

import pytest

from nnssl_ext.core.errors import DiskError
from nnssl_ext.io import journal


def test_records_come_back_in_the_order_in_which_they_were_added(tmp_path):
    added = [{"name": f"ü{number}", "value": number / 3} for number in range(5)]
    for record in added:
        journal.append(tmp_path / "journal", record)
    assert list(journal.records(tmp_path / "journal")) == added


@pytest.mark.parametrize("kept", range(1, 40, 3))
def test_a_line_that_was_cut_off_costs_only_itself(tmp_path, kept):
    journal.append(tmp_path, {"name": "first"})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    journal.append(tmp_path, {"name": "second", "long": "x" * 40})
    file.write_bytes(file.read_bytes()[: len(whole) + kept])
    journal.append(tmp_path, {"name": "third"})
    assert [record["name"] for record in journal.records(tmp_path)] == ["first", "third"]


def test_a_changed_byte_is_noticed(tmp_path):
    journal.append(tmp_path, {"name": "first", "value": 1})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b"1}", b"2}"))
    assert list(journal.records(tmp_path)) == []


def test_compacting_leaves_one_file_with_what_is_kept(tmp_path):
    for name in "abc":
        journal.append(tmp_path, {"name": name})
    journal.compact(tmp_path, [{"name": "b"}])
    assert [file.name for file in tmp_path.iterdir()] == ["all.jsonl"]
    journal.append(tmp_path, {"name": "d"})
    assert [record["name"] for record in journal.records(tmp_path)] == ["b", "d"]


def test_a_journal_that_cannot_be_written_stops_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not write"):
        journal.append(tmp_path / "file", {})
