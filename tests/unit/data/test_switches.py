"""Augmentations that are switched off: the views equal those that never had them, in every method."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import DINO, NNUNET, Chance, Intensity
from nnssl_ext.data.grid import GridTargets
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.masking import MaskedCrop
from nnssl_ext.data.spatial import MIRROR, NONE, Spatial
from nnssl_ext.data.spatial import NNUNET as STRONG
from nnssl_ext.data.switches import NAMES, OF_INTENSITY, check_names, without
from nnssl_ext.data.turned import Turning
from nnssl_ext.data.views import Crop, MultiCrop
from nnssl_ext.trainers.config import folder_suffix, parse_overrides
from tests.conformance.pairs import METHODS, PAIRS, Pair
from tests.make_data import ArrayStore, tiny_store

SIZE, STORE = (12, 12, 12), ArrayStore(2, (30, 33, 36))
MADE = {  # a kind of views with these augmentations
    "crop": lambda spatial, intensity: Crop(SIZE, spatial, intensity),
    "masked crop": lambda spatial, intensity: MaskedCrop(Crop(SIZE, spatial, intensity), (4, 4, 4), 0.5),
    "multi-crop": lambda spatial, intensity: MultiCrop(SIZE, (8, 8, 8), 2, spatial=spatial, intensity=intensity),
    "pair": lambda spatial, intensity: IoUPair(SIZE, spatial=spatial, intensity=intensity, apart=True),
    "grid": lambda spatial, intensity: GridTargets((1, 2, 2), (8, 8, 8), 2, spatial=spatial, intensity=intensity),
}
CLEAR = {"mirror": {"mirror": (False,) * 3}, "rotation": {"p_rotation": 0.0}, "zoom": {"p_zoom": 0.0}}  # of Spatial


def views_of(spec):
    return StepDataset(STORE, spec, (0, 1), seed=0, batch_size=8)[0]


def equal(one, other):
    pairs = [(one[name], other[name]) for name in one]
    return list(one) == list(other) and all(np.array_equal(a.image, b.image) and np.array_equal(a.affine, b.affine) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MADE)
def test_views_without_an_augmentation_are_those_that_never_had_it(kind, name):
    make, often = MADE[kind], {operation: replace(getattr(NNUNET, operation), p=0.9) for operation in OF_INTENSITY}
    spatial, intensity = replace(STRONG, p_rotation=0.9, p_zoom=0.9), Intensity(**often)
    if name in OF_INTENSITY:
        expected = make(spatial, replace(intensity, **{name: Chance()}))
    else:
        expected = make(replace(spatial, **CLEAR[name]), intensity)
    found = without(make(spatial, intensity), (name,))
    assert found == expected and equal(views_of(found), views_of(expected))
    unused = (kind, name) in {("multi-crop", "zoom"), ("pair", "zoom"), ("grid", "zoom"), ("grid", "rotation")}
    assert equal(views_of(found), views_of(make(spatial, intensity))) is unused


def test_everything_off_leaves_slices_of_the_case():
    spec = without(MADE["pair"](STRONG, NNUNET), NAMES)
    assert spec == IoUPair(SIZE, spatial=replace(NONE, rotation=STRONG.rotation, zoom=STRONG.zoom), apart=True)
    for step in range(3):
        for view in StepDataset(STORE, spec, (0, 1), seed=0, batch_size=4)[step].values():
            for image, affine, case in zip(view.image, view.affine, view.cases):
                assert np.array_equal(affine[:, :3], np.eye(3))
                z, y, x = (int(low) for low in affine[:, 3])
                assert np.array_equal(image, STORE.read(case)[:, z : z + 12, y : y + 12, x : x + 12])


def test_quarter_turns_of_a_pair_are_a_rotation_but_those_that_a_method_tells_are_not(tmp_path):
    turning = Turning(SIZE, (1, 2), (0, 1, 2, 3))
    spec = without(IoUPair(SIZE, spatial=MIRROR, turning=turning), ("rotation",))
    assert spec == IoUPair(SIZE, spatial=MIRROR, turning=replace(turning, turns=(0,)))
    assert all((np.abs(view.affine[:, :, :3]) == np.eye(3)).all() for view in views_of(spec).values())
    told = Pair(METHODS["SwinUNETRPretrainTrainer"], "resenc").trainer(tmp_path).views()
    with pytest.raises(UserError, match="no rotation that could be left out"):
        without(told, ("rotation",))


@pytest.mark.parametrize("method", sorted({pair.method for pair in PAIRS if pair.cls.__module__.startswith("nnssl_ext.")}))
def test_the_views_of_every_method_lose_what_is_switched_off(method, tmp_path):
    pair = next(pair for pair in PAIRS if pair.method == method)
    spec = pair.trainer(tmp_path).views()
    held = [name for name in NAMES if could(spec, name)]
    assert held or method == "SwinUNETRPretrainTrainer"
    if not held:
        return
    trainer = pair.trainer(tmp_path, no_augment=tuple(held))
    trainer.initialize()
    drawn = [trainer.val_data.spec.sample(trainer.store, case, sample_rng(0, case)) for case in range(8)]
    assert not any(view.intensity for views in drawn for view in views.values())
    if "mirror" in held:
        assert all((np.diag(view.affine[:, :3]) > 0).all() for views in drawn for view in views.values())


def could(spec, name):
    try:
        return without(spec, (name,)) is not spec
    except UserError:
        return False


def test_one_of_them_changes_the_batches_of_training_and_of_validation(tmp_path):
    plain, off = (Pair(METHODS["SimSiamIoUTrainer"], "primus").trainer(tmp_path, no_augment=names, store=tiny_store()) for names in ((), ("gamma",)))
    for trainer in (plain, off):
        trainer.initialize()
    expected = replace(off.views(), intensity=replace(NNUNET, gamma=Chance()))
    assert plain.val_data.spec == plain.views() and off.val_data.spec == off._dataset([0], "train").spec == expected


@pytest.mark.parametrize("names", [("blurr",), ("gamma", "Mirror"), ("",), (" blur",)], ids=str)
def test_a_typo_is_told_with_all_names(names, tmp_path):
    with pytest.raises(UserError, match="there is no augmentation") as error:
        Pair(METHODS["MAETrainer"], "primus").trainer(tmp_path, no_augment=names)
    assert all(name in str(error.value) for name in NAMES) and len(str(error.value).splitlines()) <= 3


def test_what_the_views_do_not_have_is_told_with_what_they_have(tmp_path):
    trainer = Pair(METHODS["MAETrainer"], "primus").trainer(tmp_path, no_augment=("blur",))
    with pytest.raises(UserError, match="no blur that could be left out") as error:
        trainer.initialize()
    assert "give some of: mirror" in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_names_are_those_of_the_operations_and_the_option_takes_several():
    check_names(NAMES)
    assert NAMES == ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma", "mirror", "rotation", "zoom")
    config = METHODS["SimCLRTrainer"].Config(**parse_overrides(METHODS["SimCLRTrainer"].Config, ["no_augment=blur,gamma"]))
    assert config.no_augment == ("blur", "gamma") and folder_suffix(config, "resenc", "resenc") == "no_augment=(blur,gamma)"
    assert folder_suffix(replace(config, no_augment=("blur",)), "resenc", "resenc") == "no_augment=(blur,)"


def test_parts_that_hold_no_augmentation_stay_what_they_are():
    other = partial(print, 1)
    for part in (other, (1, 2), None, "blur", Chance(0.5)):
        with pytest.raises(UserError):
            without(part, ("blur",))
        assert without(part, ()) is part
    assert without(DINO, ("blur", "gamma")) == replace(DINO, blur=Chance(), gamma=Chance())
    assert without(Spatial(), ("mirror",)) == NONE
