"""Features of image files: what is found, what is written and where it lies, and what goes wrong."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
import torch.nn.functional as F

from nnssl_ext.cli import features as command
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.plan import Plan
from nnssl_ext.evaluation import feature_files
from nnssl_ext.evaluation.feature_files import FeatureWriter, draw, find_cases, read_npz, write_npz
from nnssl_ext.evaluation.features import Extractor, FeatureMap, PrincipalComponents
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.io.case import Case
from nnssl_ext.nn.backbones.base import Backbone, build_backbone
from nnssl_ext.preprocessing.preprocessor import Preprocessor
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
from tests.make_nnunet import make_checkpoint
from tests.make_raw import body_volume, nnunet_dataset, write_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c.pth", "primus")


@pytest.fixture(scope="module")
def pretrained(checkpoint):
    return Pretrained.load(checkpoint)


@pytest.fixture
def images(tmp_path):
    return nnunet_dataset(tmp_path, cases=2) / "imagesTr"


def run(*arguments):
    return command.main([*map(str, arguments), "-device", "cpu"])


def names(cases):
    return [(case.identifier, [path.name for path in case.images]) for case in cases]


def expected_of(pretrained, case, **options):
    """Features by the parts that the command is made of."""
    finished = Preprocessor(pretrained.config).run(case)
    return Extractor.load(pretrained, **options).features(finished.array, Geometry.from_dict(finished.info["stored"]), finished.info["fill"])


def test_every_image_of_a_folder_gets_a_file_and_a_picture(images, tmp_path, checkpoint, pretrained, capsys):
    assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / "out", "-dtype", "float32", "-overlap", 0.25) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case0.npz", "case0.png", "case1.npz", "case1.png", "features.json"]
    for number in range(2):
        expected = expected_of(pretrained, Case(f"case{number}", "", "1", (images / f"case{number}_0000.nii.gz",), ("CT",)), overlap=0.25)
        found = read_npz(tmp_path / "out" / f"case{number}.npz")
        assert np.array_equal(found.values, expected.values) and found.geometry == expected.geometry and found.cell == expected.cell
    about = json.loads((tmp_path / "out" / "features.json").read_text(encoding="utf-8"))
    assert about["cases"] == ["case0", "case1"] and about["identity"] == pretrained.identity and about["components"] is None
    assert (about["window"], about["overlap"], about["zoom"], about["cell"]) == ([32, 32, 32], 0.25, 1.0, [8, 8, 8])


def test_half_precision_is_the_default_and_what_it_cannot_hold_is_refused(images, tmp_path, checkpoint):
    assert (
        run("-ckpt", checkpoint, "-i", images / "case0", "-o", tmp_path / "half")
        == run("-ckpt", checkpoint, "-i", images / "case0", "-o", tmp_path / "full", "-dtype", "float32")
        == 0
    )
    with np.load(tmp_path / "half" / "case0.npz") as half, np.load(tmp_path / "full" / "case0.npz") as full:
        assert half["features"].dtype == np.float16 and full["features"].dtype == np.float32
        np.testing.assert_allclose(half["features"], full["features"], rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="float16 can't hold features up to 70000"):
        write_npz(tmp_path / "large.npz", FeatureMap(np.full((1, 1, 1, 1), 7e4, np.float32), Geometry((1, 1, 1), (1.0,) * 3), (8, 8, 8)), "float16")
    assert not (tmp_path / "large.npz").exists()


def test_size_and_zoom_reach_the_extractor(images, tmp_path, checkpoint, pretrained):
    case = Case("case0", "", "1", (images / "case0_0000.nii.gz",), ("CT",))
    assert run("-ckpt", checkpoint, "-i", images / "case0_0000.nii.gz", "-o", tmp_path, "-size", 16, 24, 16, "-zoom", 1.5, "-dtype", "float32") == 0
    found, expected = read_npz(tmp_path / "case0.npz"), expected_of(pretrained, case, window=(16, 24, 16), zoom=1.5)
    assert np.array_equal(found.values, expected.values) and found.geometry == expected.geometry


class Means(Backbone):
    """The mean of each cell, and its square."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.strides, self.widths, self.patch_size = ((4, 4, 4),), (2,), (16, 16, 16)

    def pyramid(self, x):
        mean = F.avg_pool3d(x, 4)
        return [torch.cat((mean, mean**2), 1)]


@pytest.mark.parametrize("zoom", [1.0, 2.0])
@pytest.mark.parametrize("form", ["npz", "nifti"])
def test_features_lie_over_their_image_in_mm(form, zoom, tmp_path, pretrained):
    """A smooth bright spot in an oblique image whose first slices are cropped away keeps its place in the world."""
    z, y, x = np.meshgrid(np.arange(32), np.arange(40), np.arange(44), indexing="ij")
    array = 400 * np.exp(-((z - 19.3) ** 2 / 12 + (y - 17.6) ** 2 / 30 + (x - 25.1) ** 2 / 30))
    array[:11] -= 500 * (1 + np.cos(np.pi * np.arange(11) / 11))[:, None, None]  # smooth, or resampling would overshoot
    image = SimpleITK.GetImageFromArray(array.astype(np.float32))
    image.SetSpacing((2.0, 2.2, 4.0))
    image.SetOrigin((13.0, -50.0, 70.0))
    cosine, sine = np.cos(0.4), np.sin(0.4)
    image.SetDirection((cosine, -sine, 0.0, sine, cosine, 0.0, 0.0, 0.0, -1.0))
    SimpleITK.WriteImage(image, str(tmp_path / "spot.nii.gz"))
    place = image.TransformContinuousIndexToPhysicalPoint((25.1, 17.6, 19.3))

    writer = FeatureWriter(pretrained, Extractor(Means(), zoom=zoom), tmp_path / "out", form, dtype="float32")
    assert writer.run(find_cases([tmp_path / "spot.nii.gz"], pretrained)) == {}
    if form == "npz":
        found = read_npz(tmp_path / "out" / "spot.npz")
        values, to_world = found.values[0], [found.geometry.to_world]
    else:
        written = SimpleITK.ReadImage(str(tmp_path / "out" / "spot.nii.gz"))
        values = SimpleITK.GetArrayFromImage(written)[0]
        affine = nibabel.load(tmp_path / "out" / "spot.nii.gz").affine
        to_world = [
            lambda zyx: written.TransformContinuousIndexToPhysicalPoint((*map(float, zyx[::-1]), 0.0))[:3],
            lambda zyx: (affine @ (*zyx[::-1], 1.0))[:3] * (-1, -1, 1),  # nibabel's world is (right, anterior, superior)
        ]
    weights = (values + 1 / 3).clip(0).astype(float)  # 0 HU is (0 - 40) / 120
    centre = [float((weights.sum(tuple(a for a in range(3) if a != axis)) * np.arange(n)).sum() / weights.sum()) for axis, n in enumerate(weights.shape)]
    for function in to_world:
        np.testing.assert_allclose(function(centre), place, atol=0.3)  # a cell is 12 mm wide


def test_components_are_fitted_to_the_bodies_of_all_cases_together(images, tmp_path, checkpoint, pretrained, monkeypatch):
    seen = []
    fit = PrincipalComponents.fit
    monkeypatch.setattr(PrincipalComponents, "fit", staticmethod(lambda samples, count: seen.append(samples) or fit(samples, count)))
    assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / "out", "-pca", 4) == 0
    maps = [expected_of(pretrained, Case(f"case{i}", "", "1", (images / f"case{i}_0000.nii.gz",), ("CT",))) for i in range(2)]
    cells = np.concatenate([found.values.reshape(len(found.values), -1).T for found in maps])
    (samples,) = seen
    rows = {row.tobytes() for row in cells}
    assert 4 < len(samples) <= len(cells) and all(row.tobytes() in rows for row in np.ascontiguousarray(samples))
    fitted = fit(samples, 4)
    for number, expected in enumerate(maps):
        found = read_npz(tmp_path / "out" / f"case{number}.npz")
        assert np.array_equal(found.values, fitted.project(expected.values)) and found.geometry == expected.geometry
    about = json.loads((tmp_path / "out" / "features.json").read_text(encoding="utf-8"))
    assert about["components"] == fitted.explained.tolist() and 0 < sum(about["components"]) <= 1
    assert not list((tmp_path / "out").glob(".*"))


def test_samples_are_cells_of_the_body_at_most_so_many_and_always_the_same(tmp_path, pretrained, monkeypatch):
    array = np.full((24, 24, 24), -1000, np.int16)
    array[:, :12] = array[:, :, :12] = 50 + np.arange(24, dtype=np.int16)[:, None, None]  # air in a quarter of its box
    write_image(tmp_path / "corner.nii.gz", array, (3.0, 3.0, 3.0))
    monkeypatch.setattr(feature_files, "SAMPLES", 40)
    (case,) = find_cases([tmp_path / "corner.nii.gz"], pretrained)
    first, second, other = (FeatureWriter(pretrained, Extractor(Means()), tmp_path)._keep(tmp_path, (number, case))[0] for number in (3, 3, 4))
    assert first.shape == (40, 2) and np.array_equal(first, second) and not np.array_equal(first, other)
    air = np.load(tmp_path / "corner.npy")[0] < -6  # (-800 - 40) / 120 = -7
    assert 0.2 < air.mean() < 0.3 and (first[:, 0] > -6).all()


def test_the_same_command_writes_the_same_bytes(images, tmp_path, checkpoint):
    for form in ("npz", "nifti"):
        for folder in ("one", "two"):
            assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / folder, "-pca", 3, "-format", form) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 7 and all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_channels_are_found_by_their_numbers_and_read_in_their_order(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c.pth", "resenc", channels=2)
    pretrained = Pretrained.load(checkpoint)
    paths = [write_image(tmp_path / "images" / f"a_{channel:04d}.nii.gz", body_volume(index=channel)) for channel in range(2)]
    for source in (tmp_path / "images", paths[1], tmp_path / "images" / "a"):
        assert names(find_cases([source], pretrained)) == [("a", ["a_0000.nii.gz", "a_0001.nii.gz"])]
    assert run("-ckpt", checkpoint, "-i", paths[0], "-o", tmp_path / "out", "-dtype", "float32") == 0
    expected = expected_of(pretrained, Case("a", "", "1", tuple(paths), ("CT", "CT")))
    assert np.array_equal(read_npz(tmp_path / "out" / "a.npz").values, expected.values)
    other = expected_of(pretrained, Case("a", "", "1", tuple(paths[::-1]), ("CT", "CT")))
    assert not np.allclose(other.values, expected.values)


def test_with_one_channel_every_image_is_a_case(tmp_path, pretrained):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b.mha", ".hidden.nii.gz"):
        write_image(tmp_path / name, body_volume())
    (tmp_path / "notes.txt").write_text("no image")
    assert names(find_cases([tmp_path], pretrained)) == [("a", ["a_0000.nii.gz"]), ("a_0001", ["a_0001.nii.gz"]), ("b", ["b.mha"])]
    assert names(find_cases([tmp_path / "b.mha", tmp_path / "a_0001.nii.gz"], pretrained)) == [("a_0001", ["a_0001.nii.gz"]), ("b", ["b.mha"])]


def test_a_raw_dataset_is_read_by_its_index(tmp_path, pretrained):
    cases = find_cases([nnunet_dataset(tmp_path, cases=2)], pretrained)
    assert [(case.identifier, case.modalities) for case in cases] == [("case0", ("CT",)), ("case1", ("CT",))]


def test_a_plan_of_several_modalities_wants_to_be_told(images, tmp_path, checkpoint):
    content = load_checkpoint(checkpoint)
    for config in content["plan"]["configurations"].values():
        config["normalization"]["MR"] = {**config["normalization"]["CT"], "scheme": "zscore"}
    save_checkpoint(tmp_path / "mixed.pth", content)
    mixed = Pretrained.load(tmp_path / "mixed.pth")
    assert [case.modalities for case in find_cases([images], mixed, ["MR"])] == [("MR",), ("MR",)]
    with pytest.raises(UserError, match="knows the modalities CT, MR, and nothing tells that of the images"):
        find_cases([images], mixed)
    for wrong in (["PET"], ["CT", "MR"]):
        with pytest.raises(UserError, match="doesn't name the modality of each of the 1 channel"):
            find_cases([images], mixed, wrong)


@pytest.mark.parametrize(
    ("sources", "message"),
    [(["nowhere"], "image not found"), (["nowhere/case"], "image not found"), (["."], "holds neither"), (["a.mha", "a.nii.gz"], "1 names stand for")],
)
def test_paths_that_stand_for_no_image_or_for_two_are_refused(sources, message, tmp_path, pretrained):
    if len(sources) > 1:
        for source in sources:
            write_image(tmp_path / source, body_volume())
    with pytest.raises(UserError, match=message):
        find_cases([tmp_path / source for source in sources], pretrained)


def test_a_bad_file_is_told_once_and_the_others_are_done(images, tmp_path, checkpoint, capsys):
    file = images / "case0_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    for options in ([], ["-pca", 3]):
        assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / "out", *options) == 1
        told = capsys.readouterr().out
        assert "truncated" in told and "1 of 2 cases done, 1 failed" in told and "Traceback" not in told
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case1.npz", "case1.png", "features.json"]


def test_a_case_of_other_channels_is_told(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "c.pth", "primus", channels=2)
    image = write_image(tmp_path / "one.nii.gz", body_volume())
    assert run("-ckpt", checkpoint, "-i", image, "-o", tmp_path / "out") == 1
    assert "the case has 1 image(s), the network takes 2 channel(s)" in capsys.readouterr().out


def test_more_components_than_features_end_the_command_and_leave_nothing_half_done(images, tmp_path, checkpoint, capsys):
    assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / "out", "-pca", 4000) == 2
    assert "have no 4000 principal components" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-size", 32, 32, 30], "no multiple of the network's 8x8x8"),
        (["-overlap", 1], "can't overlap by 1"),
        (["-zoom", 0], "can't be zoomed"),
    ],
)
def test_options_that_cannot_be_end_the_command_before_anything_is_read(options, message, images, tmp_path, checkpoint, capsys):
    assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 3 and not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_told(images, tmp_path, checkpoint, capsys):
    (tmp_path / "out").write_text("in the way")
    assert run("-ckpt", checkpoint, "-i", images, "-o", tmp_path / "out") == 2
    assert "the folder can't be made: File exists" in capsys.readouterr().err


def test_tensors_that_are_missing_in_the_checkpoint_are_refused(tmp_path, checkpoint):
    content = load_checkpoint(checkpoint)
    del content["network_weights"]["eva.norm.weight"]
    save_checkpoint(tmp_path / "short.pth", content)
    with pytest.raises(UserError, match="don't fit each other: eva.norm.weight"):
        Extractor.load(tmp_path / "short.pth")


def test_the_whole_backbone_is_loaded_with_what_fine_tuning_does_not_take(tmp_path, checkpoint):
    """Register tokens lie outside of the modules that nnU-Net gets."""
    content = load_checkpoint(checkpoint)
    content["plan"]["configurations"]["3d_fullres"]["networks"]["primus"]["kwargs"]["num_register_tokens"] = 2
    backbone = build_backbone(Plan.from_dict(content["plan"]).configuration("3d_fullres"), "primus", 1)
    assert backbone.registers == 2
    torch.nn.init.normal_(backbone.net.register_tokens)
    save_checkpoint(tmp_path / "registers.pth", {**content, "network_weights": backbone.network_weights()})
    loaded = Extractor.load(tmp_path / "registers.pth").backbone
    assert loaded.net.state_dict().keys() == backbone.net.state_dict().keys()
    assert all(torch.equal(value, backbone.net.state_dict()[key]) for key, value in loaded.net.state_dict().items())


def test_colours_lie_over_the_voxels_of_their_cells(tmp_path, monkeypatch):
    """Cells of 8 voxels over 20: two whole ones and a half; what isn't body stays grey."""
    drawn = []
    monkeypatch.setattr(feature_files, "draw_volumes", lambda rows, *_: drawn.extend(rows))
    image, values = np.ones((20, 20, 20), np.float32), np.zeros((3, 3, 3, 3), np.float32)
    image[0, 0, 0] = 0
    values[0] = np.arange(3)[:, None, None]
    body = np.ones((3, 3, 3), bool)
    body[:, :, 2] = False
    where = Geometry((20, 20, 20), (1.0, 1.0, 1.0))
    draw(tmp_path / "a.png", image, where, FeatureMap(values, Geometry((3, 3, 3), (8.0, 8.0, 8.0)), (8, 8, 8)), body)
    red = drawn[0]["features (PCA)"][..., 0]
    edges = [int(n) for n in np.flatnonzero(np.diff(red[:, 5, 5])) + 1]
    assert edges == [8, 16] and len(np.unique(red[1:, :, :16])) == 3 and len(np.unique(red[1:, :, 16:])) == 1
