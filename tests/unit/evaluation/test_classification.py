"""Cross-validation against plain loops of scikit-learn; what a leak would show; lesions of phantoms from files."""

import csv
import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnssl_ext.cli.evaluate_classification import main
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation import classification
from nnssl_ext.evaluation.classification import (
    INNER_FOLDS,
    RANDOM,
    STATISTICS,
    STRENGTHS,
    Predicted,
    chosen_strength,
    cross_validated,
    fold_numbers,
    judge,
    pooled,
    read_labels,
    statistics_of,
)
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.preprocessing.preprocessor import Loaded
from tests.make_data import tiny_plan
from tests.make_nnunet import make_checkpoint
from tests.make_raw import write_image

RNG = np.random.default_rng(0)


def cohort(subjects=30, each=2, classes=2):
    """Classes and subjects of cases, all cases of a subject alike."""
    labels = np.repeat(np.arange(subjects) % classes, each)
    return labels, np.repeat([f"s{i}" for i in range(subjects)], each)


def model(strength):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """Crops around liver lesions of phantoms, two of each subject, and their table."""
    folder, lines = tmp_path_factory.mktemp("lesions"), ["case,subject,label"]
    for index in range(6):
        kind = ("benign", "malignant")[index % 2]
        for scan in range(2):
            phantom = make_phantom(0, index, (32, 32, 32), (6.0, 6.0, 6.0), lesion=kind, scan=scan)
            starts = [int(np.clip(round(at) - 8, 0, 16)) for at in np.argwhere(phantom.lesions).mean(0)]
            crop = phantom.image[tuple(slice(first, first + 16) for first in starts)]
            write_image(folder / "images" / f"p{index}_{scan}.nii.gz", np.rint(crop).astype(np.int16), (3.0, 3.0, 3.0))
            lines.append(f"p{index}_{scan},p{index},{kind}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c.pth", "primus", plan=tiny_plan())


def run(lesions, checkpoint, *more, labels=None):
    return main(["-ckpt", str(checkpoint), "-labels", str(labels or lesions / "labels.csv"), "-images", str(lesions / "images"), "-device", "cpu", *more])


@pytest.mark.parametrize(("subjects", "expected"), [(30, 5), (6, 3), (2, 1)])
def test_folds_keep_subjects_together_and_spread_the_classes(subjects, expected):
    labels, names = cohort(subjects)
    folds = fold_numbers(labels, names, 5)
    assert len(set(folds)) == expected and all(len(set(folds[names == name])) == 1 for name in set(names))
    assert all(set(labels[folds == fold]) == {0, 1} for fold in set(folds)) and np.array_equal(folds, fold_numbers(labels, names, 5))


def test_predictions_equal_a_plain_loop_over_the_folds(monkeypatch):
    labels, names = cohort(classes=3)
    features = RNG.normal(5, 3, (60, 4)) + labels[:, None]
    monkeypatch.setattr(classification, "chosen_strength", lambda *_: 0.1)
    found = cross_validated(features, labels, names)
    expected = cross_val_predict(model(0.1), features, labels, cv=PredefinedSplit(found.folds), method="predict_proba")
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_the_penalty_is_the_one_with_the_smallest_log_loss_of_held_out_cases(signal):
    labels, names = cohort()
    features = np.random.default_rng(0).normal(size=(60, 5)) + signal * labels[:, None] * (np.arange(5) == 0)
    split = PredefinedSplit(fold_numbers(labels, names, INNER_FOLDS))
    losses = [log_loss(labels, cross_val_predict(model(c), features, labels, cv=split, method="predict_proba")) for c in STRENGTHS]
    assert chosen_strength(features, labels, names, 0) == STRENGTHS[int(np.argmin(losses))]
    assert len(set(losses)) == len(STRENGTHS)


def test_features_that_name_the_class_are_perfect_and_those_that_name_the_subject_worthless():
    labels, names = cohort()
    subject = np.eye(30)[np.repeat(np.arange(30), 2)]  # with cases of a subject on both sides, this would be perfect, too
    predicted = {"class": cross_validated(labels[:, None] + RNG.normal(0, 0.01, (60, 1)), labels, names), RANDOM: cross_validated(subject, labels, names)}
    perfect, blind = judge(predicted, labels, names)
    assert (perfect["auc"].mean, perfect["auc"].low, perfect["accuracy"].mean, perfect["auc"].count) == (1.0, 1.0, 1.0, 30)
    assert 0.3 < blind["auc"].mean < 0.7 and blind["auc_gain"] is None
    assert perfect["auc_gain"].mean == pytest.approx(1 - blind["auc"].mean) and perfect["auc_gain"].low > 0.2


@pytest.mark.parametrize("classes", [2, 3])
def test_the_figures_are_scikit_learns_and_equal_methods_do_not_differ(classes):
    labels, names = cohort(classes=classes)
    one = Predicted(RNG.dirichlet(np.ones(classes), 60), np.zeros(60, int))
    first, second = judge({"ours": one, RANDOM: one}, labels, names)
    expected = roc_auc_score(labels, one.probabilities[:, 1]) if classes == 2 else roc_auc_score(labels, one.probabilities, multi_class="ovr")
    assert first["auc"].mean == pytest.approx(expected) and first["auc"].low < expected < first["auc"].high
    assert first["accuracy"].mean == pytest.approx((one.probabilities.argmax(1) == labels).mean())
    for gain in (first["auc_gain"], first["accuracy_gain"]):
        assert (gain.mean, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_a_class_that_a_fold_cannot_learn_has_no_probability():
    found = classification._probabilities(RNG.normal(size=(8, 2)), np.array([0, 2] * 4), RNG.normal(size=(3, 2)), 1.0, 4)
    assert (found[:, [1, 3]] == 0).all() and found.sum(1) == pytest.approx(1)
    assert (classification._probabilities(np.zeros((2, 1)), np.array([1, 1]), np.zeros((3, 1)), 1.0, 2) == [0, 1]).all()


def test_pooled_features_and_intensity_statistics():
    values = RNG.normal(size=(3, 2, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(pooled(values), [*(channel.mean() for channel in values), *(channel.std() for channel in values)], rtol=1e-5)
    body = RNG.random((4, 5, 6)) > 0.5
    array = RNG.normal(size=(2, 4, 5, 6))
    found = statistics_of(Loaded(None, array, Geometry((4, 5, 6), (3.0, 2.0, 1.5)), body, (), {}))
    a, b = (channel[body] for channel in array)
    percentiles = [np.percentile(channel, q) for q in (5, 50, 95) for channel in (a, b)]
    np.testing.assert_allclose(found, [a.mean(), b.mean(), a.std(), b.std(), *percentiles, body.sum() * 9 / 1000])


def test_lesions_are_classified_from_files(lesions, checkpoint, tmp_path, capsys):
    assert run(lesions, checkpoint, "-out", str(tmp_path / "lesions")) == 0
    told = capsys.readouterr().out
    assert "12 volumes of 6 subjects (benign 6, malignant 6), 3 folds" in told and all(f"| {name} " in told for name in ("MAE", RANDOM, STATISTICS))
    with open(tmp_path / "lesions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 36 and rows[0]["case"] == "p0_0" and all(float(row["p(benign)"]) + float(row["p(malignant)"]) == pytest.approx(1) for row in rows)
    record = json.loads((tmp_path / "lesions.json").read_text(encoding="utf-8"))
    for method in record["results"]:
        own = [row for row in rows if row["method"] == method["method"]]
        right = [max(("benign", "malignant"), key=lambda name: float(row[f"p({name})"])) == row["label"] for row in own]
        assert method["accuracy"]["mean"] == pytest.approx(np.mean(right)) and method["accuracy"]["count"] == 6
    assert len({row["p(benign)"] for row in rows if row["case"] == "p0_0"}) == 3  # three methods, three opinions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,label\na,b\n", "needs the columns case, subject and label"),
        ("case,subject,label\n", "needs the columns case, subject and label"),
        ("case,subject,label\na,s,x\nb,,y\n", "a field of the table is empty"),
        ("case,subject,label\na,s,x\na,t,y\n", "the case a is named more than once"),
        ("case,subject,label\na,s,x\nb,t,x\n", "all cases are of one class, 'x'"),
        ("case,subject,label\np0_0,s,x\nnobody,t,y\n", "1 of 2 cases of the table have no image: nobody"),
        ("case,subject,label\np0_0,s,x\np1_0,t,y\np2_0,t,y\n", "volumes of one subject only"),
    ],
)
def test_tables_that_cannot_be_used_end_the_command(text, message, lesions, checkpoint, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    assert run(lesions, checkpoint, labels=tmp_path / "labels.csv") == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 3


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(UserError, match="the table can't be read: No such file"):
        read_labels(tmp_path / "nothing.csv")
