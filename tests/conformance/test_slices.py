"""Every method on slices: it trains a 2D network on them and sees nothing else, or says what it lacks."""

import dataclasses

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.resenc_slices import ResEncSlicesBackbone
from tests.conformance.pairs import METHODS, OPTIONS, first_batch
from tests.make_data import ArrayStore, slice_plan
from tests.toy_trainers import trained

ABLE = {name: cls for name, cls in METHODS.items() if any(need <= ResEncSlicesBackbone.supports for need in cls.needs)}


def a_run(name, folder, axis=0, **options):
    """A run of a method with U-Nets on slices across an axis."""
    shape = np.insert([24, 22], axis, 6).tolist()
    cls, plan = METHODS[name], slice_plan(axis=axis)
    small = {"epochs": 1, "iterations": 3, "val_iterations": 1, "batch_size": 2, "workers": 0, **OPTIONS.get(name, {}), **options}
    return cls(plan, "2d", cls.Config(**small), ArrayStore(8, shape), folder, family="resenc")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_trains_on_slices_or_says_what_it_lacks(name, tmp_path):
    if name not in ABLE:
        with pytest.raises(UserError, match=f"{name} needs .*; resenc on slices offers decoder, pyramid"):
            a_run(name, tmp_path)
        return
    run = a_run(name, tmp_path)
    run.initialize()
    for view in first_batch(run).values():
        assert view.image.shape[2] == 1  # a slice, cut nowhere else: its affine keeps to the plane
        assert not view.affine[:, 0, 1:3].any() and not view.affine[:, 1:, 0].any()
    run.waited = 0.0
    before = {key: value.clone() for key, value in run.backbone.network_weights().items()}
    for total, norm in trained(run, 2):
        assert np.isfinite(total) and np.isfinite(norm) and norm > 0
    assert any(not torch.equal(value, before[key]) for key, value in run.backbone.network_weights().items())
    if run.val_cases:
        assert np.isfinite(run.validate()["total"])
    with torch.no_grad():
        rows = run.picture(first_batch(run))
    for row in rows:
        assert all(shown.shape[0] == 1 and np.isfinite(shown).all() for shown in row.values() if isinstance(shown, np.ndarray))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("name", [name for name in ("SimSiamIoUTrainer", "SimCLRTrainer") if name in ABLE])
def test_slices_may_lie_across_any_axis(name, axis, tmp_path):
    run = a_run(name, tmp_path, axis)
    run.initialize()
    for view in first_batch(run).values():
        assert view.image.shape[2 + axis] == 1 and view.image.shape[2:].numel() == 16 * 16
        across = view.affine[:, axis, :3].clone()
        across[:, axis] = 0
        assert not across.any() and (view.affine[:, axis, axis] == 1).all()  # neither turned nor mirrored out of the plane
    run.waited = 0.0
    assert all(np.isfinite(total) for total, _ in trained(run, 1))


def test_a_transformer_and_an_unknown_family_are_refused_in_a_sentence(tmp_path):
    cls, plan = METHODS["MAETrainer"], slice_plan()
    for family in ("primus", "primus_v2", "resnet"):
        with pytest.raises(UserError, match=f"'{family}' has no network for slices") as error:
            cls(plan, "2d", cls.Config(), ArrayStore(8, (6, 24, 22)), tmp_path, family=family)
        assert "-b resenc" in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_a_patch_that_is_no_slice_is_refused(tmp_path):
    plan = slice_plan()
    config = dataclasses.replace(plan.configuration("2d"), patch_size=(4, 16, 16))
    cls = METHODS["MAETrainer"]
    run = cls(dataclasses.replace(plan, configurations={"2d": config}), "2d", cls.Config(workers=0), ArrayStore(8, (6, 24, 22)), tmp_path)
    with pytest.raises(UserError, match="4x16x16 voxels is no slice"):
        run.initialize()
