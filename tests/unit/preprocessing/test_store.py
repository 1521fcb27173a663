"""The store: round trip, partial reads, damage."""

import multiprocessing
import pickle

import blosc2
import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_text
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.preprocessing import store_index
from nnssl_ext.preprocessing.store import CaseStore, is_current, pack_body, write_case
from nnssl_ext.preprocessing.store_index import index_file


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
    write_text(file, file.read_text().replace('"schema_version": 2', '"schema_version": 9'))
    with pytest.raises(UserError, match="schema version 9"):
        CaseStore(store.folder)


@pytest.mark.parametrize("storage", ["float32", "float16", "uint16"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 3000.0])
def test_every_form_of_storage_keeps_its_stated_error_bound(storage, spread, tmp_path):
    rng = np.random.default_rng(0)
    array = (spread * rng.standard_normal((2, 12, 13, 14)) + 5 * spread * np.arange(2)[:, None, None, None]).astype(np.float32)
    write_case(tmp_path, "case", array, {"subject": "s", "stored": Geometry((12, 13, 14), (1.0,) * 3).as_dict(), "fill": [0.0, 0.0]}, (8, 8, 8), storage)
    store = CaseStore(tmp_path)
    form, read = store.info(0)["storage"], store.read(0)
    error = np.abs(read.astype(np.float64) - array).max((1, 2, 3))
    assert read.dtype == np.float32 and form["dtype"] == storage and (error <= form["max_error"]).all()
    if storage == "float32":
        assert form["max_error"] == [0, 0] and np.array_equal(read, array)
    else:
        assert (error >= np.array(form["max_error"]) / 4).all()  # the bound is not an idle one
        assert blosc2.open(str(tmp_path / "case.b2nd")).dtype == np.dtype(storage)
    assert np.array_equal(store.read(0, ((2, 5), (0, 13), (7, 8))), read[:, 2:5, :, 7:8])


def test_a_constant_channel_survives_quantisation(tmp_path):
    array = np.full((1, 4, 5, 6), 7.25, np.float32)
    write_case(tmp_path, "case", array, {"subject": "s", "stored": Geometry((4, 5, 6), (1.0,) * 3).as_dict(), "fill": [0.0]}, (4, 4, 4), "uint16")
    assert np.array_equal(CaseStore(tmp_path).read(0), array)


def test_float16_refuses_values_beyond_its_range(tmp_path):
    with pytest.raises(UserError, match="float16 can't hold"):
        write_case(tmp_path, "case", np.full((1, 4, 5, 6), 1e5, np.float32), {}, (4, 4, 4), "float16")


def test_masks_are_kept_beside_the_case_and_read_box_by_box(tmp_path):
    mask = np.random.default_rng(0).random((6, 7, 8)) > 0.5
    info = {"subject": "s", "stored": Geometry((6, 7, 8), (1.0,) * 3).as_dict(), "fill": [0.0]}
    write_case(tmp_path, "a.b", np.zeros((1, 6, 7, 8), np.float32), info, (4, 4, 4), masks={"anatomy_mask": mask, "anonymization_mask": ~mask})
    store = CaseStore(tmp_path)
    assert np.array_equal(store.read_mask(0, "anatomy_mask"), mask)
    assert np.array_equal(store.read_mask(0, "anonymization_mask", ((1, 4), (0, 7), (2, 3))), ~mask[1:4, :, 2:3])
    with pytest.raises(UserError, match="no mask 'lung'"):
        store.read_mask(0, "lung")
    store.verify(0)
    (tmp_path / "a.b.masks.b2nd").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        store.verify(0)


def test_a_file_of_another_size_is_refused_when_it_is_opened(store):
    file = store.folder / "case1.b2nd"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match="isn't the file that was written"):
        store.read(1)


def columns(store):
    return [store.identifiers, [store.shape(i) for i in range(len(store))], [store.fill(i) for i in range(len(store))], store.data_hash()]


def test_the_index_is_written_once_and_gives_the_same_store_without_the_case_files(store, monkeypatch):
    assert index_file(store.folder).is_file()
    monkeypatch.setattr(store_index, "read_json", None)  # would fail
    assert columns(CaseStore(store.folder)) == columns(store)


@pytest.mark.parametrize("change", ["added", "replaced", "removed"])
def test_a_changed_folder_makes_the_index_stale(change, store):
    before = columns(store)
    if change == "removed":
        (store.folder / "case1.json").unlink()
    else:
        write_case(store.folder, "case1" if change == "replaced" else "case9", original(2), store.info(2), (16, 16, 16))
    after = columns(CaseStore(store.folder))
    assert after != before and after == columns(CaseStore(store.folder))
    assert after[0] == {"added": ["case0", "case1", "case2", "case9"], "replaced": ["case0", "case1", "case2"], "removed": ["case0", "case2"]}[change]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", None])
def test_a_broken_or_missing_index_is_made_again(content, store):
    before = columns(store)
    if content is None:
        index_file(store.folder).unlink()
    else:
        index_file(store.folder).write_bytes(content)
    assert columns(CaseStore(store.folder)) == before
    assert index_file(store.folder).stat().st_size > 100


def test_a_store_in_a_folder_that_cannot_be_written_is_read_without_an_index(store, monkeypatch):
    index_file(store.folder).unlink()

    def refuse(path):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(store_index, "atomic_path", refuse)
    assert len(CaseStore(store.folder)) == 3 and not index_file(store.folder).exists()


def test_cases_of_unequal_channels_are_refused(store):
    info = {**store.info(0), "fill": [0.0]}
    write_case(store.folder, "case1", original(1)[:1], info, (16, 16, 16))
    with pytest.raises(UserError, match="cases of 1 and 2 channels"):
        CaseStore(store.folder)


def test_the_coarse_body_follows_the_mask_through_resampling(tmp_path):
    body = np.zeros((20, 30, 26), bool)
    body[4:16, 6:24, 5:21] = True
    packed = pack_body(body, (40, 30, 13))
    info = {"subject": "s", "stored": Geometry((40, 30, 13), (1.0,) * 3).as_dict(), "fill": [0.0], "body": packed}
    write_case(tmp_path, "case", np.zeros((1, 40, 30, 13), np.float32), info, (8, 8, 8))
    cells = CaseStore(tmp_path).body(0)
    fine = body.repeat(2, 0)[:, :, ::2]
    padded = np.pad(fine, [(0, -n % 8) for n in fine.shape], mode="edge")
    shares = padded.reshape(5, 8, 4, 8, 2, 8).mean((1, 3, 5))
    assert cells.shape == (5, 4, 2) and np.array_equal(cells[shares > 0.7], np.ones((shares > 0.7).sum(), bool))
    assert not cells[shares < 0.2].any() and cells.any() and not cells.all()
