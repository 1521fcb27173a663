"""The planner: spacing, patch, topology, memory, normalisation."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import resampled_shape
from nnssl_ext.core.plan import Plan, check
from nnssl_ext.nn.backbones.base import build_backbone, resolve
from nnssl_ext.planners import planner as planner_module
from nnssl_ext.planners import primus, resenc, slices
from nnssl_ext.planners.planner import Planner
from tests.make_data import make_fingerprint, make_plan

AXES = st.tuples(*[st.integers(1, 2048)] * 3)
SPACINGS = st.tuples(*[st.floats(0.05, 20)] * 3)


def test_isotropic_spacing_is_the_median_of_the_cases():
    plan = make_plan(shapes=[(100, 100, 100)] * 3, spacings=[(1, 1, 1), (2, 2, 2), (5, 5, 5)])
    assert plan.configurations["3d_fullres"].spacing == (2, 2, 2)


def test_a_coarse_axis_takes_its_tenth_percentile():
    thick = [3.0 + i for i in range(11)]  # 3, 4, ... 13 mm: the 10th percentile is 4
    plan = make_plan(shapes=[(20, 256, 256)] * 11, spacings=[(t, 1, 1) for t in thick])
    assert plan.configurations["3d_fullres"].spacing == pytest.approx((4, 1, 1))
    assert plan.configurations["median"].spacing == pytest.approx((8, 1, 1))
    assert any("coarse" in sentence for sentence in plan.decisions)


def test_the_coarse_axis_never_becomes_finer_than_the_others():
    plan = make_plan(shapes=[(20, 256, 256)] * 11, spacings=[(0.5, 1, 1)] * 2 + [(8, 1, 1)] * 9)
    assert plan.configurations["3d_fullres"].spacing == pytest.approx((1.00001, 1, 1))


def test_all_configurations_have_the_promised_spacing():
    plan = make_plan(24, shapes=[(200, 300, 300)] * 4, spacings=[(1.5, 0.8, 0.8)] * 4)
    assert plan.configurations["onemmiso"].spacing == (1, 1, 1)
    assert plan.configurations["noresample"].spacing is None
    assert plan.configurations["median"].spacing == (1.5, 0.8, 0.8)


def test_lowres_is_planned_when_the_patch_sees_too_little_and_then_covers_a_quarter():
    big = make_plan(8, shapes=[(600, 512, 512)] * 4, spacings=[(0.7, 0.7, 0.7)] * 4)
    lowres = big.configurations["3d_lowres"]
    assert np.prod(lowres.patch_size) >= 0.24 * np.prod(lowres.median_shape)
    small = make_plan(8, shapes=[(64, 64, 64)] * 4, spacings=[(3, 3, 3)] * 4)
    assert "3d_lowres" not in small.configurations


COLLECTIONS = st.lists(st.tuples(AXES, SPACINGS), min_size=1, max_size=5)
MEMORY = st.floats(0.3, 80)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(COLLECTIONS, MEMORY)
def test_any_collection_gives_a_valid_plan_whose_patches_fit_strides_tokens_and_memory(cases, memory):
    plan = make_plan(memory, shapes=[c[0] for c in cases], spacings=[c[1] for c in cases])
    content = plan.as_dict()
    check(content)
    assert Plan.from_dict(content).as_dict() == content
    for config in plan.configurations.values():
        assert config.patch_size[config.slice_axis] == 1 if config.slice_axis is not None else "primus" in config.networks
        strides = np.array(config.in_volume(config.networks["resenc"].cell))
        token = config.networks["primus"].cell if "primus" in config.networks else strides
        patch = np.array(config.patch_size)
        assert (patch > 0).all() and not (patch % strides).any() and not (patch % token).any()
        smallest = 1 if config.slice_axis is None else slices.SMALLEST
        assert (patch < np.maximum(config.median_shape, smallest) + np.lcm(strides, token)).all()
        deepest = patch // strides
        assert deepest.prod() >= 2 or len(config.networks["resenc"].kwargs["strides"]) == 1
        for network in config.networks.values():
            assert network.batch_size >= 2 and network.memory_gb <= memory


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(COLLECTIONS, st.sampled_from([(0.3, 1), (1, 2), (2, 6), (6, 8), (8, 80)]), st.floats(0, 0.99), st.floats(0, 0.99))
def test_between_two_sizes_of_the_unet_more_memory_never_means_a_smaller_patch(cases, interval, first, second):
    low, high = (interval[0] + share * (interval[1] - interval[0]) for share in sorted((first, second)))
    less, more = (make_plan(gb, shapes=[c[0] for c in cases], spacings=[c[1] for c in cases]).configurations for gb in (low, high))
    for name in less.keys() & more.keys() - {"3d_lowres"}:  # whose spacing follows from the patch of 3d_fullres
        assert np.prod(less[name].patch_size) <= np.prod(more[name].patch_size)


@settings(max_examples=20, deadline=None)
@given(COLLECTIONS, MEMORY)
def test_the_same_fingerprint_gives_the_same_plan(cases, memory):
    first, second = (make_plan(memory, shapes=[c[0] for c in cases], spacings=[c[1] for c in cases]) for _ in range(2))
    assert first == second


@settings(max_examples=100, deadline=None)
@given(COLLECTIONS, SPACINGS)
def test_the_median_case_is_that_of_the_cases_resampled_one_by_one(cases, target):
    class FixedSpacing(Planner):
        def target_spacing(self):
            return np.array(target)

    shapes, spacings = zip(*cases)
    found = FixedSpacing(make_fingerprint(shapes=shapes, spacings=spacings), 4).plan("p").configurations["3d_fullres"].median_shape
    one_by_one = [resampled_shape(shape, spacing, target) for shape, spacing in cases]
    assert list(found) == np.maximum(1, np.round(np.median(one_by_one, axis=0))).astype(int).tolist()


@pytest.mark.parametrize(
    ("shapes", "spacings"),
    [
        ([(40, 48, 44)], [(3, 3, 3)]),
        ([(2, 512, 512)] * 3, [(1, 1, 1)] * 3),
        ([(2, 512, 512), (300, 256, 256)], [(8, 0.7, 0.7), (1, 1, 1)]),
        ([(64, 64, 64)] * 2, [(0.5, 0.5, 0.5), (20, 20, 20)]),
        ([(2048, 2048, 2048)], [(0.05, 0.05, 0.05)]),
        ([(5, 4, 3)], [(20, 0.05, 20)]),
    ],
    ids=["single", "slab", "thin and thick", "spacing varies 40x", "huge", "crumb"],
)
def test_planned_networks_can_be_built_and_read_their_patch(shapes, spacings):
    plan = make_plan(0.5, shapes=shapes, spacings=spacings)
    for name in ("3d_fullres", "onemmiso"):
        config = plan.configurations[name]
        for family in ("resenc", "primus", "segformer3d"):
            with torch.device("meta"):
                backbone = build_backbone(config, family, 1)
                maps = backbone.pyramid(torch.empty(2, 1, *config.patch_size))
            assert [tuple(found.shape[2:]) for found in maps] == [tuple(p // s for p, s in zip(config.patch_size, stride)) for stride in backbone.strides]


def test_twenty_thousand_cases_are_planned_in_seconds_and_the_plan_does_not_grow():
    rng = np.random.default_rng(0)

    def planned(cases):
        fingerprint = make_fingerprint(shapes=rng.integers(100, 600, (cases, 3)).tolist(), spacings=rng.uniform(0.4, 5, (cases, 3)).tolist())
        start = time.process_time()
        plan = Planner(fingerprint, 24).plan("p")
        return len(json.dumps(plan.as_dict())), time.process_time() - start

    small, large = planned(10), planned(20_000)
    assert large[0] == pytest.approx(small[0], rel=0.05) and large[1] < 3  # about 0.2 s on an idle core


@pytest.mark.parametrize(("shape", "memory", "words"), [((300, 400, 400), 12, "limited by memory"), ((300, 400, 400), 4, "limited to 262,144 voxels")])
def test_the_reason_given_for_a_patch_is_the_one_that_holds(shape, memory, words):
    decisions = make_plan(memory, shapes=[shape] * 9, spacings=[(1, 1, 1)] * 9).decisions
    assert any(sentence.startswith("3d_fullres: patch") and words in sentence for sentence in decisions)


def test_a_slab_is_not_said_to_be_limited_by_memory_that_is_plentiful():
    decisions = make_plan(80, shapes=[(2, 512, 512)] * 9, spacings=[(1, 1, 1)] * 9).decisions
    sentence = next(sentence for sentence in decisions if sentence.startswith("3d_fullres: patch"))
    assert "memory" not in sentence and "cube" in sentence


@pytest.mark.parametrize("broken", [{"std": 0.0}, {"std": float("nan")}, {"mean": float("inf")}, {"percentile_99_5": float("nan")}, {"percentile_00_5": 600.0}])
def test_a_ct_with_degenerate_statistics_is_standardised_per_case(broken):
    fingerprint = make_fingerprint()
    fingerprint["intensities"]["CT"] |= broken
    assert Planner(fingerprint, 4).normalization("CT").scheme == "zscore"


@pytest.mark.parametrize("memory", [6.5, 8, 12, 24, 40, 80])
def test_planned_memory_stays_within_the_target(memory):
    plan = make_plan(memory, shapes=[(300, 400, 400)] * 40, spacings=[(1, 0.8, 0.8)] * 40)
    for config in plan.configurations.values():
        for network in config.networks.values():
            assert network.memory_gb <= memory
            assert network.batch_size >= 2


def test_more_memory_never_means_a_smaller_patch():
    volumes = [np.prod(make_plan(gb, shapes=[(300, 400, 400)] * 9, spacings=[(1, 1, 1)] * 9).configurations["3d_fullres"].patch_size) for gb in (0.5, 4, 8, 24)]
    assert volumes == sorted(volumes)


@pytest.mark.parametrize("size", list(resenc.SIZES))
@pytest.mark.parametrize(("spacing", "patch"), [((1, 1, 1), (64, 64, 64)), ((5, 1, 1), (16, 96, 64)), ((1, 1), (256, 256)), ((3, 1), (32, 96))])
def test_the_count_of_feature_elements_equals_the_librarys_own(size, spacing, patch):
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    network = resenc.network(spacing, patch, size, 24, 2)
    net = ResidualEncoderUNet(input_channels=1, num_classes=2, **resolve(dict(network.kwargs), network.imports))
    kwargs = network.kwargs
    counted = resenc.feature_elements(patch, kwargs["strides"], kwargs["features_per_stage"], kwargs["n_blocks_per_stage"])
    assert counted == net.compute_conv_feature_map_size(patch)
    counted = resenc.parameters(kwargs["features_per_stage"], kwargs["n_blocks_per_stage"], len(patch))
    assert counted == pytest.approx(sum(p.numel() for p in net.parameters()), rel=0.1)


@pytest.mark.nnunet
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(8, 256)] * 3), st.tuples(*[st.floats(0.3, 8)] * 3), st.sampled_from([2, 3]))
def test_the_topology_follows_nnunets_rule(patch, spacing, axes):
    patch, spacing = patch[:axes], spacing[:axes]
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    ours = resenc.topology(spacing, patch, max_stages=99)
    assert [tuple(s) for s in ours[0]] == list(strides)
    assert [tuple(k) for k in ours[1]] == list(kernels)


def test_tokens_are_near_cubes_in_millimetres():
    assert primus.token_size((1, 1, 1)) == (8, 8, 8)
    assert primus.token_size((4, 1, 1)) == (2, 8, 8)
    assert primus.token_size((0.5, 0.5, 2)) == (8, 8, 2)
    assert primus.token_size((100, 1, 1)) == (1, 8, 8)


@pytest.mark.parametrize("memory", [0.1, 0.5, 2, 8, 24, 80])
@pytest.mark.parametrize(("spacing", "shape"), [((1, 1, 1), (300, 400, 400)), ((5, 0.8, 0.8), (60, 512, 512)), ((2, 2, 2), (20, 30, 200))])
def test_planning_primus_v2_changes_neither_the_patch_nor_other_networks(memory, spacing, shape):
    class Without(Planner):
        families = {name: network for name, network in Planner.families.items() if name != "primus_v2"}

    fingerprint = make_fingerprint(shapes=(shape,) * 20, spacings=(spacing,) * 20)
    found, former = (planner(fingerprint, memory).plan("p").configurations for planner in (Planner, Without))
    assert found.keys() == former.keys() and "primus_v2" in found["onemmiso"].networks
    assert found.pop("2d") == former.pop("2d")
    for name, config in found.items():
        cubes = config.networks["primus"].kwargs["patch_embed_size"] == [8, 8, 8]
        assert config.patch_size == former[name].patch_size and ("primus_v2" in config.networks) == cubes
        assert {family: network for family, network in config.networks.items() if family != "primus_v2"} == former[name].networks


def test_ct_is_clipped_and_standardised_with_statistics_of_the_collection():
    scheme = make_plan(modality="CT").configurations["3d_fullres"].normalization["CT"]
    assert (scheme.scheme, scheme.mean, scheme.std, scheme.low, scheme.high) == ("ct", 40, 120, -800, 600)


def test_mr_is_standardised_per_case():
    assert make_plan(modality="T1w").configurations["3d_fullres"].normalization["T1w"].scheme == "zscore"


def test_a_plan_survives_saving_and_loading(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").as_dict() == plan.as_dict()


def test_a_fingerprint_without_readable_cases_is_refused():
    fingerprint = make_fingerprint()
    fingerprint["cases"] = {}
    with pytest.raises(UserError, match="no readable case"):
        Planner(fingerprint, 4.0)


def test_the_memory_of_the_card_comes_from_its_driver(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 24576\n")
    tool.chmod(0o755)
    monkeypatch.setattr(planner_module.shutil, "which", lambda name: str(tool))
    assert planner_module.card_memory_gb() == 24
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert planner_module.card_memory_gb() == planner_module.CPU_MEMORY_GB
    monkeypatch.setattr(planner_module.shutil, "which", lambda name: None)
    assert planner_module.card_memory_gb() == planner_module.CPU_MEMORY_GB
