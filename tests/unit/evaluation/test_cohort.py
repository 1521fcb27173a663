import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation import cohort, demo_data
from nnssl_ext.evaluation.anatomy import LABELS
from nnssl_ext.evaluation.deform import warp
from nnssl_ext.evaluation.torso import ORGANS, SCANS


def _read(path):
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), image


def _contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.network
def test_a_derived_volume_is_a_function_of_seed_and_index(scans):
    first, again, other = (cohort.derive_volume(1, index, "spine_mr") for index in (4, 4, 12))
    assert first.image.tobytes() == again.image.tobytes() and first.labels.tobytes() == again.labels.tobytes()
    assert (first.image != other.image).any() and (first.labels != other.labels).any()


@pytest.mark.network
def test_deformations_stay_below_12_mm_and_never_fold(scans):
    for index in range(8):
        volume = cohort.derive_volume(0, index)
        assert 0 < np.sqrt((volume.displacement**2).sum(0)).max() <= 12.0
        assert cohort.least_jacobian(volume) > 0
        assert volume.image.shape == volume.labels.shape == volume.geometry.shape and np.isfinite(volume.image).all()


@pytest.mark.network
def test_labels_move_with_the_image_and_no_label_is_invented(scans):
    volume = cohort.derive_volume(0, 3, "abdomen_ct", pseudo_mr=0.0)
    scan = cohort._scan_at_working_spacing("abdomen_ct")
    assert set(np.unique(volume.labels)) <= set(np.unique(scan.labels))
    for values, low, high in ((SCANS["abdomen_ct"].label_names["spine"], 150, 260), (SCANS["abdomen_ct"].label_names["liver"], 30, 60)):
        assert low < volume.image[np.isin(volume.labels, values)].mean() < high  # HU of bone and liver


@pytest.mark.network
def test_the_displacement_of_a_pair_leads_from_the_fixed_to_the_moving_volume(scans):
    pair = cohort.derive_pair(0, 1, "spine_ct", 12.0)
    spacing, displacement = pair.moving.geometry.spacing, pair.displacement
    assert 2 < np.sqrt((displacement**2).sum(0)).max() <= 12 and pair.fixed.geometry == pair.moving.geometry
    found = [(warp(pair.moving.labels, field, spacing, order=0) == pair.fixed.labels).mean() for field in (displacement, 0 * displacement)]
    assert found[0] > 0.97 > found[1]  # interpolating twice moves some boundaries by a voxel


@pytest.mark.network
def test_a_contrast_remap_makes_ct_a_pseudo_mr(scans):
    volume = cohort.derive_volume(0, 0, "abdomen_ct", pseudo_mr=1.0)
    assert volume.pseudo and volume.modality == "MR" and volume.image.min() >= 0


@pytest.mark.network
def test_dataset_801_has_nnssl_schema_and_one_subject_per_scan(scans, tmp_path, capsys):
    assert demo_data.write_dataset_801(tmp_path, count=8)["volumes"] == 8
    folder = tmp_path / "Dataset801_TorsoCohort"
    content = json.loads((folder / "pretrain_data.json").read_text())
    assert set(content) == {"collection_index", "collection_name", "datasets"} and content["collection_name"] == folder.name
    subjects = {s: v for dataset in content["datasets"].values() for s, v in dataset["subjects"].items()}
    assert set(subjects) == set(SCANS)
    sessions = [session for subject in subjects.values() for session in subject["sessions"].values()]
    assert len(sessions) == 8
    for session in sessions:
        (image,) = session["images"]
        assert set(image) == {"name", "modality", "image_path", "image_info", "associated_masks"} and image["modality"] in ("CT", "MR")
        assert image["image_path"].startswith("$nnssl_raw/Dataset801_TorsoCohort/images/")
        assert (tmp_path / image["image_path"].removeprefix("$nnssl_raw/")).is_file()
    assert "no evidence of generalisation" in json.dumps(content)


@pytest.mark.network
def test_dataset_901_is_nnunet_raw_and_says_that_it_is_a_smoke_set(scans, tmp_path):
    demo_data.write_dataset_901(tmp_path, train=2, test=1)
    folder = tmp_path / "Dataset901_TorsoOrgans"
    content = json.loads((folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT"} and content["numTraining"] == 2 and content["file_ending"] == ".nii.gz"
    assert content["labels"] == {"background": 0, **ORGANS} and sorted(content["labels"].values()) == list(range(9))
    assert "semi-synthetic: 3 volumes derived from 5 scans; no evidence of generalisation" in content["description"]
    assert "one abdominal CT" in content["description"] and "pseudo-labels" in content["description"]
    split = json.loads((folder / "splits_final.json").read_text())[0]
    assert split == {"train": ["torso_0000"], "val": ["torso_0001"]}
    for case, part in (("torso_0000", "Tr"), ("torso_0001", "Tr"), ("torso_test_0000", "Ts")):
        image, image_file = _read(folder / f"images{part}" / f"{case}_0000.nii.gz")
        labels, label_file = _read(folder / f"labels{part}" / f"{case}.nii.gz")
        assert image.shape == labels.shape and set(np.unique(labels)) == set(range(9))
        assert np.allclose(image_file.GetSpacing(), 3.0) and image_file.GetSpacing() == label_file.GetSpacing()
        assert image_file.GetOrigin() == label_file.GetOrigin() and image_file.GetDirection() == label_file.GetDirection()


def test_phantom_data_sets_are_written_whole_kept_and_reproduced(tmp_path, capsys):
    def write(name, **options):
        demo_data.write_dataset_802(tmp_path / name, count=4, size=24, spacing=8.0, **options)
        return demo_data.write_dataset_902(tmp_path / name, train=4, test=2, size=24, spacing=8.0, **options)

    assert write("first")["written"] and not write("first")["written"] and write("second", workers=1)["written"]
    first = _contents(tmp_path / "first")
    assert first == _contents(tmp_path / "second") and not [name for name in first if "tmp" in name or ".lock" in name]
    volume = tmp_path / "first" / "Dataset902_PhantomOrgans" / "imagesTr" / "phantom_0000_0000.nii.gz"
    volume.write_bytes(b"damaged")
    assert write("first")["written"] and _contents(tmp_path / "first") == first


def test_dataset_902_has_all_labels_and_subject_disjoint_parts(tmp_path):
    demo_data.write_dataset_902(tmp_path, train=4, test=2)
    folder = tmp_path / "Dataset902_PhantomOrgans"
    assert json.loads((folder / "dataset.json").read_text())["labels"] == LABELS
    split = json.loads((folder / "splits_final.json").read_text())[0]
    assert set(split["train"]) | set(split["val"]) == {f"phantom_{i:04d}" for i in range(4)} and not set(split["train"]) & set(split["val"])
    volumes = [_read(file)[0] for file in sorted(folder.glob("labelsT?/*.nii.gz"))]
    assert len(volumes) == 6 and all(set(np.unique(v)) == set(LABELS.values()) for v in volumes)
    assert len({v.tobytes() for v in volumes}) == 6


def test_make_demo_data_with_phantoms_needs_no_download_and_says_what_it_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("nnssl_cache", str(tmp_path / "empty"))
    monkeypatch.setattr(demo_data, "write_dataset_802", lambda root, **_: {"id": 802, "volumes": 24})
    monkeypatch.setattr(demo_data, "write_dataset_902", lambda root, **_: {"id": 902, "volumes": 16})
    summary = demo_data.make_demo_data(tmp_path, tmp_path, phantom=True)
    assert summary["unlabelled"]["id"] == 802 and summary["labelled"]["id"] == 902 and summary["sentence"] in capsys.readouterr().out


def test_a_folder_with_volumes_of_others_is_never_emptied(tmp_path):
    mine = tmp_path / "Dataset902_PhantomOrgans" / "imagesTr" / "mine_0000.nii.gz"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="did not write"):
        demo_data.write_dataset_902(tmp_path, train=2, test=1)
    assert mine.read_bytes() == b"mine"


def test_a_single_training_volume_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="at least 2"):
        demo_data.write_dataset_902(tmp_path, train=1)
