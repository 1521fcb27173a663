"""PCRLv2: which crops are compared and restored, and with which weights. Its losses are checked in tests/conformance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import bounds
from nnssl_ext.trainers.pcrl_v2 import PCRLv2Trainer, agreement, corrupt, error
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import tiny_store


def made(folder, **options):
    trainer = Pair(PCRLv2Trainer, "resenc").trainer(folder, **options)
    trainer.initialize()
    return trainer


def vectors(views=8, scales=2):
    """Orthonormal projections of all views, equal for both samples, and predictions that equal the next view's projection."""
    units = torch.eye(views + 1)[:, None].expand(-1, 2, -1)
    return [torch.stack((units[:-1], units[1:])) for _ in range(scales)]


def test_views_are_two_corrupted_crops_six_small_ones_and_the_first_one_clean(tmp_path):
    trainer, store = Pair(PCRLv2Trainer, "resenc").trainer(tmp_path), tiny_store()
    sizes = set()
    for number in range(20):
        views = trainer.views().sample(store, number % 8, sample_rng(0, number))
        assert list(views) == ["global_0", "global_1", *(f"local_{i}" for i in range(6)), "target"]
        large = [views[name] for name in ("global_0", "global_1")]
        assert iou(*(bounds(view.affine, (16,) * 3) for view in large)) >= 0.3
        sizes |= {round(float(np.abs(view.affine[0, 0])), 6) for view in large}
        clean, seen = views["target"], views["global_0"]
        assert np.array_equal(clean.affine, seen.affine) and clean.intensity == ()
        assert not np.array_equal(clean.image, seen.image) and np.array_equal(np.sort(clean.image, None), np.sort(seen.image, None))
        assert all(view.image.shape == (1, 8, 8, 8) for name, view in views.items() if name.startswith("local"))
    assert len(sizes) > 10 and min(sizes) >= 0.9 and max(sizes) <= 1.25


@pytest.mark.parametrize("shape", [(1, 32, 32, 32), (2, 8, 24, 16), (1, 1, 32, 32)], ids=str)
def test_at_most_a_fifth_of_a_large_crop_is_shuffled_in_all_channels_alike(shape):
    image = np.random.default_rng(0).random(shape, np.float32)
    before, moved = image.copy(), corrupt(image, np.random.default_rng(1)) != image
    assert np.array_equal(image, before) and 0 < moved.mean() <= 0.25 and all(np.array_equal(moved[0], channel) for channel in moved)


def test_each_of_six_small_crops_has_its_own_gradient(tmp_path):
    trainer = made(tmp_path)
    batch = {name: replace(view, image=view.image.clone().requires_grad_()) for name, view in first_batch(trainer).items()}
    loss = trainer.step(trainer.model.train(), batch)["local"]
    found = torch.autograd.grad(loss, [batch[f"local_{i}"].image for i in range(6)])
    assert all(bool(gradient.flatten(1).any(1).all()) for gradient in found)
    assert len({gradient.numpy().tobytes() for gradient in found}) == 6


def test_all_small_crops_count_the_same_and_every_large_one_is_compared_with_each(tmp_path):
    trainer, batch = made(tmp_path), first_batch(made(tmp_path))
    image = batch["target"].image
    for number in range(2, 8):
        given = [v.requires_grad_() for v in vectors()]
        trainer.step(lambda large, small, given=given: (given, [image, image]), batch)["local"].backward()
        weight = [given[0].grad[1, view].norm().item() for view in (0, 1, number)]
        assert given[0].grad[0].abs().max() == 0  # nothing through the projections
        assert weight[2] > 0 and weight[0] > 0 and weight[1] > 0
        p = [vectors()[scale] for scale in range(2)]
        for scale in p:
            scale[1, number] = scale[0, 0]  # the prediction of this one is right for the first large crop
            scale[1, 1] = scale[0, 1]  # instead of right for the first small one
        losses = trainer.step(lambda large, small, p=p: (p, [image, image]), batch)
        assert losses["local"].item() == pytest.approx(-1 / 2 / 12)
        assert losses["global"].item() == pytest.approx(-0.5)


def test_agreement_is_minus_one_where_predictions_are_right_and_counts_both_directions():
    (found,) = vectors(views=3, scales=1)
    assert agreement(found, 0, 1).item() == pytest.approx(-0.5)  # 0 predicts 1, 1 predicts 2
    assert agreement(found, 0, 2).item() == pytest.approx(0.0)
    assert agreement(torch.stack((found[0], found[0].flip(0))), 0, 2).item() == pytest.approx(-1.0)


def test_the_weight_of_the_coarser_restorations_falls_from_one_to_zero(tmp_path):
    trainer = made(tmp_path)
    batch = first_batch(trainer)
    for step, beta in ((0, 1.0), (5, (1 + 0.5**0.5) / 2), (10, 0.5), (20, 0.0)):
        trainer.next_step = step
        losses = {name: loss.item() for name, loss in trainer.step(trainer.model.eval(), batch).items()}
        assert losses["middle"] > 0.1
        rest = losses["total"] - losses["restoration"] - losses["global"] - losses["local"]
        assert rest == pytest.approx(beta * losses["middle"], abs=1e-5)


def test_the_error_of_a_coarse_image_is_that_to_the_means_of_its_blocks():
    target = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    means = target.unfold(2, 2, 2).unfold(3, 4, 4).unfold(4, 1, 1).mean((5, 6, 7))
    assert error(means, target).item() == 0 and error(means + 3, target).item() == pytest.approx(9.0)
    assert error(target - 2, target).item() == pytest.approx(4.0)


def test_the_encoder_alone_is_handed_over_and_the_decoder_of_the_backbone_stays_untrained(tmp_path):
    trainer = made(tmp_path)
    assert trainer.state()["transfer"] == "encoder" and trainer.transferred() is trainer.backbone
    assert not any(parameter.requires_grad for parameter in trainer.backbone.net.decoder.transpconvs.parameters())


def test_one_volume_per_step_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="compares samples and needs two") as refused:
        Pair(PCRLv2Trainer, "resenc").trainer(tmp_path, batch_size=1)
    assert len(str(refused.value).splitlines()) <= 3
