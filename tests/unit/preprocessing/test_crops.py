"""Places of crops against plain loops; collections that depend on the seed alone."""

import csv
import hashlib
import json
import math
from itertools import product

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import resampled_shape
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io.index import read_index
from nnssl_ext.io.readers import read_case, read_volume
from nnssl_ext.preprocessing.crops import CropPlan, crop_name, cut_crops, valid_starts, window_sums
from nnssl_ext.preprocessing.parallel import Workers
from nnssl_ext.preprocessing.preprocessor import load
from nnssl_ext.preprocessing.resample import resample
from tests.make_raw import nnunet_dataset, pretrain_dataset, write_image

PLAN = CropPlan(size=(8, 9, 10), spacing=(2.0, 2.5, 2.0), foreground=0.6)


def by_loops(mask, size, fraction):
    """Every window counted by itself; the share compared in whole numbers of 1/1000."""
    shape = tuple(max(0, n - s + 1) for n, s in zip(mask.shape, size))
    result = np.zeros(shape, bool)
    for z, y, x in product(*map(range, shape)):
        inside = int(mask[z : z + size[0], y : y + size[1], x : x + size[2]].sum())
        result[z, y, x] = inside * 1000 >= round(fraction * 1000) * math.prod(size)
    return result


def collection(folders, count, processes=1, plan=PLAN, name="Dataset805_Crops", source="Dataset801_Test"):
    failed = cut_crops(read_index(folders["nnssl_raw"] / source), name, count, plan, {"source": source}, Workers(processes))
    return folders["nnssl_raw"] / name, failed


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "imagesTr").iterdir()}


def listed(folder):
    with open(folder / "crops.csv") as file:
        return {row["crop"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 4), (5, 6, 7), (2, 5, 1)])
def test_valid_starts_equal_those_that_plain_loops_find(size, share):
    rng = sample_rng(0, 0, "test")
    for density in (0.1, 0.5, 0.9, 1.0):
        mask = rng.random((6, 7, 8)) < density
        assert np.array_equal(valid_starts(mask, size, share), by_loops(mask, size, share))


def test_a_share_is_met_exactly_where_floating_point_would_be_a_little_off():
    for n in range(101):  # 0.07 * 100 is a little more than 7
        exactly = np.arange(100).reshape(1, 10, 10) < n
        assert valid_starts(exactly, (1, 10, 10), n / 100).all()
        assert n == 100 or not valid_starts(exactly, (1, 10, 10), (n + 1) / 100).any()


def test_a_window_larger_than_the_volume_has_no_place():
    for size in ((7, 2, 2), (2, 99, 2), (6, 6, 9)):
        assert window_sums(np.ones((6, 7, 8), bool), size).size == 0
    assert window_sums(np.ones((6, 7, 8), bool), (6, 7, 8)).ravel().tolist() == [336]


def test_crops_have_size_spacing_share_and_the_voxels_and_place_of_their_source(folders):
    source = nnunet_dataset(folders["nnssl_raw"], cases=3, channels=2)
    folder, failed = collection(folders, 6)
    rows = listed(folder)
    assert not failed and sorted(rows) == [crop_name(i) for i in range(6)] and {row["case"] for row in rows.values()} <= {"case0", "case1", "case2"}
    cases = {case.identifier: case for case in read_index(source)}
    for crop in read_index(folder):
        array, geometry = read_case(crop)
        row = rows[crop.identifier]
        loaded = load(cases[row["case"]])
        shape = resampled_shape(loaded.geometry.shape, loaded.geometry.spacing, PLAN.spacing)
        whole = resample(loaded.array, shape, loaded.geometry.spacing, PLAN.spacing)
        body = resample(loaded.body[None].astype(np.float32), shape, loaded.geometry.spacing, PLAN.spacing, order=1)[0] >= 0.5
        start = [int(row[f"start_{axis}"]) for axis in "zyx"]
        inside = tuple(slice(low, low + n) for low, n in zip(start, PLAN.size))
        assert array.shape == (2, *PLAN.size) and np.array_equal(array, whole[(slice(None), *inside)])
        assert body[inside].mean() >= PLAN.foreground and float(row["foreground"]) == pytest.approx(body[inside].mean(), abs=1e-6)
        assert np.allclose(geometry.spacing, PLAN.spacing, rtol=0.05)  # the volume's faces stay in place, so the spacing follows its whole number of voxels
        factor = np.array(loaded.geometry.shape) / shape
        for corner in ((0, 0, 0), tuple(n - 1 for n in PLAN.size)):
            in_source = (np.add(start, corner) + 0.5) * factor - 0.5
            assert np.allclose(geometry.to_world(corner), loaded.geometry.to_world(in_source), rtol=0, atol=1e-4)


def test_a_crop_depends_neither_on_how_many_are_cut_nor_on_the_workers(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=3)
    five = hashes(collection(folders, 5, name="Dataset805_Five")[0])
    nine = hashes(collection(folders, 9, processes=2, name="Dataset806_Nine")[0])
    assert len(nine) == 9 and {name: nine[name] for name in five} == five
    other = hashes(collection(folders, 5, plan=CropPlan(PLAN.size, PLAN.spacing, PLAN.foreground, seed=1), name="Dataset807_Seed")[0])
    assert set(other.values()).isdisjoint(five.values())


def test_a_collection_can_be_continued_and_enlarged(folders, capsys):
    nnunet_dataset(folders["nnssl_raw"], cases=2)
    folder, _ = collection(folders, 4)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "imagesTr").iterdir()}
    wanted = hashes(folder)
    (folder / "imagesTr" / "crop000002_0000.nii.gz").unlink()
    collection(folders, 6)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "imagesTr").iterdir()}
    assert len(after) == 6 and {name: hash for name, hash in hashes(folder).items() if name in wanted} == wanted
    assert {name for name in before if before[name] != after[name]} == {"crop000002_0000.nii.gz"}
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 6
    with pytest.raises(UserError, match="other options"):
        collection(folders, 6, plan=CropPlan(PLAN.size, PLAN.spacing, 0.1))


def test_volumes_are_chosen_uniformly_among_those_with_a_place_and_the_others_are_named(folders, capsys):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=3)
    empty = np.full((20, 24, 28), -1000, np.int16)
    empty[9:11, 9:11, 9:11] = 50
    write_image(raw / "imagesTr" / "case1_0000.nii.gz", empty)
    folder, failed = collection(folders, 120)
    chosen = [row["case"] for row in listed(folder).values()]
    assert not failed and set(chosen) == {"case0", "case2"} and 40 <= chosen.count("case0") <= 80  # 3.7 standard deviations
    assert "1 cases have no place with a share of 0.6 of body: case1" in capsys.readouterr().out


def test_places_are_chosen_uniformly(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=1)
    plan = CropPlan(size=(18, 20, 26), spacing=(3.0, 2.0, 2.0), foreground=0.1)
    folder, _ = collection(folders, 300, plan=plan)
    rows = listed(folder).values()
    counts = np.zeros((3, 5, 3), int)
    for row in rows:
        counts[int(row["start_z"]), int(row["start_y"]), int(row["start_x"])] += 1
    assert counts.min() > 0  # 45 places, 6.7 crops each: chi-square with 44 degrees of freedom, 99.9 % below 78.7
    assert ((counts - 300 / 45) ** 2 / (300 / 45)).sum() < 78.7


def test_no_place_anywhere_is_an_error_that_names_the_largest_share(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=2)
    plan = CropPlan(size=(20, 24, 28), spacing=(3.0, 2.0, 2.0), foreground=0.9)
    shares = [load(case).body.mean() for case in read_index(folders["nnssl_raw"] / "Dataset801_Test")]
    with pytest.raises(UserError, match=f"largest share is {max(shares):.3f}"):
        collection(folders, 3, plan=plan)
    folder, _ = collection(folders, 3, plan=CropPlan(plan.size, plan.spacing, 0.2))  # the folder was left free
    assert len(listed(folder)) == 3
    with pytest.raises(UserError, match="largest share is 0.000"):
        collection(folders, 3, plan=CropPlan((99, 9, 9), plan.spacing, 0.1), name="Dataset806_Large")


def test_a_broken_volume_is_reported_and_the_others_give_all_crops(folders):
    raw = nnunet_dataset(folders["nnssl_raw"], cases=3)
    (raw / "imagesTr" / "case0_0000.nii.gz").write_bytes(b"")
    folder, failed = collection(folders, 8)
    assert "empty" in failed["case0"] and len(listed(folder)) == 8 and "case0" not in {row["case"] for row in listed(folder).values()}


def test_crops_keep_the_subjects_and_modalities_of_their_volumes(folders):
    pretrain_dataset(folders["nnssl_raw"], subjects=2)
    folder, _ = collection(folders, 8, source="Dataset802_Test")
    rows, cases = listed(folder), read_index(folder)
    known = {case.identifier: case for case in read_index(folders["nnssl_raw"] / "Dataset802_Test")}
    assert len(cases) == 8
    for case in cases:
        origin = known[rows[case.identifier.rpartition("__")[2]]["case"]]
        assert case.subject == f"805/{origin.subject}" and (case.session, case.modalities) == (origin.session, origin.modalities)


def test_the_body_is_the_one_that_an_anatomy_mask_gives(folders):
    raw = pretrain_dataset(folders["nnssl_raw"], subjects=1)
    index = json.loads((raw / "pretrain_data.json").read_text())
    sessions = index["datasets"]["7"]["subjects"]["s0"]["sessions"]
    del sessions["ses1"]
    mask = np.zeros((20, 24, 28), np.uint8)
    mask[:, :, 14:] = 1
    write_image(raw / "mask.nii.gz", mask)
    sessions["ses0"]["images"][0]["associated_masks"] = {"anatomy_mask": "mask.nii.gz"}
    (raw / "pretrain_data.json").write_text(json.dumps(index))
    folder, _ = collection(folders, 5, plan=CropPlan((8, 8, 8), (3.0, 2.0, 2.0), 1.0), source="Dataset802_Test")
    assert {int(row["start_x"]) >= 14 for row in listed(folder).values()} == {True}


@pytest.mark.parametrize(
    "change", [{"size": (0, 8, 8)}, {"spacing": (1.0, -1.0, 1.0)}, {"spacing": (1.0, float("nan"), 1.0)}, {"foreground": 1.2}, {"seed": -1}]
)
def test_impossible_plans_are_refused(change):
    with pytest.raises(UserError):
        CropPlan(**change)


def test_every_crop_can_be_read_by_others(folders):
    nnunet_dataset(folders["nnssl_raw"], cases=1)
    folder, _ = collection(folders, 1)
    path = folder / "imagesTr" / "crop000000_0000.nii.gz"
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), read_volume(path)[0])
