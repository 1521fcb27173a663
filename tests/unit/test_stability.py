"""The stability study counts what its runs recorded."""

import math

from benchmarks.stability import EPOCHS, figures, summarize, table
from nnssl_ext.core.files import write_json


def result(seed, stop=EPOCHS, alarm=None):
    records = [
        {"epoch": i, "health/dino/KL": 1 / (i + 1), "health/ibot/KL": 2 / (i + 1), "train/dino": 5.0, "train/ibot": None, "health/skipped_steps": i % 2}
        for i in range(stop)
    ]
    if alarm is not None:
        records[alarm]["alarms"] = ["the features have collapsed"]
    quality = {"random": {"knn_dice": 0.2}, "trained": {"knn_dice": 0.3 + 0.1 * seed}, "intensities": {"knn_dice": 0.25}}
    return {"seed": seed, "options": {}, "ended": "", "cpu_seconds": 10.0, "steps": 100, "records": records, "quality": quality}


def test_figures_are_those_of_the_windows_at_the_quarters_and_paired_by_seed():
    found = figures(result(1))
    assert [found[f"dino KL at {quarter} %"] for quarter in (25, 50, 75, 100)] == [1 / 5, 1 / 10, 1 / 15, 1 / 20]
    assert found["skipped_steps"] == EPOCHS // 2 and found["alarms"] == 0 and math.isclose(found["knn_dice gain"], 0.2)


def test_a_run_that_ended_early_has_no_figures_of_what_it_never_reached(tmp_path):
    found = figures(result(0, stop=6, alarm=5))
    assert found["alarms"] == 1 and found["dino KL at 25 %"] == 1 / 5
    assert found["dino KL at 50 %"] is None or math.isnan(found["dino KL at 50 %"])


def test_the_table_has_a_column_for_each_variant_and_reads_only_finished_runs(tmp_path):
    for seed in (0, 2):
        write_json(tmp_path / f"healthy_{seed}.json", result(seed))
    write_json(tmp_path / "hot_0.json", result(0, stop=6, alarm=5))
    summary = summarize(tmp_path, ("healthy", "hot", "no_centring"), (0, 1, 2))
    assert summary["healthy"]["seeds"] == [0, 2] and summary["hot"]["alarms_at"] == [[(6, "the features have collapsed")]]
    lines = table(summary).splitlines()
    assert lines[0] == "| | healthy (2 seeds) | hot (1 seeds) |"
    assert "| knn dice gain | 0.2 (0.1 to 0.3) | 0.1 (0.1 to 0.1) |" in lines
