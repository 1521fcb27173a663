"""The probe against plain loops and features whose quality is known; what it reads; what it leaves untouched."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, special

from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation import probe
from nnssl_ext.evaluation.probe import (
    OUTSIDE,
    TEMPERATURE,
    LabelledCrop,
    Probe,
    cell_labels,
    choose,
    find_probe,
    linear_classifier,
    mean_dice,
    nearest_neighbours,
    split,
)
from nnssl_ext.io.case import Case
from nnssl_ext.nn.backbones.base import Backbone, build_backbone
from nnssl_ext.trainers import base, run_log, sinks
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import ArrayStore, slice_plan, tiny_plan
from tests.make_raw import labelled_dataset, write_image

PLAN, CPU = tiny_plan(), torch.device("cpu")
CLASSES = 5


def prepared(dataset="901", plan=PLAN):
    return find_probe(dataset, plan, "3d_fullres")()


class Known(Backbone):
    """Features of the cells of crops whose voxels are their labels: "label" tells them apart, the others don't."""

    def __init__(self, features: str) -> None:
        torch.nn.Module.__init__(self)
        self.features, self.strides, self.widths = features, ((4, 4, 4),), (8,)

    def pyramid(self, x):
        cells = F.max_pool3d(x, 4)[:, 0]
        if self.features == "label":
            return [F.one_hot(cells.long(), 8).movedim(-1, 1).float()]
        if self.features == "random":
            rng = np.random.default_rng(int(x.sum()))
            return [torch.from_numpy(rng.normal(size=(1, 8, *cells.shape[1:])))]
        return [torch.full((1, 8, *cells.shape[1:]), float(self.features))]


def blocks(count, seed):
    """Crops of 32^3 voxels whose cells have one label each."""
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, CLASSES, (8, 8, 8)).repeat(4, 0).repeat(4, 1).repeat(4, 2) for _ in range(count)]
    return [LabelledCrop(label[None].astype(np.float32), label.astype(np.int16)) for label in labels]


def probe_of(features):
    return Probe("901", blocks(4, 0), blocks(2, 1))(Known(features), CPU)


def test_features_that_name_the_label_reach_a_dice_of_1():
    assert probe_of("label") == {"knn_dice": 1.0, "linear_dice": 1.0}


@pytest.mark.parametrize("features", ["0", "1", "random"])
def test_features_that_know_nothing_stay_at_chance(features):
    assert all(value < 1.5 / CLASSES for value in probe_of(features).values())


def test_features_that_are_not_finite_have_no_figure():
    assert all(math.isnan(value) for value in probe_of("nan").values())


def test_the_vote_of_the_nearest_neighbours_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    train, labels, test = rng.normal(size=(70, 6)), rng.integers(0, 4, 70), rng.normal(size=(40, 6))
    expected = []
    for x in test:
        similarity = [float(x @ other / np.linalg.norm(x) / np.linalg.norm(other)) for other in train]
        votes = [0.0] * 4
        for i in sorted(range(70), key=lambda i: -similarity[i])[: probe.NEIGHBOURS]:
            votes[labels[i]] += math.exp(similarity[i] / TEMPERATURE)
        expected.append(votes.index(max(votes)))
    found = nearest_neighbours(*(torch.from_numpy(values) for values in (train, labels, test)))
    assert found.tolist() == expected and len(set(expected)) == 4


def test_the_linear_classifier_minimises_the_penalised_cross_entropy():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (60, 5)), rng.normal(3, 2, (200, 5))
    labels = (train[:, :3] + rng.normal(0, 2, (60, 3))).argmax(1)
    train[:, 4] = test[:, 4] = 7.0  # a dead feature
    mean, deviation = train[:, :4].mean(0), train[:, :4].std(0)
    x, targets = (train[:, :4] - mean) / deviation, np.eye(3)[labels]

    def objective(flat):
        weights, bias = flat[:12].reshape(4, 3), flat[12:]
        outputs = x @ weights + bias
        return (special.logsumexp(outputs, 1) - (outputs * targets).sum(1)).mean() + (weights**2).sum() / 120

    best = optimize.minimize(objective, np.zeros(15), method="BFGS", options={"gtol": 1e-8}).x
    outputs = (test[:, :4] - mean) / deviation @ best[:12].reshape(4, 3) + best[12:]
    first, second = np.sort(outputs, 1)[:, :-3:-1].T
    sure = first - second > 1e-3
    found = linear_classifier(*(torch.from_numpy(values) for values in (train, labels, test))).numpy()
    assert sure.mean() > 0.95 and (found == outputs.argmax(1))[sure].all() and len(set(found)) == 3


def test_dice_is_the_mean_over_the_foreground_classes_that_occur():
    labels, predicted = torch.tensor([0, 0, 1, 1, 1, 2, 2, 4]), torch.tensor([0, 1, 1, 1, 2, 2, 0, 3])
    assert mean_dice(predicted, labels) == pytest.approx((2 * 2 / 6 + 2 * 1 / 4 + 0) / 3)
    assert mean_dice(labels, labels) == 1.0
    assert math.isnan(mean_dice(torch.zeros(3), torch.zeros(3)))


def test_the_label_of_a_cell_is_that_of_most_of_its_voxels():
    labels = np.random.default_rng(0).integers(-1, 4, (4, 6, 8)).astype(np.int16)
    found = cell_labels(labels, (2, 3, 2))
    for z, y, x in np.ndindex(2, 2, 4):
        values, counts = np.unique(labels[2 * z : 2 * z + 2, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2], return_counts=True)
        assert found[z, y, x] == values[counts.argmax()]


def test_the_memory_holds_no_more_background_than_foreground_and_no_cell_without_label(monkeypatch):
    labels = [np.array([0] * 300 + [1] * 30 + [OUTSIDE] * 20), np.array([OUTSIDE] * 10 + [2] * 25 + [0] * 100)]
    values = np.concatenate([part[cells] for part, cells in zip(labels, choose(labels, True))])
    assert np.bincount(values).tolist() == [55, 30, 25]
    everything = choose(labels, False)
    assert [len(cells) for cells in everything] == [330, 125] and all((np.diff(cells) > 0).all() for cells in everything)
    monkeypatch.setattr(probe, "CELLS", 50)
    first, second = choose(labels, False), choose(labels, False)
    assert sum(map(len, first)) == 50 and all((a == b).all() for a, b in zip(first, second))


def test_subjects_are_on_one_side_and_the_split_is_always_the_same():
    cases = [(Case(f"c{i}", f"s{i // 2}", "1", (), ("CT",)), Path("labelsTr/c.nii.gz")) for i in range(20)]
    training, test = split(cases)
    assert len(training) == 14 and len(test) == 6 and (training, test) == split(cases)
    assert not {case.subject for case, _ in training} & {case.subject for case, _ in test}
    with pytest.raises(UserError, match="at least two subjects"):
        split(cases[:2])


def test_the_probe_sees_cases_as_the_pretraining_does(folders):
    """Labels are a threshold of the intensities, so that each crop tells whether its label map lies where it belongs."""
    folder = labelled_dataset(folders["nnssl_raw"], cases=3, spacing=(3.0, 3.0, 3.0), shape=(12, 24, 28))
    made = prepared()
    assert (len(made.training), len(made.test)) == (2 * probe.CROPS, probe.CROPS) and folder.name == "Dataset901_Labelled"
    plan = PLAN.configuration("3d_fullres").normalization["CT"]
    for crop in (*made.training, *made.test):
        assert crop.image.shape == (1, 16, 16, 16) and crop.image.dtype == np.float32 and (crop.labels > 0).any()
        hounsfield, inside = crop.image[0] * plan.std + plan.mean, crop.labels != OUTSIDE
        assert inside.any((1, 2)).sum() == 12  # a case with fewer slices than the patch is padded
        assert ((hounsfield > 70) == (crop.labels == 2))[inside].all() and ((hounsfield > -500) == (crop.labels > 0))[inside].all()


def test_images_and_labels_are_resampled_alike(folders):
    labelled_dataset(folders["nnssl_raw"], cases=2, spacing=(3.0, 2.0, 2.0), shape=(20, 40, 44))
    plan = PLAN.configuration("3d_fullres").normalization["CT"]
    for crop in prepared().training:
        assert ((crop.image[0] * plan.std + plan.mean > -460) == (crop.labels > 0)).mean() > 0.97


def test_ignored_voxels_do_not_count(folders):
    folder = labelled_dataset(folders["nnssl_raw"], cases=2)
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, "labels": {"background": 0, "body": 1, "ignore": 2}}))
    crops = prepared().training
    assert {1, OUTSIDE} <= {int(value) for crop in crops for value in np.unique(crop.labels)} <= {0, 1, OUTSIDE}


def test_the_labelled_dataset_may_lie_in_nnunet_raw(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    labelled_dataset(tmp_path / "nnUNet_raw", cases=2)
    assert prepared("Dataset901_Labelled").dataset == "Dataset901_Labelled"


def without_labels(folder):
    for file in (folder / "labelsTr").iterdir():
        file.unlink()


def of_one_case(folder):
    for file in [*folder.glob("*/case1*"), *folder.glob("*/case2*")]:
        file.unlink()


def with_empty_labels(folder):
    for file in (folder / "labelsTr").iterdir():
        write_image(file, np.zeros((20, 24, 28), np.uint8))


def on_another_grid(folder):
    for file in (folder / "labelsTr").iterdir():
        write_image(file, np.ones((20, 24, 28), np.uint8), spacing=(3.0, 2.0, 2.5))


def of_another_modality(folder):
    file = folder / "dataset.json"
    file.write_text(file.read_text().replace('"CT"', '"PET"'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_labels, "has no label maps"),
        (of_one_case, "at least two subjects"),
        (with_empty_labels, "no foreground"),
        (on_another_grid, "isn't on the grid"),
        (of_another_modality, r"no normalisation for modality 'PET' \(it has: CT\)"),
    ],
)
def test_a_dataset_that_cannot_be_probed_with_is_refused_at_once(spoil, message, folders):
    spoil(labelled_dataset(folders["nnssl_raw"], cases=3))
    with pytest.raises(UserError, match=message) as error:
        prepared()
    assert len(str(error.value).splitlines()) == 3


def test_other_channels_and_unknown_datasets_are_refused(folders):
    labelled_dataset(folders["nnssl_raw"], cases=2)
    with pytest.raises(UserError, match=r"1 channel\(s\) \(CT\), the pretraining has 2"):
        prepared(plan=tiny_plan(channels=2))
    with pytest.raises(UserError, match="unknown dataset ID 902"):
        prepared("902")


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_the_same_backbone_has_the_same_figures_and_no_random_number_is_drawn(family, folders):
    labelled_dataset(folders["nnssl_raw"], cases=3)
    torch.manual_seed(0)
    backbone = build_backbone(PLAN.configuration("3d_fullres"), family, 1).eval()
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = prepared()(backbone, CPU)
    assert first == prepared()(backbone, CPU)
    assert torch.equal(before, torch.get_rng_state()) and (legacy == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(0 < value <= 1 for value in first.values())


def test_a_network_of_slices_is_probed_on_slices(folders):
    labelled_dataset(folders["nnssl_raw"], cases=3, spacing=(6.0, 3.0, 3.0))
    plan = slice_plan()
    probe = find_probe("901", plan, "2d")()
    torch.manual_seed(0)
    figures = probe(build_backbone(plan.configuration("2d"), "resenc", 1).eval(), CPU)
    assert figures and all(0 < value <= 1 for value in figures.values())


SHORT = MAETrainer.Config(epochs=2, iterations=2, batch_size=1, workers=0)


@pytest.fixture
def files_alone(monkeypatch):
    """No TensorBoard and no pictures: only the metrics matter here."""
    monkeypatch.setenv("nnssl_sinks", "none")
    monkeypatch.setattr(sinks, "draw_progress", lambda *_: None)
    monkeypatch.setattr(base, "draw_run", lambda *_: None)


def fitted(folder, made=None, **changes):
    run = MAETrainer(PLAN, "3d_fullres", dataclasses.replace(SHORT, **changes), ArrayStore(), folder, family="primus")
    run.probe = made
    run.fit()
    return load_checkpoint(folder / "checkpoint_final.pth")["ssl_state"], [json.loads(line) for line in open(folder / "metrics.jsonl")]


def test_a_run_is_the_same_bit_for_bit_with_and_without_a_probe(folders, tmp_path, files_alone):
    labelled_dataset(folders["nnssl_raw"], cases=2)
    made = prepared()

    def careless(backbone, device):
        assert not backbone.training
        torch.rand(7)
        return made(backbone, device)

    plain, records = fitted(tmp_path / "plain")
    probed, with_probe = fitted(tmp_path / "probed", careless)
    assert all(torch.equal(value, probed[key]) for key, value in plain.items())
    for old, new in zip(records, with_probe):
        figures = {key: new.pop(key) for key in ("probe/knn_dice", "probe/linear_dice")}
        assert all(0 < value <= 1 for value in figures.values()) and new["train/total"] == old["train/total"] and new.keys() == old.keys()


def test_long_runs_are_probed_in_twenty_epochs_among_them_the_first_and_the_last(tmp_path, files_alone, monkeypatch):
    monkeypatch.setattr(run_log, "PICTURES", 2)
    records = fitted(tmp_path, lambda *_: {"knn_dice": 0.5}, epochs=3, iterations=1)[1]
    assert [record["epoch"] for record in records if "probe/knn_dice" in record] == [0, 2]


def test_the_time_of_the_probe_counts_as_no_training_time(tmp_path, files_alone, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1e-3
        return now[0]

    def slow(*_):
        now[0] += 1e6
        return {"knn_dice": 0.5}

    monkeypatch.setattr("time.monotonic", clock)
    for record in fitted(tmp_path, slow)[1]:
        assert record["seconds"] < 1e3 and record["samples_per_second"] > 0 and record["data_wait_share"] <= 1
