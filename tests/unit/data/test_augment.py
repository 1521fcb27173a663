"""Intensity augmentation."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.augment import DINO, NNUNET, Chance, Intensity, apply
from nnssl_ext.data.loader import StepDataset
from nnssl_ext.data.spatial import MILD
from nnssl_ext.data.views import Crop
from tests.make_data import ArrayStore

CERTAIN = Intensity(**{field.name: Chance(1.0, 0.75, 1.25) for field in fields(Intensity)})


@pytest.mark.parametrize("preset", [NNUNET, DINO], ids=["nnunet", "dino"])
def test_chances_and_strengths_of_the_presets(preset):
    drawn = [preset.draw(2, sample_rng(0, i)) for i in range(4000)]
    for field in fields(Intensity):
        chance = getattr(preset, field.name)
        mine = [[step for step in steps if step[0] == field.name] for steps in drawn]
        assert abs(np.mean([len(steps) for steps in mine]) / 2 - chance.p * chance.channels) < 0.02
        values = [step[2][0] for steps in mine for step in steps]
        assert min(values) >= chance.low and max(values) <= chance.high
        if chance.low < 1 < chance.high:
            assert abs(np.mean(np.array(values) < 1) - 0.5) < 0.05


def test_the_number_of_threads_does_not_change_a_bit():
    image, steps = torch.randn((2, 64, 64, 64), generator=torch.Generator().manual_seed(0)), CERTAIN.draw(2, sample_rng(0, 0))
    assert len(steps) == 14
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(image.clone())
            apply(results[-1], steps)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_augmentation_left_to_the_device_is_that_of_the_loader():
    spec, store = Crop((12, 12, 12), MILD, CERTAIN), ArrayStore(channels=2)
    loaded, left = (StepDataset(store, spec, range(8), 0, 3, on_device=where)[4]["image"] for where in (False, True))
    assert not loaded.intensity and len(left.intensity) == 3 and not torch.equal(left.image, loaded.image)
    before = left.image.clone()
    moved = left.to(torch.device("cpu"))
    assert torch.equal(moved.image, loaded.image) and not moved.intensity
    assert torch.equal(left.image, before)


def test_two_views_of_self_distillation_differ_but_are_still_recognised():
    image = torch.from_numpy(ArrayStore(1, (32, 32, 32)).arrays[0])
    likeness, plain = [], 0
    for i in range(100):
        steps, changed = DINO.draw(1, sample_rng(0, i)), image.clone()
        apply(changed, steps)
        plain += not steps
        likeness.append(np.corrcoef(changed.flatten(), image.flatten())[0, 1])
    assert plain < 15 and min(likeness) > 0.8 and np.isfinite(likeness).all()
