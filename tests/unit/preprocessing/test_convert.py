"""Converted datasets read back as their sources, voxel by voxel and place by place."""

import errno
import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

import nnssl_ext.preprocessing.convert as convert_module
from nnssl_ext.core.errors import DiskError, ImageError, UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io.index import read_index
from nnssl_ext.io.layouts import find_entries
from nnssl_ext.io.raw_dataset import indexes, integer_type, save, write_nifti
from nnssl_ext.io.readers import read_case, read_volume
from nnssl_ext.preprocessing.convert import convert, split_4d
from nnssl_ext.preprocessing.parallel import Workers
from tests.make_raw import body_volume, nnunet_dataset, pretrain_dataset, write_image

SHAPE = (6, 7, 8)


def image(path, index=0, seg=None, shape=SHAPE, **place):
    """A small CT, or a label of given values."""
    array = body_volume(shape, index) if seg is None else np.resize(np.asarray(seg, np.uint8), shape)
    return write_image(path, array, **place)


def lits(root, cases=((0, "train"), (48, "train"), (28, "val"))):
    for n, part in cases:
        image(root / part / "ct" / f"volume-{n}.nii", n)
        image(root / part / "seg" / f"segmentation-{n}.nii", seg=[0, 1, 2])
    return root


def brats(root, *cases, channels=("flair", "t1", "t1ce", "t2")):
    for number, case in enumerate(cases):
        for channel, name in enumerate(channels):
            image(root / "HGG" / case / f"{case}_{name}.nii.gz", 10 * number + channel)
        image(root / "HGG" / case / f"{case}_seg.nii.gz", seg=[0, 1, 2, 4])
    return root


def run(folders, source, name="Dataset801_Out", wanted=None, processes=1, modalities=(), layout=None):
    settings = {"source": str(source), "layout": layout}
    failed = convert(find_entries(source, layout, modalities), name, settings, Workers(processes), wanted)
    return folders["nnssl_raw"] / name, failed


def description(folder):
    return json.loads((folder / "dataset.json").read_text())


def assert_same(first, second):
    (a, where_a), (b, where_b) = first, second
    assert np.array_equal(a, b) and where_a.shape == where_b.shape
    for corner in np.ndindex(2, 2, 2):
        voxel = [c * (n - 1) for c, n in zip(corner, where_a.shape)]
        assert np.allclose(where_a.to_world(voxel), where_b.to_world(voxel), rtol=0, atol=1e-4)


def test_lits_becomes_an_nnunet_dataset_of_copies_with_a_held_out_test_set(folders, tmp_path):
    source = lits(tmp_path / "LiTS17")
    folder, failed = run(folders, source)
    assert not failed and sorted(path.name for path in (folder / "imagesTr").iterdir()) == ["volume-0_0000.nii", "volume-48_0000.nii"]
    assert (folder / "imagesTs" / "volume-28_0000.nii").read_bytes() == (source / "val/ct/volume-28.nii").read_bytes()
    assert (folder / "labelsTr" / "volume-0.nii").read_bytes() == (source / "train/seg/segmentation-0.nii").read_bytes()
    assert (folder / "labelsTs" / "volume-28.nii").is_file()
    assert not (folder / "imagesTr" / "volume-0_0000.nii").samefile(source / "train/ct/volume-0.nii")
    assert description(folder) == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii",
    }
    cases = read_index(folder)
    assert len(cases) == 2 and {case.modalities for case in cases} == {("CT",)}  # the test set is not pretrained on
    (first,) = [case for case in cases if case.identifier.endswith("volume-0")]
    assert_same(read_volume(first.images[0]), read_volume(source / "train/ct/volume-0.nii"))


def test_brats_keeps_four_channels_and_renumbers_label_4(folders, tmp_path):
    source = brats(tmp_path / "BraTS18", "Brats18_2013_1_1", "Brats18_2013_2_1")
    folder, failed = run(folders, source)
    assert not failed and not (folder / "pretrain_data.json").exists()
    assert description(folder)["channel_names"] == {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    cases = read_index(folder)
    case = cases[0]
    assert len({case.subject for case in cases}) == 2 and not case.subject.endswith("_1_1")  # the last number is the visit
    array, geometry = read_case(case)
    for channel, name in enumerate(("t1", "t1ce", "t2", "flair")):
        assert_same((array[channel], geometry), read_volume(source / "HGG/Brats18_2013_1_1" / f"Brats18_2013_1_1_{name}.nii.gz"))
    label = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / "Brats18_2013_1_1.nii.gz")))
    assert np.array_equal(label, np.resize([0, 1, 2, 3], SHAPE)) and label.dtype == np.uint8


def test_channels_as_single_images_are_chosen_by_the_format(folders, tmp_path):
    folder, _ = run(folders, brats(tmp_path / "BraTS18", "Brats18_2013_1_1", "Brats18_2013_1_2"), wanted="pretrain_data")
    cases = read_index(folder)
    assert len(cases) == 8 and {case.subject for case in cases} == {"801/Brats18_2013_1"} and {case.session for case in cases} == {"1", "2"}
    assert {case.modalities for case in cases} == {("T1",), ("T1ce",), ("T2",), ("FLAIR",)}
    run(folders, tmp_path / "BraTS18", wanted="nnunet")  # only the index is written again
    assert [case.modalities for case in read_index(folder)] == [("T1", "T1ce", "T2", "FLAIR")] * 2


def test_a_case_without_one_of_the_channels_is_listed_and_left_out(folders, tmp_path):
    source = brats(tmp_path / "BraTS18", "Brats18_2013_1_1", "Brats18_2013_2_1")
    (source / "HGG/Brats18_2013_2_1/Brats18_2013_2_1_t2.nii.gz").unlink()
    folder, failed = run(folders, source)
    assert list(failed) == ["Brats18_2013_2_1"] and "not found" in failed["Brats18_2013_2_1"]
    assert [case.identifier for case in read_index(folder)] == ["Brats18_2013_1_1"] and description(folder)["numTraining"] == 1


def test_luna_scans_become_nifti_of_the_same_integers_at_the_same_place(folders, tmp_path):
    names = ["1.3.6.1.4.1.1", "1.3.6.1.4.1.2"]
    for subset, name in enumerate(names):
        image(tmp_path / "LUNA16" / f"subset{subset}" / f"{name}.mhd", subset, spacing=(2.5, 0.7, 0.7), origin=(-198.1, -195.0, -335.21))
    folder, failed = run(folders, tmp_path / "LUNA16")
    cases = read_index(folder)
    assert not failed and [case.subject for case in cases] == [f"801/{name}" for name in names]
    assert_same(read_volume(cases[1].images[0]), read_volume(tmp_path / "LUNA16/subset1" / f"{names[1]}.mhd"))
    assert nibabel.load(cases[1].images[0]).get_data_dtype() == np.int16
    assert (folder / "classes.csv").read_text().splitlines() == ["case,subject,class,fold", f"{names[0]},{names[0]},,0", f"{names[1]},{names[1]},,1"]


def test_classes_and_folds_of_volumes_are_listed(folders, tmp_path):
    for subset, label, patient in ((0, 0, 7), (1, 1, 8)):
        image(tmp_path / "src" / f"subset{subset}" / f"label{label}" / f"patient{patient}" / "image0.nii.gz", patient)
    folder, _ = run(folders, tmp_path / "src")
    rows = (folder / "classes.csv").read_text().splitlines()
    assert rows[1:] == ["subset0__label0__patient7__image0,patient7,0,0", "subset1__label1__patient8__image0,patient8,1,1"]


def test_unlabelled_cases_beside_labelled_ones_go_to_imagesun(folders, tmp_path):
    base = tmp_path / "FLARE22" / "Training"
    image(base / "FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz")
    image(base / "FLARE22_LabeledCase50/labels/FLARE22_Tr_0001.nii.gz", seg=range(14))
    image(base / "FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz", 1)
    folder, failed = run(folders, tmp_path / "FLARE22", wanted="nnunet")
    assert not failed and (folder / "imagesTr/FLARE22_Tr_0001_0000.nii.gz").is_file() and (folder / "imagesUn/Case_00001_0000.nii.gz").is_file()
    assert description(folder)["numTraining"] == 1 and [case.identifier for case in read_index(folder)] == ["Case_00001", "FLARE22_Tr_0001"]


def four_d(path, channels=2, slope=None, shape=(8, 7, 6)):
    affine = np.array([[0, -1.5, 0, 7], [2.0, 0, 0, -8], [0, 0, 3, 9], [0, 0, 0, 1]])
    data = np.stack([body_volume(shape, c) for c in range(channels)], -1)
    made = nibabel.Nifti1Image(data, affine)
    made.header["descrip"], made.header["db_name"] = b"Jane Doe", b"Jane Doe"
    made.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    if slope:
        made.header.set_slope_inter(*slope)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(made, path)
    return data, affine


def test_a_4d_image_is_split_into_channels_with_its_place_and_number_type(folders, tmp_path):
    source = tmp_path / "Task01"
    data, affine = four_d(source / "imagesTr/BRATS_001.nii.gz")
    labels = nibabel.Nifti1Image(np.resize(np.arange(3, dtype=np.uint8), (8, 7, 6)), affine)
    (source / "labelsTr").mkdir()
    nibabel.save(labels, source / "labelsTr/BRATS_001.nii.gz")
    content = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "oedema", "2": "core"}}
    content["training"] = [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}]
    (source / "dataset.json").write_text(json.dumps(content))
    folder, failed = run(folders, source)
    assert not failed and description(folder)["labels"] == {"background": 0, "oedema": 1, "core": 2}
    (case,) = read_index(folder)
    assert case.modalities == ("FLAIR", "T1w")
    for channel, path in enumerate(case.images):
        written = nibabel.load(path)
        assert np.array_equal(np.asarray(written.dataobj), data[..., channel]) and written.get_data_dtype() == np.int16
        assert np.allclose(written.affine, affine, rtol=0, atol=1e-6)
        assert b"Jane" not in gzip.decompress(path.read_bytes())
    assert read_case(case)[0].shape == (2, 6, 7, 8)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_scaled_4d_image_is_split_into_its_scaled_values(tmp_path):
    data, _ = four_d(tmp_path / "a.nii.gz", slope=(0.5, 10))
    whole = nibabel.load(tmp_path / "a.nii.gz").get_fdata()
    for channel, path in enumerate(split_4d(tmp_path / "a.nii.gz", 2, tmp_path / "out")):
        assert np.array_equal(read_volume(path)[0].transpose(2, 1, 0), whole[..., channel].astype(np.float32))


def test_a_4d_image_that_cannot_be_split_says_why(tmp_path):
    four_d(tmp_path / "a.nii.gz", channels=3, shape=(20, 24, 28))
    with pytest.raises(ImageError, match="2 modalities"):
        split_4d(tmp_path / "a.nii.gz", 2, tmp_path)
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.nii.gz").write_bytes(b"no image")
    for name, kind in (("cut", "truncated"), ("text", "format"), ("gone", "missing")):
        with pytest.raises(ImageError) as error:
            split_4d(tmp_path / f"{name}.nii.gz", 3, tmp_path)
        assert error.value.kind == kind


def test_broken_cases_are_listed_and_left_out_and_the_others_are_converted(folders, tmp_path):
    source = lits(tmp_path / "LiTS17", [(n, "train") for n in range(6)])
    (source / "train/ct/volume-0.nii").write_bytes(b"")
    image(source / "train/seg/segmentation-1.nii", seg=[0, 1], origin=(0.0, 0.0, 0.0))
    image(source / "train/seg/segmentation-2.nii", seg=[0, 7])
    write_image(source / "train/seg/segmentation-3.nii", np.resize(np.float32([0, 0.5]), SHAPE))
    (source / "train/ct/volume-4.nii").write_bytes((source / "train/ct/volume-4.nii").read_bytes()[:-9])
    folder, failed = run(folders, source)
    reasons = {"volume-0": "empty", "volume-1": "not on the grid", "volume-2": "without a name: [7]", "volume-3": "no label numbers", "volume-4": "truncated"}
    assert set(failed) == set(reasons) and all(reason in failed[name] for name, reason in reasons.items())
    assert sorted(path.name for path in folder.rglob("volume*.nii")) == ["volume-5.nii", "volume-5_0000.nii"]
    assert len(read_index(folder)) == 1


def test_finished_cases_are_skipped_and_changed_ones_done_again(folders, tmp_path, capsys):
    source = lits(tmp_path / "LiTS17")
    (source / "train/ct/volume-48.nii").write_bytes(b"")
    folder, failed = run(folders, source)
    assert list(failed) == ["volume-48"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.nii")}
    image(source / "train/ct/volume-48.nii", 5)
    image(source / "val/seg/segmentation-28.nii", seg=[0, 2])
    capsys.readouterr()
    folder, failed = run(folders, source)
    assert not failed and "1 of 3 cases are finished already" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.nii")}
    assert len(after) == 6 and {name for name in before if before[name] == after[name]} == {"volume-0_0000.nii", "volume-0.nii"}
    (source / "val/ct/volume-28.nii").write_bytes(b"")  # what breaks later is taken out
    folder, failed = run(folders, source)
    assert list(failed) == ["volume-28"] and not list((folder / "imagesTs").iterdir()) and not list((folder / "labelsTs").iterdir())


def test_new_source_files_can_move_and_rewrite_finished_cases(folders, tmp_path):
    source = tmp_path / "src"
    image(source / "images/a.nrrd", 1)
    folder, _ = run(folders, source, modalities=["CT"])
    assert (folder / "imagesTr/a_0000.nrrd").is_file()
    image(source / "images/b.nii.gz", 2)
    image(source / "labels/b.nii.gz", seg=[0, 1])
    run(folders, source, modalities=["CT"])
    files = {path.relative_to(folder).as_posix() for place in ("images*", "labels*") for path in folder.glob(f"{place}/*")}
    assert files == {"imagesUn/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"}


def test_cases_that_left_the_source_stay_and_are_named(folders, tmp_path, capsys):
    source = lits(tmp_path / "LiTS17")
    run(folders, source)
    (source / "train/ct/volume-48.nii").unlink()
    folder, _ = run(folders, source)
    assert "1 converted cases are no longer in the source and stay: volume-48" in capsys.readouterr().out
    assert description(folder)["numTraining"] == 2 == len(read_index(folder))


def test_an_interrupted_conversion_goes_on_where_it_stopped(folders, tmp_path, monkeypatch):
    source = brats(tmp_path / "BraTS18", *(f"Brats18_2013_{n}_1" for n in range(3)))
    whole, _ = run(folders, source, name="Dataset802_Whole")

    def interrupted(folder, record):
        if record.identifier != "Brats18_2013_0_1":
            raise KeyboardInterrupt
        save(folder, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert_module, "save", interrupted)
        run(folders, source)
    folder = folders["nnssl_raw"] / "Dataset801_Out"
    assert (folder / "imagesTr/Brats18_2013_1_1_0003.nii.gz").is_file() and not (folder / "dataset.json").exists()
    (folder / ".split-abandoned").mkdir()
    (folder / "imagesTr/Brats18_2013_2_1_0000.nii.gz").write_bytes(b"half")
    first = (folder / "imagesTr/Brats18_2013_0_1_0000.nii.gz").stat().st_mtime_ns
    assert not run(folders, source)[1]
    assert (folder / "imagesTr/Brats18_2013_0_1_0000.nii.gz").stat().st_mtime_ns == first
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} and len(files) == 15 + 3 + 2
    assert all((whole / path).read_bytes() == (folder / path).read_bytes() for path in files)


def test_a_full_disk_stops_the_conversion_and_leaves_no_half_file(folders, tmp_path, monkeypatch):
    source = lits(tmp_path / "LiTS17")

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="full"):
        patch.setattr(convert_module.shutil, "copyfile", full)
        run(folders, source)
    assert not list((folders["nnssl_raw"] / "Dataset801_Out").rglob("*.nii*"))
    assert not run(folders, source)[1]


def test_a_header_whose_voxels_lie_in_another_file_is_not_copied_alone(folders, tmp_path):
    image(tmp_path / "src/images/a.nrrd")
    whole = (tmp_path / "src/images/a.nrrd").read_bytes()
    head, _, _ = whole.partition(b"\n\n")
    raw = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "src/images/a.nrrd"))).tobytes()
    (tmp_path / "src/images/a.nrrd").write_bytes(head.replace(b"gzip", b"raw") + b"\ndata file: a.bin\n")
    (tmp_path / "src/images/a.bin").write_bytes(raw)
    folder, failed = run(folders, tmp_path / "src", modalities=["CT"])
    assert not failed
    assert_same(read_volume(read_index(folder)[0].images[0]), read_volume(tmp_path / "src/images/a.nrrd"))


def test_a_missing_output_is_written_again(folders, tmp_path):
    folder, _ = run(folders, lits(tmp_path / "LiTS17"))
    (folder / "labelsTr" / "volume-0.nii").unlink()
    run(folders, tmp_path / "LiTS17")
    assert (folder / "labelsTr" / "volume-0.nii").is_file()


def test_folders_with_other_content_are_refused(folders, tmp_path):
    source = lits(tmp_path / "LiTS17")
    run(folders, source)
    with pytest.raises(UserError, match="another source"):
        run(folders, brats(tmp_path / "BraTS18", "Brats18_a_1_1"))
    nnunet_dataset(folders["nnssl_raw"], name="Dataset802_Mine")
    with pytest.raises(UserError, match="not made by nnssl_convert"):
        run(folders, source, name="Dataset802_Mine")


def test_two_processes_write_the_same_files(folders, tmp_path):
    source = brats(tmp_path / "BraTS18", "Brats18_2013_1_1", "Brats18_2013_2_1")
    one, two = run(folders, source)[0], run(folders, source, name="Dataset802_Out", processes=2)[0]
    files = [path.relative_to(one) for path in one.rglob("*.nii.gz")]
    assert len(files) == 10 and all((one / path).read_bytes() == (two / path).read_bytes() for path in files)


def test_an_index_with_masks_and_mixed_modalities_keeps_them(folders, tmp_path):
    source = pretrain_dataset(folders["nnssl_raw"], subjects=2)
    index = json.loads((source / "pretrain_data.json").read_text())
    image(source / "mask.nii.gz", seg=[1], shape=(20, 24, 28))  # all body: a constant mask is no defect
    index["datasets"]["7"]["subjects"]["s0"]["sessions"]["ses0"]["images"][0]["associated_masks"] = {"anatomy_mask": "mask.nii.gz"}
    (source / "pretrain_data.json").write_text(json.dumps(index))
    folder, failed = run(folders, source)
    assert not failed and not (folder / "dataset.json").exists()
    before, after = read_index(source), read_index(folder)
    assert [case.modalities for case in after] == [case.modalities for case in before] and len({case.subject for case in after}) == 2
    assert [case.anatomy_mask is not None for case in after] == [case.anatomy_mask is not None for case in before]
    assert '"age"' not in (folder / "pretrain_data.json").read_text()
    for old, new in zip(before, after):
        assert_same((read_case(new)[0][0], read_case(new)[1]), read_volume(old.images[0]))
    with pytest.raises(UserError, match="different channels"):
        run(folders, source, wanted="nnunet")


def test_files_of_different_formats_share_one_ending(folders, tmp_path):
    source = tmp_path / "src"
    for number, ending in enumerate((".nii.gz", ".nrrd", ".mha")):
        image(source / "images" / f"c{number}{ending}", number)
    folder, failed = run(folders, source, modalities=["CT"])
    assert not failed and description(folder)["file_ending"] == ".nii.gz"
    for number, (case, ending) in enumerate(zip(read_index(folder), (".nii.gz", ".nrrd", ".mha"))):
        assert_same(read_volume(case.images[0]), read_volume(source / "images" / f"c{number}{ending}"))
    assert (folder / "imagesTr/c0_0000.nii.gz").read_bytes() == (source / "images/c0.nii.gz").read_bytes()


@pytest.mark.nnunet
def test_nnunets_integrity_check_accepts_a_converted_dataset(folders, tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder, _ = run(folders, brats(tmp_path / "BraTS18", "Brats18_2013_1_1", "Brats18_2013_2_1"))
    verify_dataset_integrity(str(folder), num_processes=1)


def test_labels_without_names_are_numbered_without_gaps(folders, tmp_path):
    source = tmp_path / "src"
    image(source / "images/a.nii.gz")
    image(source / "labels/a.nii.gz", seg=[0, 1, 3])
    image(source / "images/b.nii.gz")
    image(source / "labels/b.nii.gz", seg=[0])  # an empty label is a label
    folder, failed = run(folders, source, modalities=["CT"])
    assert not failed and description(folder)["labels"] == {"background": 0, "label_1": 1, "label_2": 2, "label_3": 3}


@pytest.mark.parametrize("seed", range(8))
def test_written_geometry_is_read_back_within_a_ten_thousandth_of_a_millimetre(tmp_path, seed):
    rng = sample_rng(0, seed, "test")
    direction, _ = np.linalg.qr(rng.normal(size=(3, 3)))  # rotations and reflections
    if seed < 3:
        direction = np.diag([1.0, 1.0, 1.0])[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
    place = Geometry((60, 300, 300), (3.0, 0.7123, 0.7), tuple(float(v) for v in rng.uniform(-1000, 1000, 3)), tuple(float(v) for v in direction.ravel()))
    array = np.zeros(place.shape, np.float32)
    array[0, 0, 0] = 1
    write_nifti(tmp_path / "a.nii.gz", array, place)
    assert_same(read_volume(tmp_path / "a.nii.gz"), (array, place))


@pytest.mark.parametrize(
    "values, kind",
    [((0, 255), np.uint8), ((-1, 255), np.int16), ((0, 40000), np.uint16), ((-1, 40000), np.int32), ((0, 0.5), np.float32), ((0, 2**40), np.float32)],
)
def test_the_number_type_holds_the_values_exactly(tmp_path, values, kind):
    array = np.resize(np.float32(values), SHAPE)
    assert integer_type(array) is kind
    write_nifti(tmp_path / "a.nii.gz", array, Geometry(SHAPE, (1.0, 1.0, 1.0)))
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz")[0], array)


def test_indexes_are_chosen_so_that_nothing_is_lost():
    assert indexes([("CT",), ("CT",)], None) == (True, True)
    assert indexes([("T1", "T2")] * 2, None) == (True, False)
    assert indexes([("T1",), ("T2",)], None) == (False, True)
    assert indexes([("T1", "T2")], "pretrain_data") == (True, True)
    assert indexes([("CT",)], "nnunet") == (True, False)
