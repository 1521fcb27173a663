"""The learning suite: what is finished is kept, tables count what the records say."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from benchmarks import phantoms
from benchmarks.learning import __main__ as program
from benchmarks.learning import data as data_module
from benchmarks.learning import positives, study
from benchmarks.learning.data import Data
from benchmarks.learning.finetune import dice
from benchmarks.learning.pretrain import methods
from benchmarks.learning.report import rows, table
from benchmarks.learning.study import Baseline, Trial
from benchmarks.learning.suite import FINE_TUNING, SUITE, Entry
from benchmarks.phantoms import PhantomPairs
from nnssl_ext.benchmark import units
from nnssl_ext.benchmark.lanes import finish_all
from nnssl_ext.benchmark.quick import seed_all
from nnssl_ext.benchmark.units import RECORD, Unit, finish
from nnssl_ext.core.files import write_json
from nnssl_ext.data.sessions import read_sessions
from nnssl_ext.evaluation.phantom import make_phantom
from nnssl_ext.nn.backbones.base import check_support, families
from tests.toy_units import double


def chain(number, name="toy"):
    first = Unit(f"{name}_first", double, {"number": number})
    return [first, Unit(f"{name}_second", double, {}, first)]


def calls(out):
    file = out / "calls.txt"
    return file.read_text().splitlines() if file.is_file() else []


def test_the_name_of_a_unit_depends_on_everything_that_its_result_depends_on(monkeypatch):
    unit = chain(1)[1]
    digests = {unit.digest, chain(2)[1].digest, dataclasses.replace(unit, settings={"x": 1}).digest, dataclasses.replace(unit, needs=None).digest}
    digests.add(dataclasses.replace(unit, work=calls).digest)
    with monkeypatch.context() as patch:
        patch.setattr(units, "THREADS", 2)
        digests.add(unit.digest)
    with monkeypatch.context() as patch:
        patch.setattr(units, "version", lambda name: "0.0.0")
        digests.add(unit.digest)
    assert len(digests) == 7
    assert unit.digest == chain(1)[1].digest and chain(1, "other")[1].digest == unit.digest


def test_what_is_finished_is_not_computed_again(tmp_path):
    unit = chain(3)[1]
    record = finish(unit, tmp_path)
    assert record["result"]["number"] == 12 and record["identity"] == unit.identity and len(calls(tmp_path)) == 2
    assert finish(unit, tmp_path) == record == finish(chain(3)[1], tmp_path) and len(calls(tmp_path)) == 2


def test_an_interrupted_unit_begins_anew_and_alone(tmp_path):
    unit = chain(3)[1]
    finish(unit, tmp_path)
    (unit.folder(tmp_path) / RECORD).unlink()
    (unit.folder(tmp_path) / "half.txt").write_text("what an interruption left")
    assert finish(unit, tmp_path)["result"]["number"] == 12 and len(calls(tmp_path)) == 3
    assert not (unit.folder(tmp_path) / "half.txt").exists()


def test_two_lanes_give_the_records_of_one_and_threads_are_one(tmp_path):
    both = [unit for number in range(4) for unit in chain(number, f"toy{number}")]
    results = []
    for lanes in (1, 2):
        out = tmp_path / str(lanes)
        assert finish_all(both, out, lanes, say=lambda text: None) == []
        results.append([unit.record(out)["result"] for unit in both])
        assert len(calls(out)) == 8 and finish_all(both, out, lanes, say=lambda text: None) == [] and len(calls(out)) == 8
    assert results[0] == results[1] == [{"number": factor * number, "threads": 1} for number in range(4) for factor in (2, 4)]


def test_a_chain_that_fails_is_reported_and_the_others_are_finished(tmp_path):
    (error,) = finish_all([*chain(-1, "bad"), *chain(1, "good")], tmp_path, 1, say=lambda text: None)
    assert "bad_first" in error and "negative" in error and chain(1)[1].digest in {path.name.rsplit("_", 1)[1] for path in (tmp_path / "units").glob("*")}
    (log,) = (tmp_path / "units").glob("*/error.txt")
    assert "ValueError" in log.read_text() and not (log.parent / RECORD).exists()


def put(out, unit, **result):
    write_json(unit.folder(out) / RECORD, {"name": unit.name, "identity": {}, "result": result, "seconds": 9.0, "cpu_seconds": 7.0})


def made(out, seeds=(0, 1)):
    """A baseline and a method with records of all `seeds`; those of a third seed are missing."""
    by_seed = lambda name, needs=None: {s: Unit(f"{name}_{s}", double, {"name": name, "seed": s}, needs and needs[s]) for s in (*seeds, 2)}  # noqa: E731
    base = Baseline("resenc", Unit("raw", double, {"name": "raw"}), by_seed("untrained"), by_seed("scratch"))
    first = by_seed("pretrain")
    trial = Trial(Entry("MAETrainer", "resenc", 30, 2), first, by_seed("probe", first), by_seed("finetune", first))
    put(out, base.intensities, knn_dice=0.25)
    for seed in seeds:
        put(out, base.untrained[seed], knn_dice=0.2 + 0.02 * seed)
        put(out, base.scratch[seed], dice=0.5 + 0.1 * seed, cases={"a": 0.5, "b": 0.5 + 0.2 * seed})
        put(out, trial.pretrained[seed], steps=30, losses={}, alarms=[])
        put(out, trial.probed[seed], knn_dice=0.3)
        put(out, trial.finetuned[seed], dice=0.7 - 0.2 * seed, cases={"a": 0.7, "b": 0.7})
    return base, trial


def test_gains_are_differences_of_the_same_seed_and_each_seed_is_shown(tmp_path):
    base, trial = made(tmp_path)
    found = rows([base], [trial], tmp_path)
    assert [row["method"] for row in found] == ["raw intensities", "random weights", "MAETrainer"]
    assert found[2]["dice_gain"] == pytest.approx({"0": 0.2, "1": -0.1}) and found[2]["knn_gain"] == pytest.approx({"0": 0.1, "1": 0.08})
    assert found[1]["cases"]["1"] == {"a": 0.5, "b": 0.7} and json.dumps(found)
    lines = table(found).splitlines()
    assert lines[2] == "| raw intensities | resenc | - | - | 0.250 | - | - | - | - |"
    assert lines[3] == "| random weights | resenc | - | - | 0.210 (0.200, 0.220) | - | 0.550 (0.500, 0.600) | - | 7 |"
    assert lines[4] == "| MAETrainer | resenc | 30 | 7 | 0.300 (0.300, 0.300) | +0.090 (+0.100, +0.080) | 0.600 (0.700, 0.500) | +0.050 (+0.200, -0.100) | 7 |"


def test_positives_are_pretrained_and_fine_tuned_with_all_pairs_of_seeds_and_their_table_counts_what_is_finished(tmp_path):
    base, _ = made(tmp_path)
    intervals = [positives.interval(name, "data") for name in positives.INTERVALS]
    units_ = {unit.digest for one in intervals for unit in one.finetuned.values()}
    assert len(units_) == 20 and len({unit.needs.digest for one in intervals for unit in one.finetuned.values()}) == 10
    for one in intervals:
        assert [len(chain) for chain in one.chains] == [4, 4] and all(unit.needs is chain[0] for chain in one.chains for unit in chain[1:])
    for (first, second), unit in intervals[2].finetuned.items():
        put(tmp_path, unit, dice=0.5 + 0.1 * first + 0.01 * second)
        put(tmp_path, intervals[2].probed[first], knn_dice=0.3)
    lines = positives.table(positives.rows(base, intervals, tmp_path)).splitlines()
    assert lines[2] == "| none (from scratch) | 0.210 ± 0.014 | 0.200, 0.220 | 0.550 ± 0.071 | 0.500, 0.600 |"
    assert lines[5] == "| [0.3, 0.6] | 0.300 ± 0.000 | 0.300, 0.300 | 0.555 ± 0.058 | 0.500, 0.510, 0.600, 0.610 |"
    assert lines[7] == "| crops from anywhere | - |  | - |  |"


def test_a_table_can_be_made_before_anything_is_finished(tmp_path):
    base, trial = made(tmp_path / "elsewhere")
    assert table(rows([base], [trial], tmp_path)).splitlines()[-1] == "| MAETrainer | resenc | - | - | - | - | - | - | - |"


def test_dice_counts_the_organs_of_the_reference():
    known = np.array([0, 1, 1, 2, 2, 2])
    assert dice(np.array([0, 1, 0, 2, 2, 3]), known) == pytest.approx({"lungs": 2 / 3, "liver": 4 / 5})
    assert dice(np.zeros(6, int), known) == {"lungs": 0.0, "liver": 0.0}


def test_a_seed_sets_every_generator():
    drawn = []
    for seed in (1, 1, 2):
        seed_all(seed)
        drawn.append((float(torch.rand(1)), float(np.random.rand())))  # noqa: NPY002
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_entry_is_a_method_that_its_backbone_family_can_take():
    known = methods()
    for entry in SUITE:
        cls = known[entry.method]
        check_support(families()[entry.family], cls.needs, entry.name)
        cls.Config(**entry.options)
        assert entry.family in FINE_TUNING
    assert len({entry.name for entry in SUITE}) == len(SUITE)


def test_an_unknown_method_is_named(tmp_path, capsys):
    assert program.main(["--out", str(tmp_path), "--methods", "MAETrainr"]) == 2
    assert "did you mean 'MAETrainer'" in capsys.readouterr().err


def few_phantoms(monkeypatch):
    for name, count in {"UNLABELLED": 6, "MEMORY": 2, "TEST": 2, "COUNT": 10}.items():
        monkeypatch.setattr(phantoms, name, count)


def test_clusters_of_an_earlier_method_are_what_the_next_one_learns_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    few_phantoms(monkeypatch)
    monkeypatch.setattr(study, "PATCH", 16)
    small = [Entry(method, "resenc", 5, 2) for method in ("MAETrainer", "PixelClusterTrainer")]
    monkeypatch.setattr(study, "SUITE", small)
    data = Data(tmp_path)
    phantoms.make(data.cohort, 1, 32, 6.0)
    earlier, later = (study.trial(entry, [0], "digest").pretrained[0] for entry in small)
    assert later.needs is not None and later.needs.needs.digest == earlier.digest
    assert finish(later, tmp_path)["result"]["steps"] == 5 and earlier.record(tmp_path) is not None
    found = later.needs.record(tmp_path)["result"]
    labels, bodies = np.load(later.needs.folder(tmp_path) / "labels.npy"), np.load(data.cohort / "bodies.npy")
    body = bodies[:6].repeat(8, 1).repeat(8, 2).repeat(8, 3)
    assert labels.shape == (6, 1, 32, 32, 32) and found["clusters"] == labels.max() == 10
    assert ((labels[:, 0] > 0) == body).all()
    assert sum(found["shares"]) == pytest.approx(1, abs=1e-3)


def test_pairs_are_made_for_methods_that_learn_from_them_and_change_nothing_else(tmp_path, monkeypatch):
    few_phantoms(monkeypatch)
    monkeypatch.setattr(study, "PATCH", 16)
    data = Data(tmp_path)
    phantoms.make(data.cohort, 1, 32, 6.0)
    before = {path: path.read_bytes() for path in data.cohort.iterdir()}
    digest = data.prepare_pairs(1)
    assert {path: path.read_bytes() for path in data.cohort.iterdir()} == before
    written = (data.pairs / "images.npy").stat().st_mtime_ns
    assert data.prepare_pairs(1) == digest and (data.pairs / "images.npy").stat().st_mtime_ns == written
    store = PhantomPairs(data.cohort, data.pairs)
    assert len(store) == 12 and store.subject(1) == store.subject(7) != store.subject(2) and len(set(store.identifiers)) == 12
    assert set(read_sessions(store).images(1)) == {"CT", "MR"}
    for case, modality in ((1, "CT"), (7, "MR")):
        made, image = make_phantom(0, 1, (32,) * 3, (6.0,) * 3, modality), store.read(case)[0]
        assert np.array_equal(store.read(case, ((4, 20),) * 3)[0], image[4:20, 4:20, 4:20])
        assert np.corrcoef(made.image.clip(*(np.percentile(made.image, (0.5, 99.5)))).ravel(), image.ravel())[0, 1] > 0.9
    assert np.array_equal(store.read(1), phantoms.PhantomStore(data.cohort).read(1)) and store.fill(7) == [float(store.read(7)[0, 0, 0, 0])]
    assert abs(store.read(7)[0][make_phantom(0, 1, (32,) * 3, (6.0,) * 3, "MR").body].mean()) < 1e-2
    entry = Entry("MultiMAETrainer", "primus", 5, 2, {"decoder_depth": 1, "decoder_width": 48})
    unit = study.trial(entry, [0], "digest", digest).pretrained[0]
    assert finish(unit, tmp_path)["result"]["steps"] == 5
    assert study.trial(entry, [0], "digest", "other").pretrained[0].digest != unit.digest
    plain = [study.trial(Entry("MAETrainer", "primus", 5, 2), [0], "digest", pairs).pretrained[0] for pairs in (None, digest)]
    assert plain[0].identity == plain[1].identity and "pairs" not in plain[0].settings


@pytest.mark.slow
@pytest.mark.nnunet
def test_a_tiny_study_is_paired_and_reproducible(tmp_path, monkeypatch):
    family = "primus"
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    few_phantoms(monkeypatch)
    for name, count in {"SIZE": 32, "SPACING": 6.0, "LABELLED": 3, "TEST": 2}.items():
        monkeypatch.setattr(data_module, name, count)
    monkeypatch.setattr(study, "PATCH", 16)
    short = dataclasses.replace(FINE_TUNING[family], epochs=1, iterations=2, batch=2)
    monkeypatch.setitem(FINE_TUNING, family, short)
    data = Data(tmp_path)
    data.prepare(1)
    digest = data.digest()
    data.prepare(1)
    assert data.digest() == digest
    base, trial = study.baseline(family, [0], digest), study.trial(Entry("MAETrainer", family, 5, 2), [0], digest)
    first = {unit.name: finish(unit, tmp_path)["result"] for chain in (*base.chains(), *trial.chains()) for unit in chain}
    scratch, tuned = first[f"scratch_{family}_0"], first[f"finetune_MAETrainer_{family}_0"]
    assert len(scratch["cases"]) == 2 and all(0 <= value <= 1 for value in scratch["cases"].values())
    assert scratch["losses"] != tuned["losses"]
    assert first[f"pretrain_MAETrainer_{family}_0"]["steps"] == 5
    assert 0 < first[f"probe_MAETrainer_{family}_0"]["knn_dice"] < 1
    for unit in (base.scratch[0], trial.finetuned[0], trial.pretrained[0]):
        (unit.folder(tmp_path) / RECORD).unlink()
    again = {unit.name: finish(unit, tmp_path)["result"] for unit in (base.scratch[0], trial.finetuned[0])}
    assert all(again[name] == first[name] for name in again)
    assert "| MAETrainer |" in table(rows([base], [trial], tmp_path))
