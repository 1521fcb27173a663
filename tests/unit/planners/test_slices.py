"""The configuration of slices: their axis, spacing, patch and network, beside what nnU-Net plans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_ext.nn.backbones.base import resolve
from nnssl_ext.planners import slices
from nnssl_ext.planners.planner import Planner
from tests.make_data import make_fingerprint, make_plan
from tests.make_nnunet import make_dataset, make_roots, write_fingerprint

CT = {"shapes": [(300, 512, 512)] * 40, "spacings": [(2.5, 0.8, 0.8)] * 40}


def planned(memory=8, **collection):
    return make_plan(memory, **(collection or CT)).configuration("2d")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_lie_across_the_coarsest_axis_whose_spacing_is_not_planned(axis):
    order = np.roll([0, 1, 2], axis)  # where the thick axis of the first collection goes
    config = planned(shapes=[np.array((24, 320, 300))[order].tolist()] * 9, spacings=[np.array((4.0, 0.6, 0.7))[order].tolist()] * 9)
    assert config.slice_axis == axis and config.patch_size[axis] == 1 and config.spacing[axis] is None
    assert sorted(mm for mm in config.spacing if mm) == [0.6, 0.7]
    assert config.median_shape[axis] == 24 and config.spacing_for((9.0, 9.0, 9.0))[axis] == 9.0
    assert config.in_volume(config.networks["resenc"].cell)[axis] == 1


def test_in_the_plane_the_spacing_is_the_median():
    config = planned(shapes=[(40, 200, 200)] * 3, spacings=[(3, 0.5, 0.5), (4, 0.7, 0.7), (9, 1.5, 1.5)])
    assert config.spacing == (None, 0.7, 0.7)
    assert config.median_shape == (40, 200, 200)  # 143, 200 and 429 pixels at 0.7 mm


def test_the_patch_is_half_as_long_as_a_large_slice_and_holds_a_small_one():
    assert planned().patch_size == (1, 256, 256)
    assert planned(shapes=[(30, 60, 50)] * 9, spacings=[(3, 1, 1)] * 9).patch_size == (1, 64, 56)
    assert planned(shapes=[(30, 100, 80)] * 9, spacings=[(3, 1, 1)] * 9).patch_size[1:] == (64, 64)
    assert planned(0.5).patch_size == (1, 64, 64)  # for the CPU


def test_a_batch_holds_more_slices_than_volumes_and_never_more_than_a_twentieth_of_the_pixels():
    plan = make_plan(24, **CT)
    assert plan.configuration("2d").networks["resenc"].batch_size > 8 * plan.configuration("3d_fullres").networks["resenc"].batch_size
    config = planned(24, shapes=[(10, 100, 100)] * 2, spacings=[(3, 1, 1)] * 2)
    assert config.networks["resenc"].batch_size == int(0.05 * 2 * 10 * 100 * 100 / (64 * 64)) == 2


def test_the_reason_that_is_given_for_the_patch_is_the_one_that_holds():
    def reason(memory, **collection):
        return next(sentence for sentence in make_plan(memory, **collection).decisions if sentence.startswith("2d: median slice"))

    assert "half of its edges" in reason(24, **CT)
    assert "limited to 4,096 pixels" in reason(0.5, **CT)
    assert "whole median slice" in reason(24, shapes=[(30, 60, 50)] * 9, spacings=[(3, 1, 1)] * 9)
    huge = {"shapes": [(4, 4000, 4000)] * 9, "spacings": [(9, 0.05, 0.05)] * 9}
    assert "limited by memory" in reason(6, **huge)
    assert make_plan(6, **huge).configuration("2d").networks["resenc"].memory_gb <= 6


def test_a_planner_without_unets_plans_no_slices():
    class Transformers(Planner):
        families = {"primus": Planner.families["primus"]}

    assert "2d" not in Transformers(make_fingerprint(), 4).plan("p").configurations


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.tuples(*[st.integers(1, 2048)] * 3), st.tuples(*[st.floats(0.05, 20)] * 3)), min_size=1, max_size=4),
    st.floats(0.3, 80),
)
def test_any_collection_gives_a_patch_that_the_strides_divide_and_a_network_within_the_target(cases, memory):
    shapes, spacings = (np.array(part, float) for part in zip(*cases))
    target = np.median(spacings, axis=0)
    size = Planner(make_fingerprint(), memory)._size("resenc")
    config, decisions = slices.configuration(target, spacings, shapes, size, memory, "p", {})
    network, plane = config.networks["resenc"], [edge for axis, edge in enumerate(config.patch_size) if axis != config.slice_axis]
    assert min(plane) >= slices.SMALLEST and not (np.array(plane) % network.cell).any()
    assert network.memory_gb <= memory and network.batch_size >= 2
    assert (np.array(plane) // network.cell).prod() > 1  # instance normalisation
    assert all(sentence.startswith("2d: ") for sentence in decisions)


@pytest.mark.nnunet
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((300, 512, 512), (2.5, 0.8, 0.8)), ((320, 24, 320), (0.6, 3.6, 0.6)), ((180, 220, 20), (0.9, 0.7, 5.0)), ((96, 96, 96), (1.0, 1.0, 1.0))],
)
def test_axis_and_spacing_are_those_of_nnunet_and_so_is_the_network_for_the_same_patch(tmp_path, monkeypatch, shape, spacing):
    import json

    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import nnUNetPlannerResEncL

    roots = make_roots(tmp_path, monkeypatch)
    dataset = make_dataset(roots, 901, cases=5)
    write_fingerprint(roots, dataset, 1)
    file = roots["nnUNet_preprocessed"] / dataset / "dataset_fingerprint.json"
    content = json.loads(file.read_text()) | {"spacings": [list(spacing)] * 5, "shapes_after_crop": [list(shape)] * 5}
    file.write_text(json.dumps(content))
    theirs = nnUNetPlannerResEncL(dataset).plan_experiment()
    ours = planned(24, shapes=[shape] * 5, spacings=[spacing] * 5)
    stock, network = theirs["configurations"]["2d"], ours.networks["resenc"]
    assert theirs["transpose_forward"][0] == ours.slice_axis
    assert list(stock["spacing"]) == [mm for mm in ours.spacing if mm is not None]
    plane = [edge for axis, edge in enumerate(ours.patch_size) if axis != ours.slice_axis]
    _, strides, kernels, size, _ = get_pool_and_conv_props(stock["spacing"], plane, 4, 999999)
    assert list(size) == plane  # a patch that nnU-Net would not enlarge
    kwargs, stock_kwargs = dict(network.kwargs), dict(stock["architecture"]["arch_kwargs"])
    assert [tuple(s) for s in kwargs["strides"]] == list(strides) and [tuple(k) for k in kwargs["kernel_sizes"]] == list(kernels)
    stages = kwargs["n_stages"]
    assert kwargs["features_per_stage"] == list(stock_kwargs["features_per_stage"])[:stages]
    assert kwargs["n_blocks_per_stage"] == list(stock_kwargs["n_blocks_per_stage"])[:stages]
    same = ("conv_op", "norm_op", "norm_op_kwargs", "dropout_op", "nonlin", "nonlin_kwargs", "conv_bias")
    assert {key: kwargs[key] for key in same} == {key: stock_kwargs[key] for key in same}
    assert resolve(kwargs, network.imports)["conv_op"].__name__ == "Conv2d"
