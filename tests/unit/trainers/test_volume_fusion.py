"""Volume Fusion: what is mixed, of whom, and how it is told apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.volume_fusion import VolumeFusionTrainer
from tests.make_data import TINY_SHAPE, ArrayStore, tiny_plan


class Subjects(ArrayStore):
    """Cases of the given subjects."""

    def __init__(self, names, channels=1) -> None:
        super().__init__(len(names), TINY_SHAPE, channels)
        self.names = names

    def subject(self, case):
        return self.names[case]


def make(folder, names="abcdefgh", family="resenc", channels=1, **options):
    config = VolumeFusionTrainer.Config(**{"batch_size": 2, "workers": 0, **options})
    trainer = VolumeFusionTrainer(tiny_plan(channels), "3d_fullres", config, Subjects(names, channels), folder, family=family)
    trainer.initialize()
    return trainer


def batch(trainer, data=None):
    return (data or trainer._dataset(trainer.train_cases, "train"))[0]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("channels", [1, 4])
def test_with_a_foreground_of_one_and_a_background_of_zero_the_mixture_is_the_label_over_its_largest_value(channels, classes, tmp_path):
    trainer = make(tmp_path, channels=channels, classes=classes)
    views = batch(trainer)
    one, zero = (replace(views[name], image=torch.full_like(views[name].image, value)) for name, value in (("foreground", 1.0), ("background", 0.0)))
    mixed, label = trainer.fused({**views, "foreground": one, "background": zero}), views["label"].image
    assert mixed.shape == (2, channels, 16, 16, 16) and torch.equal(mixed, (label / (classes - 1)).expand_as(mixed))
    assert set(label.unique().tolist()) <= set(range(classes)) and label.unique().numel() > 1


def test_class_zero_is_the_background_and_the_last_class_the_foreground(tmp_path):
    trainer = make(tmp_path)
    views = batch(trainer)
    foreground, background, label = (views[name].image for name in ("foreground", "background", "label"))
    mixed = trainer.fused(views)
    assert torch.equal(mixed[label == 0], background[label == 0]) and torch.allclose(mixed[label == 4], foreground[label == 4])
    assert torch.allclose(mixed[label == 1], (0.25 * foreground + 0.75 * background)[label == 1], atol=1e-6)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_the_network_sees_the_mixture_and_says_a_class_for_every_voxel(family, tmp_path):
    trainer = make(tmp_path, family=family)
    views, seen = batch(trainer), []
    trainer.model.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    trainer.step(trainer.model, views)["total"].backward()
    assert torch.equal(seen[0][0], trainer.fused(views)) and seen[0][1].shape == (2, 5, 16, 16, 16)


def test_a_single_sample_is_enough(tmp_path):
    trainer = make(tmp_path, batch_size=1)
    assert torch.isfinite(trainer.step(trainer.model, batch(trainer))["total"])


@pytest.mark.parametrize("names", ["aabbcc", "ab", "aaaaaaab", "abc"])
def test_whatever_the_subjects_are_two_are_mixed_and_no_held_out_one_is_trained_on(names, tmp_path):
    trainer = make(tmp_path, names)
    held_out = {names[case] for case in trainer.val_cases}
    data, val = trainer._dataset(trainer.train_cases, "train"), trainer.val_data
    for step in range(6):
        cases = {name: [names[case] for case in view.cases] for name, view in data[step].items()}
        assert all(a != b for a, b in zip(cases["foreground"], cases["background"]))
        assert not held_out & {*cases["foreground"], *cases["background"]}
    if held_out:  # validated with what was held out in front of what is known
        cases = {name: {names[case] for case in view.cases} for name, view in val[0].items()}
        assert cases["foreground"] <= held_out and not held_out & cases["background"]
    assert all(np.isfinite(value) for value in trainer.validate().values())


def test_a_single_subject_is_refused_in_one_clear_message(tmp_path):
    with pytest.raises(UserError, match="two subjects") as error:
        make(tmp_path, "aaaa")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_pictures_show_what_is_mixed_and_what_is_said(family, tmp_path):
    trainer = make(tmp_path, family=family)
    views = batch(trainer)
    with torch.no_grad():
        rows = trainer.picture(views)
    assert len(rows) == 2 and list(rows[0]) == ["foreground", "background", "mixture", "classes", "prediction"]
    assert rows[0]["classes"].shape == rows[0]["prediction"].shape == (16, 16, 16, 3)
    assert np.array_equal(rows[1]["classes"][..., 0], views["label"].image[1, 0].numpy() / 4)
    assert set(np.unique(rows[0]["prediction"]).tolist()) <= {0, 0.25, 0.5, 0.75, 1}
