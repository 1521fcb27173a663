"""Cells, their labels and patches against plain loops; which volumes teach and which test; the command from raw volumes."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from nnssl_ext.cli.evaluate_probe import main
from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation import token_probe
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.evaluation.probe import OUTSIDE, linear_classifier
from nnssl_ext.evaluation.token_probe import (
    PURITY,
    RANDOM,
    RAW_PATCHES,
    Tokens,
    _judge,
    balanced,
    evaluate,
    find_labelled,
    raw_patches,
    summary,
    tokens_of,
    volumes_wanted,
    whole_cells,
)
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.preprocessing.preprocessor import Finished
from tests.make_data import tiny_plan
from tests.make_nnunet import make_checkpoint
from tests.make_raw import body_volume, labelled_dataset, write_image

CELL = (2, 4, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c.pth", "primus", plan=tiny_plan())


@pytest.fixture
def dataset(folders):
    """Three labelled volumes to learn from, and two for the test."""
    folder = labelled_dataset(folders["nnssl_raw"])
    for case in (3, 4):
        array = body_volume(index=case)
        write_image(folder / "imagesTs" / f"case{case}_0000.nii.gz", array)
        write_image(folder / "labelsTs" / f"case{case}.nii.gz", ((array > -500).astype(np.uint8) + (array > 70)).astype(np.uint8))
    return folder


def volume(shape=(7, 9, 6)):
    rng = np.random.default_rng(0)
    labels = (rng.random(shape) ** 2 * 3).astype(np.int16)
    labels[:, :, 3:] = 1  # and some that are pure
    labels[0, 0, 0] = OUTSIDE
    return Finished(rng.normal(size=(2, *shape)).astype(np.float32), {"fill": [-3.0, -4.0]}, {"labels": labels})


def cells_of(array, cell, fill):
    """Values of every cell, (d, h, w, voxels), by loops."""
    shape = [-(-n // edge) for n, edge in zip(array.shape, cell)]
    found = np.zeros((*shape, int(np.prod(cell))))
    for at in np.ndindex(*shape):
        values = []
        for offset in np.ndindex(*cell):
            place = tuple(i * edge + o for i, edge, o in zip(at, cell, offset))
            values.append(array[place] if all(p < n for p, n in zip(place, array.shape)) else fill)
        found[at] = values
    return found


def test_the_voxels_of_a_cell_are_its_raw_features():
    finished = volume()
    found = raw_patches(finished.array, CELL, finished.info["fill"])
    expected = np.concatenate([cells_of(channel, CELL, fill) for channel, fill in zip(finished.array, finished.info["fill"])], axis=3)
    assert found.shape == (48, 4, 3, 2) and np.array_equal(found, np.moveaxis(expected, -1, 0).astype(np.float32))


def test_only_cells_with_a_clear_label_count_and_keep_their_features():
    finished = volume()
    expected = []
    for number, values in enumerate(cells_of(finished.masks["labels"], CELL, OUTSIDE).reshape(-1, 24)):
        names, counts = np.unique(values, return_counts=True)
        if counts.max() / 24 >= PURITY and names[counts.argmax()] >= 0:
            expected.append((number, int(names[counts.argmax()])))
    found = tokens_of(finished, CELL, {"number": lambda _: np.arange(24.0).reshape(1, 4, 3, 2)}, balance=False)
    assert list(zip(found.features["number"][:, 0].astype(int).tolist(), found.labels.tolist())) == expected
    assert 3 < len(expected) < 24 and found.features["number"].dtype == np.float32


def test_no_class_has_more_than_its_share_and_the_background_no_more_than_the_largest_other_class():
    labels = np.repeat([0, 1, 2, 3], [1000, 100, 40, 5])
    for limit, expected in ((10_000, [100, 100, 40, 5]), (80, [20, 20, 20, 5])):
        chosen = balanced(labels, limit)
        assert np.bincount(labels[chosen]).tolist() == expected and len(set(chosen)) == len(chosen) and np.array_equal(chosen, balanced(labels, limit))
    assert len(balanced(np.zeros(30, int), 20)) == 20 and len(balanced(np.zeros(0, int))) == 0


def test_the_linear_classifier_is_scikit_learns_logistic_regression():
    rng = np.random.default_rng(1)
    train, test = rng.normal(2, 3, (200, 6)), rng.normal(2, 3, (300, 6))
    labels = (train[:, :3] + rng.normal(0, 2, (200, 3))).argmax(1)
    scaler = StandardScaler().fit(train)
    reference = LogisticRegression(max_iter=1000, tol=1e-8).fit(scaler.transform(train), labels)
    top = np.sort(reference.predict_proba(scaler.transform(test)), 1)
    sure = top[:, -1] - top[:, -2] > 1e-3
    found = linear_classifier(*(torch.from_numpy(values) for values in (train, labels, test))).numpy()
    assert sure.mean() > 0.98 and np.array_equal(found[sure], reference.predict(scaler.transform(test))[sure])


def test_features_that_name_the_label_reach_a_dice_of_1_and_others_do_not(tmp_path):
    rng = np.random.default_rng(0)

    def tokens():
        labels = rng.integers(0, 3, 120)
        return Tokens(labels, {RANDOM: rng.normal(size=(120, 3)).astype(np.float32), "label": np.eye(3, dtype=np.float32)[labels]})

    rows = _judge([tokens(), tokens()], {"x": tokens(), "y": tokens()}, 2, tmp_path, "cpu")
    assert len(rows) == 2 * 2 * 2 and all(row["dice"] == 1.0 if row["method"] == "label" else row["dice"] < 0.5 for row in rows)
    for one in summary(rows):
        own = [row["dice"] for row in rows if (row["method"], row["classifier"]) == (one["method"], one["classifier"])]
        assert one["dice"].mean == pytest.approx(np.mean(own)) and (one["gain"] is None) == (one["method"] == RANDOM)
        assert one["gain"] is None or one["gain"].low > 0.4


def test_volumes_of_one_class_teach_nothing(tmp_path):
    with pytest.raises(UserError, match="hold cells of one class only"):
        _judge([Tokens(np.zeros(9, np.int64), {})], {}, 1, tmp_path, "cpu")


def test_labels_for_the_test_images_make_a_fixed_test_set(dataset, checkpoint):
    training, test = find_labelled(dataset, Pretrained.load(checkpoint))
    assert [case.identifier for case, _ in training] == ["case0", "case1", "case2"]
    assert [(case.identifier, path.parent.name) for case, path in test] == [("case3", "labelsTs"), ("case4", "labelsTs")]
    for file in (dataset / "labelsTs").iterdir():
        file.unlink()
    training, test = find_labelled(dataset, Pretrained.load(checkpoint))
    assert len(training) == 2 and len(test) == 1 and test[0][1].parent.name == "labelsTr"


def test_as_many_volumes_are_tried_as_there_are():
    assert (volumes_wanted(None, 8), volumes_wanted(None, 12), volumes_wanted([3, 1, 3], 8)) == ([1, 5], [1, 5, 10], [1, 3])


def test_the_command_compares_the_checkpoint_with_random_weights_and_raw_intensities(dataset, checkpoint, tmp_path, capsys, monkeypatch):
    seen = []
    judge = token_probe._judge
    monkeypatch.setattr(token_probe, "_judge", lambda *args: seen.append(args) or judge(*args))
    assert main(["-ckpt", str(checkpoint), "-d", "901", "-n", "2", "1", "-out", str(tmp_path / "probe"), "-device", "cpu"]) == 0
    told = capsys.readouterr().out
    with open(tmp_path / "probe.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["case3", "case4"] * 12 and {row["method"] for row in rows} == {"MAE", RANDOM, RAW_PATCHES}
    assert all(0 <= float(row["dice"]) <= 1 for row in rows) and told.count("| MAE") == 4 and told.count(RAW_PATCHES) == 4
    record = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))
    assert len(record["results"]) == 12 and record["results"][0]["gain"]["count"] == 2

    (few, test), (more, _) = ((args[0], args[1]) for args in seen)
    assert len(few) == 1 and len(more) == 2 and any(few[0] is tokens for tokens in more)  # one lies within the other
    assert not np.allclose(few[0].features["MAE"], few[0].features[RANDOM])
    assert few[0].features[RAW_PATCHES].shape[1] == 64 and list(test) == ["case3", "case4"]


def test_more_volumes_than_are_labelled_are_refused(dataset, checkpoint):
    with pytest.raises(UserError, match="4 labelled cases are wanted"):
        evaluate(Pretrained.load(checkpoint), dataset, [4])


def test_an_unknown_dataset_is_told(dataset, checkpoint, capsys):
    assert main(["-ckpt", str(checkpoint), "-d", "902", "-device", "cpu"]) == 2
    assert "unknown dataset ID 902" in capsys.readouterr().err


def test_an_untrained_network_is_drawn_from_the_seed_alone(checkpoint):
    pretrained = Pretrained.load(checkpoint)
    torch.manual_seed(5)
    one = Extractor.untrained(pretrained).backbone.state_dict()
    state = torch.get_rng_state()
    same, other = Extractor.untrained(pretrained).backbone.state_dict(), Extractor.untrained(pretrained, seed=1).backbone.state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one) and torch.equal(state, torch.get_rng_state())
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_a_volume_is_enlarged_at_its_end_only():
    array = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    found = whole_cells(array, CELL, [-1.0, -2.0])
    assert found.shape == (2, 4, 4, 6) and np.array_equal(found[:, :3, :4, :5], array) and (found[0, 3] == -1).all() and (found[1, :, :, 5] == -2).all()
