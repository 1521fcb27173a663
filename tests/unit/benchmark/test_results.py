"""results.json and its comparison with an expected one."""

import copy
import json

from nnssl_ext.benchmark.grid import Planned
from nnssl_ext.benchmark.results import EMPTY, KEYS, differences, expected, write_results
from nnssl_ext.benchmark.suite import Method, Suite
from nnssl_ext.benchmark.units import RECORD, Unit
from nnssl_ext.core.files import write_json
from tests.toy_units import double

SUITE = Suite("small", (Method("MAETrainer", "resenc"),))
NAMED = {"kind": "segmentation", "method": "MAETrainer", "family": "resenc", "role": "method", "dataset": "Dataset902_X", "mode": "full", "labels": 2}
NAMED |= {"pretrain_seed": 0, "seed": 0}


def made(out):
    """Results of two finished units and a third that is missing."""
    tuned, probed = Unit("finetune", double, {"number": 1}), Unit("probe", double, {"number": 2})
    case = {"dice": 0.5, "nsd": None, "hd95_mm": 4.0, "labels": {"liver": {"dice": 0.5}}}
    found = {"cases": {"case_1": case}, "figures": {"dice": 0.5}, "pictures": {"a case": "overlay.png"}}
    probes = [{"labels": count, "figures": {"knn_dice": 0.1 * count}} for count in (1, 2)]
    for unit, runs in ((tuned, [found]), (probed, probes)):
        write_json(unit.folder(out) / RECORD, {"name": unit.name, "identity": {}, "result": {"runs": runs}, "seconds": 9.5, "cpu_seconds": 7.0})
    planned = [Planned(tuned, NAMED), Planned(probed, {**NAMED, "kind": "probe"}), Planned(Unit("missing", double, {"number": 3}), NAMED)]
    return write_results([*planned, Planned(tuned, None)], SUITE, out, "nnssl_benchmark -out x")


def test_results_have_what_a_report_reads(tmp_path):
    content = made(tmp_path)
    assert content == json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"version", "command", "suite", "environment", "digest", "runs"}
    assert content["suite"] == SUITE.as_dict() and content["environment"]["threads"] == 1
    for run in content["runs"]:
        assert set(run) == {*KEYS, *EMPTY, "seconds", "cpu_seconds", "record"} and (tmp_path / run["record"]).is_file()
    first, *probes = content["runs"]
    assert first["cases"]["case_1"]["labels"]["liver"]["dice"] == 0.5 and first["seconds"] == 9.5
    assert first["pictures"]["a case"] == str((tmp_path / first["record"]).parent.relative_to(tmp_path) / "overlay.png")
    assert [(run["kind"], run["labels"], run["figures"]["knn_dice"]) for run in probes] == [("probe", 1, 0.1), ("probe", 2, 0.2)]


def test_expected_numbers_are_compared_to_the_digit(tmp_path):
    content = made(tmp_path)
    write_json(tmp_path / "expected.json", expected(content))
    assert differences(content, tmp_path / "expected.json") == ([], False)
    slower = copy.deepcopy(content)
    slower["runs"][0]["seconds"] = 99.0
    for number, one in enumerate((content, slower)):
        one["runs"][0]["cases"]["case_1"] |= {"seconds": 1.0 + number, "cpu_seconds": 2.0 + number, "memory_gb": 3.0 + number}
    assert differences(slower, tmp_path / "expected.json") == ([], False)
    changed = copy.deepcopy(content)
    changed["runs"][0]["cases"]["case_1"]["hd95_mm"] += 1e-12
    (line,), may_differ = differences(changed, tmp_path / "expected.json")
    assert "1 of 5 numbers differ, most cases/case_1/hd95_mm" in line and not may_differ


def test_another_machine_suite_or_grid_is_told(tmp_path):
    content = made(tmp_path)
    write_json(tmp_path / "expected.json", expected(content))
    other = copy.deepcopy(content)
    other["environment"]["versions"]["torch"] = "0.0"
    other["suite"]["seeds"] = 9
    other["runs"] = other["runs"][1:]
    lines, may_differ = differences(other, tmp_path / "expected.json")
    assert may_differ and [line.split(":")[0] for line in lines] == ["another suite", "versions/torch", "missing"]
