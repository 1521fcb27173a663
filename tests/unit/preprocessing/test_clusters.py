"""Cluster labels on the disk: round trip, partial reads, damage, and labels of other clusters or of other data."""

import json
import pickle

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.preprocessing.clusters import FOLDER, MODEL, are_current, read_model, write_labels
from nnssl_ext.preprocessing.store import CaseStore, write_case

SHAPE, PATCH = (30, 20, 26), (16, 16, 16)


def labels_of(case, classes=5):
    return np.random.default_rng(case).integers(0, classes + 1, SHAPE)


def write_model(folder, identity="a" * 64, classes=5):
    folder.mkdir(exist_ok=True)
    np.savez(folder / MODEL, identity=np.array(identity), centres=np.zeros((classes, 3)))


@pytest.fixture
def store(tmp_path):
    """Three cases, with labels."""
    folder = tmp_path / "Dataset801_Test" / "nnsslPlans_3d_fullres"
    for case in range(3):
        array = np.random.default_rng(case).normal(size=(1, *SHAPE)).astype(np.float32)
        info = {"subject": f"s{case}", "stored": Geometry(SHAPE, (1.0,) * 3).as_dict(), "fill": [0.0]}
        write_case(folder, f"case{case}", array, info, PATCH)
    found = CaseStore(folder)
    write_model(folder / FOLDER)
    for case in range(3):
        write_labels(folder / FOLDER, f"case{case}", labels_of(case), "a" * 64, found.info(case)["sha256"], PATCH)
    return CaseStore(folder)


def test_labels_are_read_back_whole_and_by_box_also_in_another_process(store):
    labels = store.clusters()
    assert (labels.classes, labels.model, labels.fill(0)) == (5, "a" * 64, [0.0])
    for case in range(3):
        assert labels.shape(case) == SHAPE
        for reader in (labels, pickle.loads(pickle.dumps(labels))):
            whole = reader.read(case, tuple((0, n) for n in SHAPE))
            assert whole.dtype == np.uint8 and np.array_equal(whole[0], labels_of(case))
            assert np.array_equal(reader.read(case, ((3, 9), (0, 20), (25, 26)))[0], labels_of(case)[3:9, :, 25:])


def test_more_than_255_clusters_take_two_bytes(store):
    write_model(store.folder / FOLDER, classes=300)
    write_labels(store.folder / FOLDER, "case1", labels_of(1, 300), "a" * 64, store.info(1)["sha256"], PATCH)
    found = store.clusters()
    whole = found.read(1, tuple((0, n) for n in SHAPE))
    assert found.classes == 300 and whole.dtype == np.uint16 and np.array_equal(whole[0], labels_of(1, 300))


def test_the_store_stays_the_same_with_labels_beside_it(store):
    assert store.identifiers == ["case0", "case1", "case2"]
    store.verify(0)


def refused(store, message):
    with pytest.raises(UserError, match=message) as error:
        store.clusters()
    return str(error.value)


def test_a_dataset_without_clusters_says_which_commands_make_them(store):
    (store.folder / FOLDER / MODEL).unlink()
    assert "nnssl_cluster fit 801 3d_fullres -ckpt CHECKPOINT, then nnssl_cluster assign 801 3d_fullres" in refused(store, "no clusters have been fitted")


def test_a_case_without_labels_and_labels_of_other_clusters_or_of_another_case_are_refused(store):
    folder, sources = store.folder / FOLDER, [store.info(case)["sha256"] for case in range(3)]
    (folder / "case1.json").unlink()
    assert "nnssl_cluster assign 801 3d_fullres" in refused(store, "1 of 3 cases have no labels of the present clusters: case1")
    write_labels(folder, "case1", labels_of(1), "a" * 64, sources[2], PATCH)
    refused(store, "1 of 3 cases")
    write_labels(folder, "case1", labels_of(1), "a" * 64, sources[1], PATCH)
    assert store.clusters().classes == 5
    write_model(folder, "b" * 64)
    refused(store, "3 of 3 cases")
    (folder / "case0.json").write_text("[")
    refused(store, "3 of 3 cases")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "swapped"])
def test_damaged_labels_are_named_when_they_are_read_and_count_as_none_when_assigned(store, damage):
    file, source = store.folder / FOLDER / "case1.b2nd", store.info(1)["sha256"]
    assert are_current(store.folder / FOLDER, "case1", "a" * 64, source)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    other = (store.folder / FOLDER / "case2.b2nd").read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-40]), "swapped": other}[damage])
    labels = store.clusters()
    with pytest.raises(UserError, match="labels can't be read") as error:
        labels.read(1, ((0, 1),) * 3)
    assert "case1.b2nd" in str(error.value) and "nnssl_cluster assign 801 3d_fullres" in str(error.value)
    assert labels.read(0, ((0, 1),) * 3).shape == (1, 1, 1, 1)
    assert not are_current(store.folder / FOLDER, "case1", "a" * 64, source)


def test_labels_without_a_whole_json_file_are_not_current(store):
    file, source = store.folder / FOLDER / "case1.json", store.info(1)["sha256"]
    about = json.loads(file.read_text(encoding="utf-8"))
    for key in about:
        file.write_text(json.dumps({name: value for name, value in about.items() if name != key}))
        assert not are_current(store.folder / FOLDER, "case1", "a" * 64, source), key
    file.write_text(json.dumps(about))
    assert are_current(store.folder / FOLDER, "case1", "a" * 64, source)


def test_a_damaged_model_is_named(store):
    file = store.folder / FOLDER / MODEL
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="the cluster model can't be read"):
        read_model(file)
    refused(store, "the cluster model can't be read")
