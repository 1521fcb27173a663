"""The trees of public datasets, a few empty files each."""

import json

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.io.layouts import LAYOUTS, find_entries
from tests.make_raw import body_volume, nnunet_dataset, pretrain_dataset, write_image

BRATS = "HGG/Brats18_{s}/Brats18_{s}_{c}.nii.gz"
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.1"


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def by_name(source):
    return {entry.case.identifier: entry for entry in source.entries}


def files(root, entry):
    return [path.relative_to(root).as_posix() for path in entry.case.images]


def test_brats_has_four_channels_a_label_and_sessions_of_one_patient(tmp_path):
    names = [BRATS.format(s=s, c=c) for s in ("TCIA02_117_1", "TCIA02_117_2") for c in ("flair", "t1", "t1ce", "t2", "seg")]
    source = find_entries(tree(tmp_path, *names, "LGG/Brats18_2013_9_1/Brats18_2013_9_1_t1.nii.gz", "survival_data.csv"))
    found = by_name(source)
    assert source.layout == "brats18" and sorted(found) == ["Brats18_2013_9_1", "Brats18_TCIA02_117_1", "Brats18_TCIA02_117_2"]
    first = found["Brats18_TCIA02_117_1"]
    assert (first.case.subject, first.case.session) == ("Brats18_TCIA02_117", "1") and found["Brats18_TCIA02_117_2"].case.session == "2"
    assert first.case.modalities == ("T1", "T1ce", "T2", "FLAIR")
    assert files(tmp_path, first) == [BRATS.format(s="TCIA02_117_1", c=c) for c in ("t1", "t1ce", "t2", "flair")]
    assert first.label == tmp_path / BRATS.format(s="TCIA02_117_1", c="seg")
    low = found["Brats18_2013_9_1"]  # the channels that it lacks are named all the same: reading it says so
    assert len(low.case.images) == 4 and low.label is None
    assert sorted(source.description["labels"].values()) == [0, 1, 2, 3] and source.relabel == {4: 3}


def test_brats_without_t2_as_in_the_tree_of_radiossl_has_three_channels(tmp_path):
    source = find_entries(tree(tmp_path, *(BRATS.format(s="a_1_1", c=c) for c in ("flair", "t1", "t1ce", "seg"))))
    assert source.entries[0].case.modalities == ("T1", "T1ce", "FLAIR")


def test_lits_volumes_get_their_segmentations_and_its_validation_set_is_held_out(tmp_path):
    names = [f"{part}/{kind}-{n}.nii" for n, part in ((0, "train"), (48, "train"), (28, "val")) for kind in ("ct/volume", "seg/segmentation")]
    source = find_entries(tree(tmp_path, *names))
    assert source.layout == "lits17" and source.description["labels"] == {"background": 0, "liver": 1, "tumour": 2}
    assert {name: (e.test, e.label.relative_to(tmp_path).as_posix()) for name, e in by_name(source).items()} == {
        "volume-0": (False, "train/seg/segmentation-0.nii"),
        "volume-48": (False, "train/seg/segmentation-48.nii"),
        "volume-28": (True, "val/seg/segmentation-28.nii"),
    }
    assert {entry.case.modalities for entry in source.entries} == {("CT",)}


def test_luna_scans_are_named_by_their_series_and_keep_their_fold(tmp_path):
    source = find_entries(tree(tmp_path, f"subset0/{UID}0.mhd", f"subset0/{UID}0.raw", f"subset9/{UID}1.mhd", f"subset9/{UID}1.raw", "annotations.csv"))
    assert source.layout == "luna16"
    assert [(e.case.identifier, e.case.subject, e.fold, e.case.modalities) for e in source.entries] == [
        (f"{UID}0", f"{UID}0", "0", ("CT",)),
        (f"{UID}1", f"{UID}1", "9", ("CT",)),
    ]


def test_luna_crops_keep_class_fold_and_patient_and_get_names_of_their_own(tmp_path):
    names = [f"subset{s}/label{k}/patient{p}/image{i}.nii.gz" for s, k, p, i in ((0, 0, 7, 0), (0, 1, 7, 0), (3, 1, 8, 0), (3, 1, 8, 1))]
    source = find_entries(tree(tmp_path, *names))
    assert source.layout == "luna16_classes"
    assert [(e.case.identifier, e.case.subject, e.category, e.fold) for e in source.entries] == [
        ("image1", "patient8", "1", "3"),
        ("subset0__label0__patient7__image0", "patient7", "0", "0"),
        ("subset0__label1__patient7__image0", "patient7", "1", "0"),
        ("subset3__label1__patient8__image0", "patient8", "1", "3"),
    ]


def test_a_decathlon_list_tells_labels_test_cases_and_the_modalities_of_4d_images(tmp_path):
    description = {
        "modality": {"1": "T1w", "0": "FLAIR"},
        "labels": {"0": "background", "1": "oedema"},
        "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    source = find_entries(tree(tmp_path, "imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz", "imagesTs/BRATS_485.nii.gz"))
    found = by_name(source)
    assert source.layout == "msd" and source.description["labels"] == {"background": 0, "oedema": 1}
    assert found["BRATS_001"].case.modalities == ("FLAIR", "T1w") and files(tmp_path, found["BRATS_001"]) == ["imagesTr/BRATS_001.nii.gz"]
    assert found["BRATS_001"].label == tmp_path / "labelsTr/BRATS_001.nii.gz"
    assert found["BRATS_485"].test and found["BRATS_485"].label is None


def test_a_malformed_decathlon_list_is_one_error(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "training": [{"label": "x"}]}))
    with pytest.raises(UserError, match="malformed"):
        find_entries(tmp_path)


def test_flare_takes_labelled_and_unlabelled_folders(tmp_path):
    names = ("Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz", "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0001.nii.gz")
    more = ("Training/FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz", "Validation/FLARETs_0001_0000.nii.gz")
    source = find_entries(tree(tmp_path, *names, *more))
    found = by_name(source)
    assert source.layout == "flare22" and source.description["labels"]["left_kidney"] == 13
    assert {name: (entry.label is not None, entry.test) for name, entry in found.items()} == {
        "FLARE22_Tr_0001": (True, False),
        "Case_00001": (False, False),
        "FLARETs_0001": (False, True),
    }


def test_images_and_labels_side_by_side_need_a_modality(tmp_path):
    tree(tmp_path, "images/image0.nii.gz", "images/image1.nii.gz", "labels/image0.nii.gz")
    with pytest.raises(UserError, match="modality") as error:
        find_entries(tmp_path)
    assert "-modality" in error.value.fix
    source = find_entries(tmp_path, modalities=["CT"])
    assert source.layout == "images_labels"
    assert [(e.case.identifier, e.case.modalities, e.label is not None) for e in source.entries] == [("image0", ("CT",), True), ("image1", ("CT",), False)]
    assert find_entries(tmp_path, modalities=["T1w", "T2w"]).entries[0].case.modalities == ("T1w", "T2w")  # 4D


def test_nnunet_raw_folders_keep_labels_test_cases_and_names_of_labels(tmp_path):
    folder = nnunet_dataset(tmp_path, cases=2, channels=2, modality="T1w")
    tree(folder, "labelsTr/case0.nii.gz", "imagesTs/case9_0000.nii.gz", "imagesTs/case9_0001.nii.gz", "labelsTs/case9.nii.gz")
    found = by_name(find_entries(folder))
    assert {name: (len(entry.case.images), entry.test) for name, entry in found.items()} == {"case0": (2, False), "case1": (2, False), "case9": (2, True)}
    assert [found[name].label and found[name].label.relative_to(folder).as_posix() for name in ("case0", "case1", "case9")] == [
        "labelsTr/case0.nii.gz",
        None,
        "labelsTs/case9.nii.gz",
    ]
    assert find_entries(folder).description == {"labels": {"background": 0}}
    tree(folder, "imagesTr/case0_0002.nii.gz")
    with pytest.raises(UserError, match="other channels"):
        find_entries(folder)


def test_a_written_index_counts_more_than_names_of_files(folders):
    folder = pretrain_dataset(folders["nnssl_raw"], subjects=1)
    tree(folder, "images/a.nii.gz")
    source = find_entries(folder)
    assert source.layout == "index" and [entry.case.modalities for entry in source.entries] == [("CT",), ("MR",)]


def test_an_unknown_tree_is_an_error_that_lists_what_was_looked_for(tmp_path):
    with pytest.raises(UserError) as error:
        find_entries(tree(tmp_path, "somewhere/picture.png"))
    assert all(name in str(error.value) for name in LAYOUTS) and len(str(error.value).splitlines()) <= 3


def test_a_layout_can_be_chosen_and_a_wrong_one_says_what_it_wants(tmp_path):
    tree(tmp_path, f"subset0/{UID}.mhd")
    assert len(find_entries(tmp_path, "luna16").entries) == 1
    with pytest.raises(UserError, match="volume-N"):
        find_entries(tmp_path, "lits17")
    with pytest.raises(UserError) as error:
        find_entries(tmp_path, "luna61")
    assert "luna16" in error.value.fix
    with pytest.raises(UserError, match="not found"):
        find_entries(tmp_path / "nowhere")
    with pytest.raises(UserError, match="2 modalities were given"):
        find_entries(tmp_path, "luna16", ["CT", "PET"])


def test_identifiers_are_unique_and_fit_for_file_names(tmp_path):
    names = [
        "a/images/Zoë 1.nii.gz",
        "a/images/Zoï 1.nii.gz",
        "b/images/x.nii.gz",
        "c/images/X.nii.gz",
        f"d/images/{'long' * 50}.nii.gz",
        "d/images/a b.nii.gz",
    ]
    found = [entry.case.identifier for entry in find_entries(tree(tmp_path, *names), modalities=["CT"]).entries]
    assert len({name.casefold() for name in found}) == len(names)
    assert all(name.isascii() and " " not in name and "/" not in name and len(name) <= 80 for name in found)
    assert {"b__images__x", "c__images__X", "a-b"} <= set(found)


def test_hidden_files_and_loops_of_links_are_passed_over(tmp_path):
    tree(tmp_path, "images/a.nii.gz", "images/._a.nii.gz", ".cache/images/b.nii.gz")
    (tmp_path / "images" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "there").symlink_to(tmp_path / "images", target_is_directory=True)
    (tmp_path / "images" / "back").symlink_to(tmp_path / "other", target_is_directory=True)
    assert [entry.case.identifier for entry in find_entries(tmp_path, modalities=["CT"]).entries] == ["a"]


def test_a_linked_folder_is_followed(tmp_path):
    write_image(tmp_path / "archive" / "a.nii.gz", body_volume())
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "images").symlink_to(tmp_path / "archive", target_is_directory=True)
    assert len(find_entries(tmp_path / "source", modalities=["CT"]).entries) == 1
