"""Figures of label maps whose overlap is known; what is compared with what; the command from files."""

import csv
import json
import math

import numpy as np
import pytest

from nnssl_ext.cli.evaluate_segmentation import main
from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation.segmentation_metrics import case_means, compare, evaluate, segmentation_metrics
from tests.make_raw import write_image

SPACING = (3.0, 2.0, 1.0)


def boxes(shift=0, **edges):
    """Labels (z, y, x): 1 a cube of 6 voxels, moved along z; 2 another one where `second` is given."""
    labels = np.zeros((20, 16, 14), np.uint8)
    labels[4 + shift : 10 + shift, 3:9, 2:8] = 1
    if edges.get("second"):
        labels[12:16, 10:14, 9:13] = 2
    return labels


def write(folder, **maps):
    for case, labels in maps.items():
        write_image(folder / f"{case}.nii.gz", labels, SPACING)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Reference and two methods: `a` is right but for one case, `b` is off by one voxel everywhere."""
    reference = write(tmp_path / "ref", one=boxes(second=True), two=boxes(), three=boxes())
    ours = write(tmp_path / "a", one=boxes(second=True), two=boxes(), three=boxes(2))
    other = write(tmp_path / "b", one=boxes(1), two=boxes(1), three=boxes(1), four=boxes())
    return ours, reference, other


def test_figures_of_a_moved_cube():
    found = segmentation_metrics(boxes(2), boxes(), SPACING, [1, 2], 2.0)
    assert found[1]["dice"] == pytest.approx(4 / 6) and found[1]["hd95"] == pytest.approx(6.0) and 0 < found[1]["nsd"] < 1
    assert all(math.isnan(value) for value in found[2].values())  # in neither


def test_a_label_in_one_map_only_has_no_distance_and_no_overlap():
    for predicted, known in ((boxes(), boxes(second=True)), (boxes(second=True), boxes())):
        found = segmentation_metrics(predicted, known, SPACING, [2], 2.0)[2]
        assert found["dice"] == found["nsd"] == 0.0 and math.isnan(found["hd95"])


def test_a_case_is_the_mean_of_its_labels_and_the_dataset_of_its_cases(folders):
    ours, reference, other = folders
    (found,) = evaluate([ours], reference, 2.0)
    assert sorted(found) == [(case, label) for case in ("one", "three", "two") for label in (1, 2)]
    means = case_means(found, "dice", [1, 2])
    assert means == pytest.approx({"one": 1.0, "two": 1.0, "three": 4 / 6})
    whole = next(one for one in compare(found) if (one.metric, one.label) == ("dice", None))
    assert (whole.ours.mean, whole.ours.count, whole.gain) == (pytest.approx(np.mean([1, 1, 4 / 6])), 3, None)


def test_two_methods_are_compared_on_the_labels_that_both_have_a_figure_for(folders):
    ours, reference, other = folders
    found = {(one.metric, one.label): one for one in compare(*evaluate([ours, other], reference, 2.0))}
    dice = found["dice", None]
    assert dice.ours.mean == pytest.approx(np.mean([1, 1, 4 / 6])) and dice.base.mean == pytest.approx(np.mean([(5 / 6 + 0) / 2, 5 / 6, 5 / 6]))
    assert dice.gain.mean == pytest.approx(dice.ours.mean - dice.base.mean) and dice.gain.low <= dice.gain.mean <= dice.gain.high
    away = found["hd95", None]  # the second method misses label 2 of case one: there only label 1 counts, for both
    assert away.ours.mean == pytest.approx(np.mean([0, 0, 6])) and away.base.mean == pytest.approx(3.0) and away.ours.count == 3
    assert found["hd95", 2].ours.count == 0 and math.isnan(found["hd95", 2].gain.mean)


def test_equal_predictions_differ_by_exactly_nothing(folders):
    ours, reference, _ = folders
    for one in compare(*evaluate([ours, ours], reference, 2.0)):
        assert one.gain.mean == 0.0 and one.gain.low in (0.0, pytest.approx(math.nan, nan_ok=True))


def test_the_command_writes_each_figure_and_prints_a_table(folders, tmp_path, capsys):
    ours, reference, other = folders
    assert main(["-pred", str(ours), "-ref", str(reference), "-compare", str(other), "-out", str(tmp_path / "new" / "organs.json")]) == 0
    told = capsys.readouterr().out
    assert "| dice      | all   | 3     | 0.889 [0.667, 1.000] |" in told and "gain [95 % CI]" in told
    with open(tmp_path / "new" / "organs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 and rows[0]["method"] == "a" and [row for row in rows if row["case"] == "two" and row["label"] == "2"][0]["dice"] == ""
    record = json.loads((tmp_path / "new" / "organs.json").read_text(encoding="utf-8"))
    entry = next(one for one in record["comparisons"] if one["metric"] == "hd95" and one["label"] == 2)
    assert entry["gain"]["mean"] is None and record["tolerance_mm"] == 2.0
    assert main(["-pred", str(ours), "-ref", str(reference), "-out", str(tmp_path / "alone")]) == 0
    assert "gain" not in capsys.readouterr().out and (tmp_path / "alone.csv").is_file()


def test_predictions_are_missing(folders, tmp_path):
    ours, reference, other = folders
    with pytest.raises(UserError, match="1 of 4 cases of the reference have no prediction: four"):
        evaluate([ours], other, 2.0)
    with pytest.raises(UserError, match="no case is common to both folders"):
        evaluate([write(tmp_path / "names", another=boxes())], reference, 2.0)
    with pytest.raises(UserError, match="holds no label maps"):
        evaluate([tmp_path / "nowhere"], reference, 2.0)


def test_maps_that_cannot_be_compared_are_refused(folders, tmp_path):
    _, reference, _ = folders
    shifted = tmp_path / "shifted"
    for case in ("one", "two", "three"):
        write_image(shifted / f"{case}.nii.gz", boxes(), SPACING, (0.0, 0.0, 0.0))
    with pytest.raises(UserError, match="isn't on the grid of the reference"):
        evaluate([shifted], reference, 2.0)
    soft = write(tmp_path / "soft", **{case: boxes().astype(np.float32) / 2 for case in ("one", "two", "three")})
    with pytest.raises(UserError, match="no label map"):
        evaluate([soft], reference, 2.0)
    empty = write(tmp_path / "empty", one=0 * boxes())
    with pytest.raises(UserError, match="no foreground"):
        evaluate([empty], empty, 2.0)


@pytest.mark.parametrize("value", ["-1", "two", "nan"])
def test_a_tolerance_that_is_no_length_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        main(["-pred", "a", "-ref", "b", "-out", "c", "-tolerance", value])
    assert "is no length in mm" in capsys.readouterr().err
