"""The nnU-Net plan of a checkpoint."""

import json
import math

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnssl_ext.cli.export import MODES
from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning import plans
from nnssl_ext.finetuning.plans import PlanOptions, finetuning_options, is_preprocessed, patch_and_batch, plans_name, write_plans
from nnssl_ext.finetuning.pretrained import Pretrained
from tests.make_nnunet import make_checkpoint, make_dataset, make_roots, write_fingerprint

pytestmark = pytest.mark.nnunet


@pytest.fixture
def roots(tmp_path, monkeypatch):
    return make_roots(tmp_path, monkeypatch)


def planned(roots, tmp_path, family="resenc", channels=("CT",), options=None, relative_size=1.0, **checkpoint):
    """(configuration, whole plan) as written."""
    options = options or PlanOptions()
    dataset = make_dataset(roots, 901, channels, cases=2)
    write_fingerprint(roots, dataset, len(channels), relative_size)
    path = write_plans(Pretrained.load(make_checkpoint(tmp_path / "c.pth", family, **checkpoint)), dataset, options)
    content = json.loads(path.read_text())
    assert (path.parent / "dataset.json").is_file() and path.stem == content["plans_name"]
    return content["configurations"][options.configuration], content


def test_resenc_keeps_the_pretrained_topology(roots, tmp_path):
    configuration, content = planned(roots, tmp_path)
    network = Pretrained.load(tmp_path / "c.pth").network
    architecture = configuration["architecture"]
    assert architecture["network_class_name"] == network.class_name and architecture["arch_kwargs"] == network.kwargs
    assert configuration["patch_size"] == [32, 32, 32] and configuration["batch_size"] == max(2, network.batch_size)
    assert content["transpose_forward"] == [0, 1, 2]


def test_primus_names_the_importable_wrapper(roots, tmp_path):
    options = PlanOptions(patch_size=(32, 40, 48))
    configuration, _ = planned(roots, tmp_path, "primus", options=options)
    assert configuration["architecture"]["network_class_name"] == "nnssl_ext.finetuning.networks.PlannedPrimus"
    assert configuration["architecture"]["arch_kwargs"]["input_shape"] == configuration["patch_size"] == [32, 40, 48]


def test_segformer_keeps_its_strides_under_another_name_since_nnunet_reads_them_as_scales(roots, tmp_path):
    architecture = planned(roots, tmp_path, "segformer3d")[0]["architecture"]
    kwargs = dict(Pretrained.load(tmp_path / "c.pth").network.kwargs)
    assert architecture["network_class_name"] == "nnssl_ext.finetuning.networks.PlannedSegFormer3D"
    assert architecture["arch_kwargs"] == {**kwargs, "strides": [[1, 1, 1]] * 3, "encoder_strides": kwargs["strides"]} and kwargs["strides"][0] == [4, 4, 4]


def test_ct_takes_the_statistics_of_the_pretraining(roots, tmp_path):
    configuration, content = planned(roots, tmp_path, channels=("CT", "MRI"))
    assert configuration["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    ct, mr = (content["foreground_intensity_properties_per_channel"][i] for i in "01")
    assert (ct["mean"], ct["std"], ct["percentile_00_5"], ct["percentile_99_5"]) == (40.0, 120.0, -800.0, 600.0)
    assert mr["mean"] == 7.0


def test_ct_keeps_its_own_statistics_when_the_pretraining_saw_none(roots, tmp_path):
    _, content = planned(roots, tmp_path, modality="MR")
    assert content["foreground_intensity_properties_per_channel"]["0"]["mean"] == 7.0


@pytest.mark.parametrize(("relative_size", "expected"), [(1.0, [False]), (0.5, [True])])
def test_the_mask_for_normalisation_is_decided_as_nnunet_does(roots, tmp_path, relative_size, expected):
    assert planned(roots, tmp_path, channels=("MRI",), relative_size=relative_size)[0]["use_mask_for_norm"] == expected


@pytest.mark.parametrize(
    ("configuration", "spacing", "expected"),
    [("3d_fullres", "like_pretrained", 3.0), ("onemmiso", "like_pretrained", 1.0), ("onemmiso", "own", 3.0), ("noresample", "like_pretrained", 3.0)],
)
def test_spacing(roots, tmp_path, configuration, spacing, expected):
    assert planned(roots, tmp_path, configuration=configuration, options=PlanOptions(spacing=spacing))[0]["spacing"] == pytest.approx([expected] * 3)


def test_names_are_reproducible_and_differ_by_options_and_checkpoint(tmp_path):
    one, two = (Pretrained.load(make_checkpoint(tmp_path / f"{family}.pth", family)) for family in ("resenc", "primus"))
    choices = [PlanOptions(), PlanOptions(batch_size=3), PlanOptions(spacing="own"), PlanOptions(patch_size=(32, 32, 64)), PlanOptions("3d_lowres")]
    choices += [*(PlanOptions(mode=mode) for mode in MODES if mode != "full"), *(PlanOptions(cases=cases) for cases in (1, 1.0, 6, 0.4))]
    choices += [PlanOptions(mode="linear", cases=6)]
    names = [plans_name(pretrained, options) for pretrained in (one, two) for options in choices]
    assert len(set(names)) == 2 * len(choices) == 30 and names == [plans_name(pretrained, options) for pretrained in (one, two) for options in choices]
    assert names[0].startswith("nnssl_MAE_") and "__" not in names[0]


def test_plans_share_preprocessed_data_unless_spacing_or_normalisation_differ(roots, tmp_path):
    dataset = make_dataset(roots, 901, cases=2)
    write_fingerprint(roots, dataset, 1)

    def identifier(family, **options):
        path = write_plans(
            Pretrained.load(make_checkpoint(tmp_path / "c.pth", family, configuration=options.pop("of", "3d_fullres"))), dataset, PlanOptions(**options)
        )
        return json.loads(path.read_text())["configurations"]["3d_fullres"]["data_identifier"]

    assert identifier("resenc") == identifier("primus") == identifier("primus", patch_size=(16, 16, 16), batch_size=7) != identifier("resenc", of="onemmiso")


def test_preprocessed_means_every_case(roots, tmp_path):
    dataset = make_dataset(roots, 901, cases=2)
    write_fingerprint(roots, dataset, 1)
    plans = write_plans(Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc")), dataset, PlanOptions())
    folder = plans.parent / json.loads(plans.read_text())["configurations"]["3d_fullres"]["data_identifier"]
    for made in (folder / "case0.pkl", plans.parent / "gt_segmentations/case0.nii.gz", plans.parent / "gt_segmentations/case1.nii.gz"):
        made.parent.mkdir(exist_ok=True)
        made.touch()
    assert not is_preprocessed(plans, "3d_fullres")
    (folder / "case1.pkl").touch()
    assert is_preprocessed(plans, "3d_fullres")


def of_slices(roots, tmp_path, spacings=((8.0, 3.0, 3.0),) * 4, shapes=((20, 100, 90),) * 4, **options):
    """(configuration, whole plan) of a checkpoint of slices, for a dataset of these cases."""
    dataset = make_dataset(roots, 901, cases=2)
    write_fingerprint(roots, dataset, 1)
    file = roots["nnUNet_preprocessed"] / dataset / "dataset_fingerprint.json"
    content = json.loads(file.read_text()) | {"spacings": [list(s) for s in spacings], "shapes_after_crop": [list(s) for s in shapes]}
    file.write_text(json.dumps(content))
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", configuration="2d"))
    content = json.loads(write_plans(pretrained, dataset, PlanOptions("2d", **options)).read_text())
    return content["configurations"]["2d"], content


def test_slices_are_planned_as_nnunet_plans_them(roots, tmp_path):
    configuration, content = of_slices(roots, tmp_path)
    stock = ExperimentPlanner("Dataset901_Tiny").plan_experiment()
    theirs = stock["configurations"]["2d"]
    assert configuration.keys() == theirs.keys()
    same = ("spacing", "median_image_size_in_voxels", "normalization_schemes", "batch_dice", "preprocessor_name", "resampling_fn_data_kwargs")
    assert {key: configuration[key] for key in same} == {key: json.loads(json.dumps(theirs[key], default=float)) for key in same}
    for key in ("transpose_forward", "transpose_backward", "original_median_shape_after_transp", "original_median_spacing_after_transp"):
        assert content[key] == [float(value) for value in stock[key]]
    assert configuration["architecture"]["arch_kwargs"] == Pretrained.load(tmp_path / "c.pth").network.kwargs


def test_whole_slices_are_fine_tuned_with_as_many_pixels_in_a_batch(roots, tmp_path):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", configuration="2d"))
    pixels, stride = pretrained.network.batch_size * math.prod(pretrained.patch_size), pretrained.network.cell
    configuration, _ = of_slices(roots, tmp_path)
    assert configuration["patch_size"] == [-(-100 // stride[0]) * stride[0], -(-90 // stride[1]) * stride[1]]
    assert configuration["batch_size"] == max(2, pixels // math.prod(configuration["patch_size"])) > 1


def test_huge_slices_are_cut_so_that_two_patches_have_the_pixels_of_a_batch(tmp_path):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", configuration="2d"))
    pixels, stride = pretrained.network.batch_size * math.prod(pretrained.patch_size), pretrained.network.cell
    patch, batch_size = patch_and_batch(pretrained, np.array([1000.0, 2000.0]))
    assert batch_size == 2 and not any(edge % step for edge, step in zip(patch, stride)) and patch[1] == pytest.approx(2 * patch[0], abs=2 * stride[0])
    assert pixels / 2 <= math.prod(patch) < math.prod(edge + step for edge, step in zip((pixels / 4) ** 0.5 * np.array([1, 2]), stride))
    assert patch_and_batch(pretrained, np.array([3.0, 3.0]))[0] == tuple(2 * step for step in stride)


def test_the_plan_says_how_it_is_fine_tuned_and_shares_the_preprocessed_data(roots, tmp_path):
    options = PlanOptions(mode="linear", cases=0.5)
    configuration, content = planned(roots, tmp_path, options=options, transfer="encoder+decoder")
    assert finetuning_options(content) == ("linear", 0.5) and finetuning_options({}) == ("full", None)
    assert content["plans_name"].startswith("nnssl_MAE_linear_0.5cases_")
    arguments, network = configuration["architecture"]["arch_kwargs"], Pretrained.load(tmp_path / "c.pth").network
    assert arguments["frozen"] == ["encoder.stem", "encoder.stages"] and arguments["encoder_strides"] == network.kwargs["strides"]
    full = write_plans(Pretrained.load(tmp_path / "c.pth"), "Dataset901_Tiny", PlanOptions())
    assert json.loads(full.read_text())["configurations"]["3d_fullres"]["data_identifier"] == configuration["data_identifier"]


def test_the_command_line_offers_the_modes():
    assert tuple(plans.MODES) == MODES


def test_a_mode_that_a_network_does_not_have_is_refused_with_those_that_it_has(roots, tmp_path):
    with pytest.raises(UserError, match="use -mode full, encoder, frozen, mlp or linear"):
        planned(roots, tmp_path, options=PlanOptions(mode="adapter"))


def test_an_unknown_mode_is_a_user_error(roots, tmp_path):
    with pytest.raises(UserError, match="did you mean 'frozen'"):
        planned(roots, tmp_path, options=PlanOptions(mode="froze"))


@pytest.mark.parametrize("mode", ["frozen", "adapter", "mlp", "linear"])
def test_a_network_that_nothing_of_ours_stands_for_cannot_be_frozen(roots, tmp_path, mode, monkeypatch):
    monkeypatch.setitem(plans.MODES, mode, {})
    with pytest.raises(UserError, match=f"ResidualEncoderUNet has no -mode {mode}"):
        planned(roots, tmp_path, options=PlanOptions(mode=mode))


@pytest.mark.parametrize(("spacing", "order"), [("like_pretrained", [0, 1, 2]), ("own", [2, 0, 1])])
def test_slices_lie_as_in_the_pretraining_or_as_nnunet_lays_them(roots, tmp_path, spacing, order):
    configuration, content = of_slices(roots, tmp_path, ((1.0, 1.5, 7.0),) * 4, ((90, 80, 20),) * 4, spacing=spacing)
    assert content["transpose_forward"] == order and [order[i] for i in content["transpose_backward"]] == [0, 1, 2]
    assert configuration["spacing"] == ([1.0, 1.5] if spacing == "own" else [3.0, 3.0])
    assert content["original_median_shape_after_transp"] == [[90, 80, 20][axis] for axis in order]


def test_what_cannot_be_planned_is_refused(roots, tmp_path):
    dataset = make_dataset(roots, 901, cases=2)
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc"))
    with pytest.raises(UserError, match="no nnU-Net fingerprint"):
        write_plans(pretrained, dataset, PlanOptions())
    write_fingerprint(roots, dataset, 1)
    of_slices = Pretrained.load(make_checkpoint(tmp_path / "s.pth", "resenc", configuration="2d"))
    with pytest.raises(UserError, match="a 2D network was pretrained; nnU-Net's 3d_fullres configuration can't use it"):
        write_plans(of_slices, dataset, PlanOptions())
    for options, message in (
        (PlanOptions("2d"), "3D network"),
        (PlanOptions(patch_size=(32, 32)), "has 3 edges, not 2"),
        (PlanOptions(batch_size=0), "batch size"),
        (PlanOptions(patch_size=(33, 32, 32)), "divisible"),
    ):
        with pytest.raises(UserError, match=message):
            write_plans(pretrained, dataset, options)
