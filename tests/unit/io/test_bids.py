"""BIDS trees to cases."""

import json

from nnssl_ext.io.index import read_index, sessions
from tests.make_raw import body_volume, write_image


def touch(folder, *names):
    for name in names:
        write_image(folder / name, body_volume((3, 4, 5)))


def test_anatomical_images_are_cases_with_subject_session_and_suffix(tmp_path):
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    touch(tmp_path / "sub-01" / "ses-a" / "anat", "sub-01_ses-a_T1w.nii.gz", "sub-01_ses-a_run-1_FLAIR.nii", "sub-01_ses-a_run-2_FLAIR.nii.gz")
    touch(tmp_path / "sub-01" / "ses-b" / "anat", "sub-01_ses-b_acq-high_T1w.nii.gz")
    touch(tmp_path / "sub-02" / "anat", "sub-02_T2w.nii.gz")
    touch(tmp_path / "sub-02" / "ct", "sub-02_ct.nii.gz")
    touch(tmp_path / "sub-02" / "pet", "sub-02_pet.nii.gz")
    cases = read_index(tmp_path)
    assert [(case.identifier, case.subject, case.session, case.modalities[0]) for case in cases] == [
        ("sub-01_ses-a_T1w", "sub-01", "ses-a", "T1w"),
        ("sub-01_ses-a_run-1_FLAIR", "sub-01", "ses-a", "FLAIR"),
        ("sub-01_ses-a_run-2_FLAIR", "sub-01", "ses-a", "FLAIR"),
        ("sub-01_ses-b_acq-high_T1w", "sub-01", "ses-b", "T1w"),
        ("sub-02_T2w", "sub-02", "1", "T2w"),
        ("sub-02_ct", "sub-02", "1", "CT"),
        ("sub-02_pet", "sub-02", "1", "PET"),
    ]
    assert all(case.images[0].is_file() for case in cases)
    assert [len(group) for group in sessions(cases)] == [3, 1, 3] and sessions(cases[::-1]) == sessions(cases)


def test_what_is_derived_or_no_magnitude_volume_is_ignored(tmp_path):
    touch(
        tmp_path / "sub-01" / "anat", "sub-01_T1w.nii.gz", "sub-01_dseg.nii.gz", "sub-01_mask.nii.gz", "sub-01_part-phase_T2starw.nii.gz", "._sub-01_T2w.nii.gz"
    )
    touch(tmp_path / "sub-01" / "func", "sub-01_task-rest_bold.nii.gz")
    touch(tmp_path / "sub-01" / "dwi", "sub-01_dwi.nii.gz")
    touch(tmp_path / "derivatives" / "x" / "sub-01" / "anat", "sub-01_T1w.nii.gz")
    (tmp_path / "sub-01" / "anat" / "sub-01_T1w.json").write_text("{}")
    assert [case.identifier for case in read_index(tmp_path)] == ["sub-01_T1w"]
