"""The planned SegFormer3D: strides, sizes, and what it leaves alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_ext.nn.segformer3d import SegFormer3D
from nnssl_ext.planners import segformer3d
from nnssl_ext.planners.planner import Planner
from tests.make_data import make_fingerprint, make_plan

HALVED = [2, 2, 2]


@pytest.mark.parametrize(
    ("spacing", "patch", "strides"),
    [
        ((1, 1, 1), (128, 128, 128), [[4, 4, 4], HALVED, HALVED, HALVED]),
        ((1, 1, 1), (32, 32, 32), [[4, 4, 4], HALVED, HALVED]),  # down to 2 voxels
        ((5, 1, 1), (16, 96, 96), [[1, 4, 4], HALVED, HALVED, HALVED]),  # a coarse axis waits
        ((3, 1, 1), (5, 64, 64), [[1, 4, 4], [1, 2, 2], [1, 2, 2], [1, 2, 2]]),  # an odd one is not halved
        ((1, 1, 1), (64, 96, 32), [[4, 4, 4], HALVED, HALVED, [2, 2, 1]]),
        ((1, 1, 1), (8, 8, 8), [[4, 4, 4]]),
        ((9, 9, 1), (1, 1, 8), [[1, 1, 1]]),
    ],
    ids=str,
)
def test_strides_follow_spacing_and_patch(spacing, patch, strides):
    assert segformer3d.strides(spacing, patch) == strides


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 200)] * 3), st.tuples(*[st.floats(0.3, 8)] * 3))
def test_the_product_of_all_strides_divides_any_patch(patch, spacing):
    steps = segformer3d.strides(spacing, patch)
    total = np.prod(steps, axis=0)
    assert 1 <= len(steps) <= segformer3d.STAGES and not (np.array(patch) % total).any()
    assert (np.array(patch) // total >= np.minimum(patch, segformer3d.SMALLEST)).all()


@pytest.mark.parametrize("size", list(segformer3d.SIZES))
@pytest.mark.parametrize(("spacing", "patch"), [((1, 1, 1), (64, 64, 64)), ((5, 1, 1), (16, 96, 96)), ((1, 1, 1), (16, 16, 16))])
def test_parameters_are_counted(size, spacing, patch):
    kwargs = segformer3d.network(spacing, patch, size, 24, 2).kwargs
    with torch.device("meta"):
        network = SegFormer3D(1, 2, **kwargs)
    counted = segformer3d.parameters(kwargs["strides"], kwargs["features_per_stage"], kwargs["n_blocks_per_stage"], kwargs["decoder_width"])
    assert counted == pytest.approx(sum(parameter.numel() for parameter in network.parameters()), rel=0.03)


def test_more_memory_gives_a_larger_network_and_eight_gigabytes_the_published_one():
    plans = [make_plan(memory, shapes=[(300, 300, 300)] * 40, spacings=[(1, 1, 1)] * 40) for memory in (0.5, 2, 8, 12, 24)]
    networks = [plan.configuration("onemmiso").network("segformer3d") for plan in plans]
    assert [network.size for network in networks] == ["nano", "tiny", "S", "M", "L"]
    assert networks[2].kwargs["features_per_stage"] == [32, 64, 160, 256] and networks[2].kwargs["n_blocks_per_stage"] == [2, 2, 2, 2]


@pytest.mark.parametrize("memory", [0.1, 0.5, 2, 8, 24, 80])
@pytest.mark.parametrize(("spacing", "shape"), [((1, 1, 1), (300, 400, 400)), ((5, 0.8, 0.8), (60, 512, 512)), ((2, 2, 2), (20, 30, 200))])
def test_every_3d_configuration_plans_it_and_nothing_else_changes(memory, spacing, shape):
    class Without(Planner):
        families = {name: network for name, network in Planner.families.items() if name != "segformer3d"}

    fingerprint = make_fingerprint(shapes=(shape,) * 20, spacings=(spacing,) * 20)
    found, former = (planner(fingerprint, memory).plan("p").configurations for planner in (Planner, Without))
    assert found.keys() == former.keys() and found.pop("2d") == former.pop("2d")
    for name, config in found.items():
        assert config.patch_size == former[name].patch_size and "segformer3d" in config.networks
        assert {family: network for family, network in config.networks.items() if family != "segformer3d"} == former[name].networks
