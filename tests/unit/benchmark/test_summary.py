"""The tables of a benchmark: every figure is that of plain loops over the results file."""

import copy
import json
import math

import pytest

from nnssl_ext.benchmark.rows import passes
from nnssl_ext.benchmark.runs import read_results
from nnssl_ext.benchmark.summary import summarise, terminal_table, verdict
from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation.statistics import bootstrap_mean
from tests.make_results import BOUND, CONTROL, make_results


@pytest.fixture(scope="module")
def content():
    return make_results(cases=5)


@pytest.fixture(scope="module")
def summary(content, tmp_path_factory):
    return summarised(content, tmp_path_factory.mktemp("benchmark"))


def summarised(content, folder):
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return summarise(read_results(folder / "results.json"))


def chosen(content, **wanted):
    return [run for run in content["runs"] if all(run.get(key) == value for key, value in wanted.items())]


def test_every_segmentation_row_is_what_loops_over_its_runs_give(content, summary):
    assert len(summary["segmentation"]) == 4 * 3 + 3 + 1
    for row in summary["segmentation"]:
        where = {key: row[key] for key in ("method", "mode", "labels")}
        runs = chosen(content, kind="segmentation", **where)
        base = chosen(content, kind="segmentation", method="scratch", mode="full", labels=row["labels"])
        assert len(runs) == 3 and sorted(row["sources"]) == sorted(run["record"] for run in runs)
        means = [sum(run["cases"][case]["dice"] for run in runs) / 3 for case in runs[0]["cases"]]
        expected = bootstrap_mean(means)
        dice = row["metrics"]["dice"]
        assert [dice[key] for key in ("mean", "low", "high")] == pytest.approx([expected.mean, expected.low, expected.high])
        assert dice["each"] == pytest.approx([sum(case["dice"] for case in run["cases"].values()) / 5 for run in runs])
        assert ("gain" in dice) == (row["method"] not in ("scratch", BOUND))
        if "gain" not in dice:
            continue
        differences = [sum(run["cases"][case]["dice"] - other["cases"][case]["dice"] for case in run["cases"]) / 5 for run, other in zip(runs, base)]
        by_case = [sum(run["cases"][case]["dice"] - other["cases"][case]["dice"] for run, other in zip(runs, base)) / 3 for case in runs[0]["cases"]]
        expected, scratch = bootstrap_mean(by_case), sum(case["dice"] for run in base for case in run["cases"].values()) / 15
        gain = dice["gain"]
        assert [gain[key] for key in ("mean", "low", "high")] == pytest.approx([expected.mean, expected.low, expected.high])
        assert gain["each"] == pytest.approx(differences) and gain["above"] == sum(difference > 0 for difference in differences)
        assert gain["relative"] == pytest.approx(expected.mean / scratch)
        assert sorted(row["reference"]["sources"]) == sorted(run["record"] for run in base)


def test_a_case_that_a_run_has_no_figure_of_is_left_out_and_counted(content, summary):
    row = next(row for row in summary["segmentation"] if row["method"] == "scratch" and row["labels"] == 2)
    runs = chosen(content, kind="segmentation", method="scratch", labels=2)
    assert any(run["cases"]["case_000"]["hd95_mm"] is None for run in runs)
    known = [case for case in runs[0]["cases"] if case != "case_000"]
    assert row["metrics"]["hd95_mm"]["count"] == 4 and row["cases"] == 5
    assert row["metrics"]["hd95_mm"]["mean"] == pytest.approx(sum(run["cases"][case]["hd95_mm"] for run in runs for case in known) / 12)


def test_single_labels_and_the_other_kinds_are_those_of_loops(content, summary):
    row = next(row for row in summary["segmentation"] if (row["method"], row["mode"], row["labels"]) == ("MAETrainer", "full", 4))
    runs = chosen(content, kind="segmentation", method="MAETrainer", mode="full", labels=4)
    values = [case["labels"]["aorta"]["dice"] for run in runs for case in run["cases"].values()]
    assert row["dice_per_label"]["aorta"]["mean"] == pytest.approx(sum(values) / len(values))
    for kind, metric, reference in (("probe", "knn_dice", "random weights"), ("registration", "tre_mm", "MIND")):
        for row in summary[kind]:
            runs = chosen(content, kind=kind, method=row["method"], labels=row["labels"])
            base = chosen(content, kind=kind, method=reference, labels=row["labels"])
            mean, other = (
                sum(case[metric] for run in some for case in run["cases"].values()) / sum(len(run["cases"]) for run in some) for some in (runs, base)
            )
            assert row["metrics"][metric]["mean"] == pytest.approx(mean)
            if row["method"] not in (reference, "raw intensities"):  # which has one seed, and is compared with this one
                assert row["metrics"][metric]["gain"]["mean"] == pytest.approx(mean - other)
    for row in summary["classification"]:
        own = [run["figures"]["auc"] for run in chosen(content, kind="classification", method=row["method"])]
        assert row["metrics"]["auc"]["mean"] == pytest.approx(sum(one["mean"] for one in own) / len(own))
        assert row["metrics"]["auc"]["low"] == pytest.approx(sum(one["low"] for one in own) / len(own))


def test_the_cost_is_the_sum_over_runs(content, summary):
    for row in summary["cost"]:
        runs = chosen(content, method=row["method"])
        assert row["total"]["runs"] == len(runs) and row["total"]["seconds"] == pytest.approx(sum(run["seconds"] for run in runs))
        assert row["total"]["cpu_seconds"] == pytest.approx(sum(run["cpu_seconds"] for run in runs))


def test_the_order_of_the_runs_does_not_matter(content, summary, tmp_path):
    turned = {**content, "runs": content["runs"][::-1]}
    assert summarised(turned, tmp_path) == summary


def test_a_run_without_partner_is_in_the_mean_and_not_in_the_gain(content, tmp_path):
    changed = copy.deepcopy(content)
    failed = chosen(changed, kind="segmentation", method="scratch", labels=2)[1]
    failed |= {"error": "out of memory", "cases": {}}
    found = summarised(changed, tmp_path)
    row = next(row for row in found["segmentation"] if (row["method"], row["mode"], row["labels"]) == ("MAETrainer", "full", 2))
    assert len(row["metrics"]["dice"]["each"]) == 3 and len(row["metrics"]["dice"]["gain"]["each"]) == 2
    assert [one["error"] for one in found["failed"]] == ["out of memory"] and any("1 of" in remark for remark in found["remarks"])


def test_a_negative_control_is_judged_where_nothing_but_the_pretraining_differs(summary):
    rows = [row for row in summary["segmentation"] if row["method"] == CONTROL]
    assert {row["mode"] for row in rows} == {"full", "frozen"}
    assert all(("passed" in row) == (row["mode"] == "full") for row in rows)


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [(0.05, -0.01, 0.1, True), (0.015, 0.01, 0.02, True), (0.03, 0.01, 0.05, False), (-0.03, -0.05, -0.01, False), (0.03, None, None, False)],
)
def test_a_negative_control_passes_when_its_interval_holds_0_or_its_gain_is_negligible(mean, low, high, expected):
    assert passes({"mean": mean, "low": low, "high": high}) is expected


def test_a_difference_counts_when_the_interval_and_every_run_say_so():
    gain = {"mean": 0.1, "low": 0.05, "high": 0.2, "each": [0.1, 0.1, 0.1], "above": 3}
    assert verdict(gain) == "above" and verdict({**gain, "above": 2}) == "runs disagree"
    assert verdict({**gain, "low": -0.1}) == "open" and verdict({**gain, "low": None, "high": None}) == "unknown"
    assert verdict({**gain, "low": -0.2, "high": -0.1, "above": 0}) == "below"


def test_one_seed_and_one_case_are_said_to_be_few(tmp_path):
    found = summarised(make_results(seeds=1, cases=1, labels=(2,), kinds=("segmentation",)), tmp_path)
    row = next(row for row in found["segmentation"] if row["method"] == "MAETrainer" and row["mode"] == "full")
    assert row["metrics"]["dice"]["low"] is None and row["metrics"]["dice"]["gain"]["low"] is None
    assert any(remark.startswith("One run only") for remark in found["remarks"]) and any("1 test case:" in remark for remark in found["remarks"])
    assert "too few cases for an interval" in terminal_table(found)


def test_missing_controls_are_told(tmp_path):
    content = make_results(methods=("MAETrainer",), seeds=1, cases=2, labels=(2,), kinds=("segmentation",))
    content["runs"] = [run for run in content["runs"] if run["method"] != BOUND]
    remarks = summarised(content, tmp_path)["remarks"]
    assert any("No negative control" in remark for remark in remarks) and any("No upper bound" in remark for remark in remarks)


def test_the_terminal_shows_the_figures_of_the_tables(summary):
    text = terminal_table(summary)
    for row in summary["segmentation"]:
        assert f"{row['metrics']['dice']['mean']:.3f} [{row['metrics']['dice']['low']:.3f}," in text
    assert all(title in text for title in ("Segmentation", "Probe", "Classification", "Registration"))


def test_nothing_in_the_summary_is_nan(summary):
    def numbers(value):
        if isinstance(value, (dict, list)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from numbers(inner)
        elif isinstance(value, float):
            yield value

    assert all(math.isfinite(value) for value in numbers(summary))


@pytest.mark.parametrize("broken", [[], {"runs": 1}, {"runs": [{"kind": "dance", "method": "a"}]}, {"runs": [{"kind": "probe"}]}])
def test_a_broken_file_is_told(broken, tmp_path):
    with pytest.raises(UserError):
        summarised(broken, tmp_path)
