"""The store: round trip, partial reads, damage."""

import multiprocessing
import pickle

import blosc2
import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.preprocessing.store import CaseStore, is_current, write_case


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "Dataset801_Test" / "nnsslPlans_3d_fullres"
    for i in range(3):
        array = np.random.default_rng(i).normal(size=(2, 30 + i, 40, 50)).astype(np.float32)
        info = {
            "subject": f"s{i}",
            "stored": Geometry(array.shape[1:], (3.0, 2.0, 1.0)).as_dict(),
            "fill": [-1.0, 0.5],
            "settings_sha256": "x",
            "source": [["a", 1, 2]],
        }
        write_case(folder, f"case{i}", array, info, (16, 16, 16))
    return CaseStore(folder)


def original(i):
    return np.random.default_rng(i).normal(size=(2, 30 + i, 40, 50)).astype(np.float32)


def test_cases_come_back_bit_for_bit_whole_and_box_by_box(store):
    assert len(store) == 3 and store.shape(1) == (31, 40, 50) and store.subject(2) == "s2" and store.fill(0) == [-1.0, 0.5]
    assert store.geometry(1).spacing == (3.0, 2.0, 1.0)
    for i in range(3):
        assert np.array_equal(store.read(i), original(i))
        crop = store.read(i, ((5, 21), (0, 40), (33, 50)))
        assert crop.shape == (2, 16, 40, 17) and crop.base is None
        assert np.array_equal(crop, original(i)[:, 5:21, :, 33:50])


def test_a_box_beyond_the_case_is_refused(store):
    for box in (((-1, 5), (0, 5), (0, 5)), ((0, 5), (0, 41), (0, 5))):
        with pytest.raises(ValueError, match="beyond"):
            store.read(0, box)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_open_files_do_not_disturb_other_processes(start, store):
    store.read(1)
    with multiprocessing.get_context(start).Pool(2) as pool:
        found = pool.map(store.read, [0, 1, 2, 1, 0])
    assert all(np.array_equal(array, original(i)) for array, i in zip(found, [0, 1, 2, 1, 0]))
    assert np.array_equal(store.read(1), original(1))


def test_a_box_decompresses_few_blocks(store):
    array = blosc2.open(str(store.folder / "case0.b2nd"))
    assert array.chunks == (1, 16, 16, 16) and array.blocks == (1, 8, 8, 8)


def test_a_store_travels_to_other_processes(store):
    store.read(0)
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read(2), original(2))


def test_a_flipped_byte_is_detected(store):
    file = store.folder / "case1.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    store.verify(1)
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        store.verify(1)


def test_a_missing_array_is_named(store):
    (store.folder / "case1.b2nd").unlink()
    with pytest.raises(UserError, match="can't be read") as error:
        store.read(1)
    assert "case1.b2nd" in str(error.value)


def test_the_data_hash_changes_with_any_case(store, tmp_path):
    before = store.data_hash()
    assert CaseStore(store.folder).data_hash() == before
    write_case(store.folder, "case1", original(1) + 1, store.info(1), (16, 16, 16))
    assert CaseStore(store.folder).data_hash() != before


def test_an_empty_store_names_the_command_to_run(tmp_path):
    with pytest.raises(UserError) as error:
        CaseStore(tmp_path / "Dataset801_Test" / "nnsslPlans_3d_fullres")
    assert "nnssl_preprocess -d 801 -c 3d_fullres" in str(error.value)


def test_a_case_is_current_only_with_the_same_settings_source_and_files(store):
    assert is_current(store.folder, "case0", "x", [["a", 1, 2]])
    assert not is_current(store.folder, "case0", "y", [["a", 1, 2]])
    assert not is_current(store.folder, "case0", "x", [["a", 1, 3]])
    (store.folder / "case0.b2nd").unlink()
    assert not is_current(store.folder, "case0", "x", [["a", 1, 2]])


def test_other_schema_versions_are_refused(store):
    file = store.folder / "case0.json"
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(UserError, match="schema version 9"):
        CaseStore(store.folder)
