"""Trees of DICOM files: one case per series, patients named by hashes, changed folders alone are read again."""

import json

import pytest

from nnssl_ext.core.errors import ImageError, UserError
from nnssl_ext.io import dicom_files
from nnssl_ext.io.dicom_tree import read_dicom_tree
from nnssl_ext.io.index import read_index
from nnssl_ext.io.readers import read_volume
from tests.make_raw import body_volume, dicom_slice, write_dicom, write_multiframe

ARRAY = body_volume((4, 5, 6))


@pytest.fixture
def tree(tmp_path):
    """Two patients; the first with two studies, one of them a folder with two series."""
    folder = tmp_path / "Dataset810_Dicom"
    write_dicom(folder / "a" / "x" / "ct", ARRAY, series="1.2.1.1", PatientID="A")
    write_dicom(folder / "a" / "y", ARRAY, series="1.2.1.2", PatientID="A", StudyInstanceUID="1.9", Modality="MR")
    write_dicom(folder / "a" / "y", ARRAY, series="1.2.1.3", PatientID="A", StudyInstanceUID="1.9", Modality="PT")
    write_dicom(folder / "b", ARRAY, series="1.2.2.1", PatientID="B")
    return folder


def test_every_series_is_a_case_of_its_patient_and_study(tree):
    cases = read_index(tree)
    assert len(cases) == 4 and len({case.identifier for case in cases}) == 4
    assert sorted(case.images[0].relative_to(tree).as_posix() for case in cases) == ["a/x/ct", "a/y#1.2.1.2", "a/y#1.2.1.3", "b"]
    by_path = {case.images[0].relative_to(tree).as_posix(): case for case in cases}
    assert by_path["a/x/ct"].subject == by_path["a/y#1.2.1.2"].subject != by_path["b"].subject
    assert by_path["a/x/ct"].session != by_path["a/y#1.2.1.2"].session == by_path["a/y#1.2.1.3"].session
    assert [by_path[name].modalities for name in ("a/x/ct", "a/y#1.2.1.2", "a/y#1.2.1.3")] == [("CT",), ("MR",), ("PT",)]
    assert all(read_volume(case.images[0])[0].shape == (4, 5, 6) for case in cases)


def test_what_is_no_volume_is_left_out_and_said(tree, capsys):
    write_dicom(tree / "c" / "scout", ARRAY, series="1.2.3.1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_dicom(tree / "c" / "named", ARRAY, series="1.2.3.2", SeriesDescription="3-plane Localizer")
    write_dicom(tree / "c" / "two", ARRAY[:2], series="1.2.3.3")
    write_dicom(tree / "c" / "seg", ARRAY, series="1.2.3.4", Modality="SEG")
    write_dicom(tree / "c" / "screen", ARRAY, series="1.2.3.5", SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ImagePositionPatient=None)
    (tree / "d").mkdir()
    (tree / "d" / "cut.dcm").write_bytes(b"")
    cases, left_out = read_dicom_tree(tree)
    assert len(cases) == 4
    assert {path.name: reason for path, reason in left_out} == {
        "scout": "localiser",
        "named": "localiser",
        "two": "fewer than 3 slices",
        "seg": "no image (SEG)",
        "screen": "secondary capture",
        "d": "unreadable file",
    }
    read_index(tree)
    out = capsys.readouterr().out
    assert "2 DICOM series left out of the index: localiser" in out and "1 DICOM series left out of the index: no image (SEG)" in out


def test_a_damaged_file_beside_a_series_is_a_verdict_on_the_series(tree):
    (tree / "b" / "1_0009.dcm").write_bytes(b"")
    (case,) = (case for case in read_index(tree) if case.images[0].name == "b")
    with pytest.raises(ImageError, match="empty"):
        read_volume(case.images[0])


def test_nothing_written_names_a_patient(tree, tmp_path):
    write_dicom(tree / "c", ARRAY, series="1.2.3.1", SeriesDescription="Thorax Mueller")
    cases = read_index(tree, tmp_path / "cache.json")
    written = (tmp_path / "cache.json").read_text() + repr(cases)
    assert "MUELLER" not in written.upper()


@pytest.mark.parametrize("patient", [None, "", "Anonymous", "0"])
def test_without_a_patient_id_the_top_folder_is_the_subject(patient, tmp_path):
    for name in ("first", "second"):
        write_dicom(tmp_path / name / "ct", ARRAY, series=f"1.2.{len(name)}.1", PatientID=patient)
    assert {case.subject for case in read_index(tmp_path)} == {"first", "second"}


def test_a_series_spread_over_folders_is_one_case_and_its_copy_none(tmp_path):
    for number in range(4):
        write_dicom(tmp_path / "p" / f"part{number // 2}", ARRAY, leave_out=[k for k in range(4) if k != number])
    (case,) = read_index(tmp_path)
    assert case.images[0] == tmp_path / "p#1.2.3.1" and (read_volume(case.images[0])[0] == ARRAY).all()
    write_dicom(tmp_path / "q", ARRAY, series="1.2.9.1")
    write_dicom(tmp_path / "q copy", ARRAY, series="1.2.9.1")
    cases, left_out = read_dicom_tree(tmp_path)
    assert [case.images[0].name for case in sorted(cases, key=lambda case: case.images[0].name)] == ["p#1.2.3.1", "q"]
    assert left_out == [(tmp_path / "q copy", "copy of another folder")]


def test_multi_frame_files_count_their_frames(tmp_path):
    write_multiframe(tmp_path / "p" / "a.dcm", ARRAY)
    (case,) = read_index(tmp_path)
    assert (read_volume(case.images[0])[0] == ARRAY).all()


def test_a_second_run_reads_only_changed_folders(tree, tmp_path, monkeypatch):
    cache, read = tmp_path / "new" / "cache.json", []
    first = read_index(tree, cache)
    monkeypatch.setattr("nnssl_ext.io.dicom_tree.read_folder", lambda folder, groups: read.append(folder.name) or dicom_files.read_folder(folder, groups))
    assert read_index(tree, cache) == first and read == []
    dicom_slice(ARRAY[0], 7, "1.2.2.7").save_as(tree / "b" / "new.dcm", enforce_file_format=True)
    read_index(tree, cache)
    assert read == ["b"]
    for file in (tree / "b").iterdir():
        file.unlink()
    assert len(read_index(tree, cache)) == 3 and "b" not in json.loads(cache.read_text())["folders"]
    cache.write_text("{")
    assert len(read_index(tree, cache)) == 3
    cache.write_text('{"version": "dicom 0", "folders": {}}')
    assert len(read_index(tree, cache)) == 3


def test_several_processes_find_the_same(tmp_path):
    for number in range(12):
        write_dicom(tmp_path / f"p{number}", ARRAY[:3], series=f"1.2.{number}.1", PatientID=f"P{number}")
    assert read_index(tmp_path, processes=2) == read_index(tmp_path)


def test_links_to_folders_are_followed_and_loops_end(tree, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a").symlink_to(tree / "a")
    (tree / "a" / "loop").symlink_to(tree / "a")
    assert len(read_index(linked)) == 3


def test_a_tree_without_a_dicom_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="no BIDS, DICOM or HDF5 tree"):
        read_index(tmp_path)
