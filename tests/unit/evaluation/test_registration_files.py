"""Pairs of images registered by the command: what is read, what is written and what it means."""

import csv
import json

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from nnssl_ext.cli import evaluate_registration as command
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.feature_files import write_npz
from nnssl_ext.evaluation.features import FeatureMap
from nnssl_ext.evaluation.phantom import make_pair
from nnssl_ext.evaluation.registration_files import read_field
from nnssl_ext.evaluation.registration_pairs import read_keypoints, read_pairs
from tests.make_nnunet import make_checkpoint

EDGE, SPACING = 32, (4.0, 3.0, 3.0)
TRUE = (2.0, -3.0, 6.0)  # mm in the world: a displacement to compare with, 7 mm everywhere
DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def write(path, array):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((5.0, -7.0, 11.0))
    image.SetDirection(DIRECTION)
    SimpleITK.WriteImage(image, str(path))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair with everything that can be known of it."""
    folder = tmp_path_factory.mktemp("pairs")
    pair = make_pair(0, 0, (EDGE,) * 3, SPACING, ("CT", "CT"), 9.0)
    for number, (name, phantom) in enumerate((("a", pair.fixed), ("b", pair.moving))):
        image = write(folder / f"{name}.nii.gz", phantom.image)
        write(folder / f"{name}_labels.nii.gz", phantom.labels)
        write(folder / f"{name}_mask.nii.gz", phantom.body.astype(np.uint8))
        points = [image.TransformContinuousIndexToPhysicalPoint((mm / SPACING)[::-1].tolist()) for mm in pair.landmarks[:, number]]
        (folder / f"{name}.csv").write_text("x,y,z\n" + "\n".join(",".join(map(str, point)) for point in points), encoding="utf-8")
    field = SimpleITK.GetImageFromArray(np.broadcast_to(TRUE, (EDGE, EDGE, EDGE, 3)).copy(), isVector=True)
    field.CopyInformation(image)
    SimpleITK.WriteImage(field, str(folder / "true.nii.gz"))
    both = {"labels": ["a_labels.nii.gz", "b_labels.nii.gz"], "masks": ["a_mask.nii.gz", "b_mask.nii.gz"], "keypoints": ["a.csv", "b.csv"]}
    (folder / "pairs.json").write_text(json.dumps([{"fixed": "a.nii.gz", "moving": "b.nii.gz", "field": "true.nii.gz", **both}]), encoding="utf-8")
    make_checkpoint(folder / "c.pth", "primus")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    arguments = ["-pairs", folder / "pairs.json", "-out", folder / "out", "-ckpt", folder / "c.pth", "-iterations", 15, "-spacing", 4, "-device", "cpu"]
    assert command.main([*map(str, arguments)]) == 0
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def test_the_table_has_every_kind_of_features_and_every_metric(folder, results):
    kinds = ["initial", "mind", "intensity", "random", "checkpoint"]
    assert [row["features"] for row in results["means"]] == [row["features"] for row in results["pairs"]] == kinds
    assert all(row[metric] is not None for row in results["pairs"] for metric in ("dice", "hd95_mm", "assd_mm", "tre_mm", "sd_log_j", "folded"))
    initial, mind = results["pairs"][:2]
    assert initial["epe_mm"] == pytest.approx(7) and initial["memory_gb"] is None and 0.05 < mind["memory_gb"] < 64 and mind["cpu_seconds"] > 0
    assert initial["sd_log_j"] == initial["folded"] == 0 and initial["seconds"] is None and mind["seconds"] > 0
    with open(folder / "out" / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["pair"] for row in rows] == ["a_b"] * 5 and float(rows[1]["dice"]) == mind["dice"]
    before = {row["label"]: row for row in results["labels"] if row["features"] == "initial"}
    assert initial["dice"] == pytest.approx(np.mean([row["dice"] for row in before.values()]))


def test_the_mean_error_is_the_distance_from_the_true_displacement(folder, results):
    field = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "out" / "a_b" / "mind" / "disp.nii.gz")))
    mask = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "a_mask.nii.gz"))) > 0
    assert results["pairs"][1]["epe_mm"] == pytest.approx(np.linalg.norm(field[mask] - TRUE, axis=-1).mean(), rel=1e-5)


def test_a_true_displacement_on_another_grid_is_refused(folder):
    geometry = Geometry((EDGE,) * 3, SPACING)
    with pytest.raises(UserError, match="isn't on the grid of the fixed image"):
        read_field(folder / "true.nii.gz", geometry)
    with pytest.raises(UserError, match="can't be read"):
        read_field(folder / "a.csv", geometry)


@pytest.mark.parametrize("preset", ["medssl", "mind_default"])
def test_precomputed_features_are_registered_with_every_preset(folder, tmp_path, preset):
    """Smooth features of an image and of the same moved by a cell along each axis."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((14, 18, 18, 18)), (0, 1, 1, 1))
    grid = Geometry((16,) * 3, tuple(2 * mm for mm in SPACING), *_world(folder))
    for name, part in (("a", values[:, 1:17, 1:17, 1:17]), ("b", values[:, :16, :16, :16])):
        write_npz(tmp_path / f"{name}.npz", FeatureMap(part.astype(np.float32), grid, (2, 2, 2)))
    pair = {"fixed": str(folder / "a.nii.gz"), "moving": str(folder / "b.nii.gz"), "features": ["a.npz", "b.npz"], "name": "pair"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair]), encoding="utf-8")
    arguments = ["-pairs", tmp_path / "pairs.json", "-out", tmp_path, "--features", "precomputed", "-preset", preset, "-iterations", 30, "-device", "cpu"]
    assert command.main([*map(str, arguments)]) == 0
    field = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "pair" / "precomputed" / "disp.nii.gz")))
    found = np.median(field[10:-10, 10:-10, 10:-10], (0, 1, 2))  # (x, y, z) of the world; the axes are turned by DIRECTION
    expected = np.reshape(DIRECTION, (3, 3)) @ (2 * np.array(SPACING[::-1]))
    np.testing.assert_allclose(found, expected, atol=2)


def _world(folder):
    image = SimpleITK.ReadImage(str(folder / "a.nii.gz"))
    return image.GetOrigin(), image.GetDirection()


def test_an_image_that_lies_elsewhere_in_the_world_is_found_there(folder, tmp_path):
    image = SimpleITK.ReadImage(str(folder / "a.nii.gz"))
    offset = np.array((6.0, -3.0, 4.0))  # mm in the world: whole voxels along its axes
    image.SetOrigin([float(value) for value in np.add(image.GetOrigin(), offset)])
    SimpleITK.WriteImage(image, str(tmp_path / "moved.nii.gz"))
    pair = {"fixed": str(folder / "a.nii.gz"), "moving": str(tmp_path / "moved.nii.gz")}
    (tmp_path / "pairs.json").write_text(json.dumps([{"name": "pair", **pair}]), encoding="utf-8")
    arguments = ["-pairs", tmp_path / "pairs.json", "-out", tmp_path, "--features", "mind", "-iterations", 40, "-device", "cpu"]
    assert command.main([*map(str, arguments)]) == 0
    field = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "pair" / "mind" / "disp.nii.gz")))
    found = np.median(field[8:-8, 8:-8, 8:-8], (0, 1, 2))
    np.testing.assert_allclose(found, offset, atol=0.5)


def test_simpleitk_warps_with_the_field_as_we_do(folder, results):
    out = folder / "out" / "a_b" / "mind"
    fixed, moving = (SimpleITK.ReadImage(str(folder / f"{name}.nii.gz"), SimpleITK.sitkFloat32) for name in "ab")
    field = SimpleITK.ReadImage(str(out / "disp.nii.gz"), SimpleITK.sitkVectorFloat64)
    transform = SimpleITK.DisplacementFieldTransform(field)
    expected = SimpleITK.GetArrayFromImage(SimpleITK.Resample(moving, fixed, transform, SimpleITK.sitkLinear, -9999.0))
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out / "warped.nii.gz")))
    known = expected > -2000
    assert known.mean() > 0.7
    np.testing.assert_allclose(found[known], expected[known], atol=0.5)  # HU
    assert json.loads((out / "disp.json").read_text(encoding="utf-8"))["unit"] == "mm"


def test_warped_labels_are_labels_of_the_moving_image(folder, results):
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "b_labels.nii.gz")))
    for kind in ("mind", "checkpoint"):
        warped = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "out" / "a_b" / kind / "warped_label.nii.gz")))
        assert set(np.unique(warped)) <= set(np.unique(labels)) | {0}
        assert all((folder / "out" / "a_b" / kind / name).is_file() for name in ("features_pca_rgb.png", "checkerboard.png"))


def error_of(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_pairs(path)
    return str(error.value)


def test_pairs_that_say_nothing_useful_are_refused(tmp_path):
    path, images = tmp_path / "pairs.json", {"fixed": "a.nii.gz", "moving": "b.nii.gz"}
    assert "no list of pairs" in error_of(path, [])
    assert "doesn't name its two images" in error_of(path, [{"fixed": "a.nii.gz"}])
    assert "unknown key 'label'" in error_of(path, [{**images, "label": "c"}])
    assert '"labels" of pair 1 is no list of two' in error_of(path, [{**images, "labels": ["c"]}])
    assert "several pairs are called a_b" in error_of(path, [images, images])
    assert "no name of a folder" in error_of(path, [{**images, "name": "../x"}])


def test_keypoints_may_have_a_header_and_must_be_three_numbers(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("1e1,2,3\n4,5,6\n", encoding="utf-8")
    np.testing.assert_array_equal(read_keypoints(path), [[10, 2, 3], [4, 5, 6]])
    path.write_text("1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="not three numbers"):
        read_keypoints(path)


def test_a_network_needs_a_checkpoint_and_a_broken_pair_fails_alone(folder, tmp_path, capsys):
    assert command.main(["-pairs", str(folder / "pairs.json"), "-out", str(tmp_path), "--features", "random", "-device", "cpu"]) == 2
    assert "'random' needs the network of a checkpoint" in capsys.readouterr().err
    (tmp_path / "pairs.json").write_text(json.dumps([{"fixed": "gone.nii.gz", "moving": "b.nii.gz"}]), encoding="utf-8")
    assert command.main(["-pairs", str(tmp_path / "pairs.json"), "-out", str(tmp_path / "out"), "-device", "cpu"]) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["failed"]
