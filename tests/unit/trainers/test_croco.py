"""CroCo: a nearly hidden view is completed with the help of another one, whose place it knows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.tokens import voxel_mask
from nnssl_ext.trainers.croco import CroCo3DTrainer, completion_of
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import TINY_SHAPE, ArrayStore, tiny_plan

PATCH, TOKEN, SMALL = (8, 24, 16), (4, 4, 4), {"batch_size": 2, "workers": 0, "decoder_depth": 2, "decoder_width": 64}


class Sizes(ArrayStore):
    """Subjects of two sizes."""

    def __init__(self, channels=1):
        super().__init__(8, TINY_SHAPE, channels)
        self.arrays[1::2] = [np.repeat(array, 2, axis=3) for array in self.arrays[1::2]]


def make(folder, channels=1, patch=PATCH, spacing=(3.0, 3.0, 3.0), store=None, **options):
    plan = tiny_plan(channels, patch)
    config = replace(plan.configuration("3d_fullres"), spacing=spacing)
    plan = replace(plan, configurations={"3d_fullres": config})
    trainer = CroCo3DTrainer(plan, "3d_fullres", CroCo3DTrainer.Config(**{**SMALL, **options}), store or ArrayStore(8, TINY_SHAPE, channels), folder)
    trainer.initialize()
    trainer.model.eval()
    return trainer, trainer._dataset(trainer.train_cases, "train")[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_voxels_have_no_influence_and_no_gradient_and_all_of_the_second_view_has(channels, tmp_path):
    trainer, batch = make(tmp_path, channels)
    batch = {name: replace(view, image=view.image.requires_grad_()) for name, view in batch.items()}
    trainer.step(trainer.model, batch)["total"].backward()
    hidden = voxel_mask(batch["first"].mask, PATCH).expand_as(batch["first"].image)
    assert not batch["first"].image.grad[hidden].any() and bool((batch["first"].image.grad[~hidden] != 0).all())
    assert bool((batch["second"].image.grad != 0).all())
    changed = torch.where(hidden, torch.nan, batch["first"].image)
    outputs = [trainer.model.features(image, batch["second"].image, trainer.places(batch), batch["first"].mask) for image in (batch["first"].image, changed)]
    assert torch.equal(*outputs)


def test_nine_tenths_of_the_tokens_are_hidden(tmp_path):
    _, batch = make(tmp_path)
    assert batch["first"].mask.shape[1:] == (2, 6, 4)
    assert batch["first"].mask.flatten(1).sum(1).tolist() == [43, 43] and batch["second"].mask is None


def overfitted(trainer, batch, steps=100):
    """Last loss of AdamW on one batch."""
    torch.manual_seed(0)
    trainer.initialize()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = trainer.step(trainer.model, batch)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_second_view_that_equals_the_first_is_of_more_help_than_an_empty_one(tmp_path):
    trainer, batch = make(tmp_path, patch=(16, 16, 16), decoder_depth=1, batch_size=8)
    generator = torch.Generator().manual_seed(0)
    patterns, amounts = torch.randn(3, *TOKEN, generator=generator), torch.randn(8, 3, 4, 4, 4, generator=generator)
    image = torch.einsum("bkzyx,kpqr->bzpyqxr", amounts, patterns).reshape(8, 1, 16, 16, 16)  # no token tells of another one
    first = replace(batch["first"], image=image)
    seconds = (replace(first, mask=None, image=content) for content in (image, torch.zeros_like(image)))
    same, empty = (overfitted(trainer, {"first": first, "second": second}) for second in seconds)
    assert same < 0.95 * empty


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (5.0, 1.0, 2.0)], ids=str)
def test_places_are_the_centres_of_the_tokens_in_mm_from_the_first_view(spacing, tmp_path):
    trainer, batch = make(tmp_path, spacing=spacing)
    here, there = trainer.places(batch)
    expected = torch.cartesian_prod(*((torch.arange(n // t) + 0.5) * t * mm - n * mm / 2 for n, t, mm in zip(PATCH, TOKEN, spacing)))
    assert torch.allclose(here, expected.expand_as(here))
    mirrored = batch["first"].affine[:, :, :3].diagonal(dim1=1, dim2=2)  # both views alike
    shift = (batch["second"].affine - batch["first"].affine)[:, :, 3] * mirrored * torch.tensor(spacing)
    assert torch.allclose(there - here, shift[:, None].float()) and bool(shift.any())


def test_shifting_both_crops_changes_nothing_in_the_decoder_and_shifting_one_does(tmp_path):
    trainer, batch = make(tmp_path)
    moved = {name: replace(view, affine=view.affine + torch.tensor([0, 0, 0, 5.0])) for name, view in batch.items()}
    assert torch.equal(trainer.places(moved), trainer.places(batch))
    with torch.no_grad():
        losses = [trainer.step(trainer.model, b)["total"].item() for b in (batch, moved, {**batch, "second": moved["second"]})]
    assert losses[0] == losses[1] != losses[2]


def test_the_place_of_another_subject_is_told_by_its_share_of_the_way(tmp_path):
    trainer, batch = make(tmp_path, store=Sizes(), second="subject", batch_size=8)
    here, there = trainer.places(batch)
    shapes = [[trainer.store.shape(case) for case in view.cases] for view in (batch["first"], batch["second"])]
    assert len({one[2] / other[2] for one, other in zip(*shapes)}) > 1
    for one, other, a, b, mine, theirs in zip(*shapes, batch["first"].affine, batch["second"].affine, here, there):
        sign = torch.diagonal(a[:, :3])
        middles = [
            (affine[:, :3] @ ((torch.tensor(PATCH).double() - 1) / 2) + affine[:, 3] + 0.5) / torch.tensor(shape) for affine, shape in ((a, one), (b, other))
        ]
        assert torch.allclose(theirs.mean(0).double(), sign * (middles[1] - middles[0]) * torch.tensor(one) * 3.0, atol=1e-3)
        extents = [places[-1] - places[0] for places in (mine, theirs)]
        assert torch.allclose(extents[1], extents[0] * torch.tensor(one) / torch.tensor(other), atol=1e-4)


def test_encoder_and_decoder_are_rebuilt_from_a_checkpoint(tmp_path):
    trainer, batch = make(tmp_path / "run", epochs=1, iterations=1, val_iterations=1)
    trainer.fit()
    model = completion_of(tmp_path / "run" / "checkpoint_final.pth")
    arguments = batch["first"].image, batch["second"].image, trainer.places(batch)
    trainer.model.eval()
    for mask in (None, batch["first"].mask):
        assert torch.equal(model.features(*arguments, mask), trainer.model.features(*arguments, mask))
    assert not model.training and torch.equal(
        model.reconstruct(arguments[0], mask, *arguments[1:]), trainer.model.reconstruct(arguments[0], mask, *arguments[1:])
    )


def test_a_checkpoint_of_another_method_has_no_such_decoder(tmp_path):
    config = MAETrainer.Config(epochs=1, iterations=1, val_iterations=1, batch_size=2, workers=0)
    MAETrainer(tiny_plan(), "3d_fullres", config, ArrayStore(8, TINY_SHAPE), tmp_path, family="primus").fit()
    with pytest.raises(UserError, match="MAETrainer has no decoder for two views"):
        completion_of(tmp_path / "checkpoint_final.pth")


@pytest.mark.parametrize(("options", "reason"), [({"second": "sessions"}, "session"), ({"decoder_width": 70}, "96"), ({"iou": (0.6, 0.3)}, "lower one first")])
def test_settings_that_make_no_sense_are_refused(options, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        make(tmp_path, **options)


def test_pictures_show_the_hidden_view_its_completion_and_the_other_view(tmp_path):
    trainer, batch = make(tmp_path)
    with torch.no_grad():
        rows = trainer.picture(batch)
    assert [list(row) for row in rows] == [["crop", "visible", "reconstruction (mean, spread given)", "second view"]] * 2
    assert np.array_equal(rows[1]["second view"], batch["second"].image[1, 0].numpy())
