"""Reconstruction with contrast: what is corrupted, what is compared, and how the two losses multiply."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.corrupted import CorruptedCrop
from nnssl_ext.data.views import Crop
from nnssl_ext.trainers.recon_contrast import ReconContrastTrainer, corrupt
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import ArrayStore, tiny_store

FAMILIES = ["resenc", "primus"]


class OneSubject(ArrayStore):
    """Every other case is of the same subject."""

    def subject(self, case: int) -> str:
        return "same" if case % 2 else f"subject{case}"


@pytest.fixture(params=FAMILIES)
def trainer(request, tmp_path):
    made = Pair(ReconContrastTrainer, request.param).trainer(tmp_path, batch_size=4)
    made.initialize()
    made.model.eval()
    return made


def test_the_total_is_the_error_times_one_plus_the_contrast_and_so_are_its_derivatives(trainer):
    losses = trainer.step(trainer.model, first_batch(trainer))
    error, contrast = losses["reconstruction"], losses["contrast"]
    by_error, by_contrast = torch.autograd.grad(losses["total"], (error, contrast), retain_graph=True)
    assert losses["total"].item() == pytest.approx(error.item() * (1 + contrast.item()), rel=1e-6)
    assert by_error.item() == pytest.approx(1 + contrast.item(), rel=1e-6) and by_contrast.item() == error.item() > 0


def test_the_contrast_is_finite_at_its_default_temperature_where_exponentials_are_not(trainer):
    batch = first_batch(trainer)
    losses = trainer.step(trainer.model, batch)
    losses["total"].backward()
    assert trainer.config.temperature == 0.005 and all(bool(loss.isfinite()) for loss in losses.values())
    assert all(bool(p.grad.isfinite().all()) for p in trainer.model.parameters() if p.grad is not None)
    flat = F.normalize(trainer.model(batch["image_0"].image).flatten(1), dim=1)
    assert not (flat @ flat.T / 0.005).exp().isfinite().all()  # what the plain formula would divide by


def test_only_the_first_reconstruction_is_compared_with_the_crop(trainer):
    batch = first_batch(trainer)
    losses = trainer.step(trainer.model, batch)
    assert losses["reconstruction"].item() == pytest.approx((trainer.model(batch["image_0"].image) - batch["target"].image).abs().mean().item(), rel=1e-5)
    noisy = {**batch, "image_1": replace(batch["image_1"], image=torch.randn_like(batch["image_1"].image))}
    changed = trainer.step(trainer.model, noisy)
    assert changed["reconstruction"] == losses["reconstruction"] and changed["contrast"] != losses["contrast"]


def test_crops_of_one_subject_are_not_negatives_of_each_other(tmp_path):
    made = Pair(ReconContrastTrainer, "primus").trainer(tmp_path, batch_size=4, temperature=0.5, store=OneSubject(8, (20, 24, 22)))
    made.initialize()
    batch = first_batch(made)
    alone, apart = ({name: replace(view, cases=cases) for name, view in batch.items()} for cases in ((1, 3, 5, 7), (0, 2, 4, 6)))
    some = {name: replace(view, cases=(0, 1, 3, 2)) for name, view in batch.items()}
    losses = [made.step(made.model.eval(), b)["contrast"].item() for b in (alone, some, apart)]
    assert losses[0] == 0 < losses[1] < losses[2]


def test_both_corruptions_are_of_one_clean_crop_and_differ():
    store = tiny_store()
    views = CorruptedCrop(Crop((16, 16, 16)), corrupt, versions=2).sample(store, 0, sample_rng(0, 0))
    clean = Crop((16, 16, 16)).sample(store, 0, sample_rng(0, 0))["image"]
    assert np.array_equal(views["target"].image, clean.image) and all(np.array_equal(view.affine, clean.affine) for view in views.values())
    assert not np.array_equal(views["image_0"].image, views["image_1"].image)


def test_half_of_the_corruptions_drop_boxes_and_half_keep_them_and_four_fifths_are_shuffled():
    image = np.broadcast_to(np.linspace(0, 1, 48, dtype=np.float32)[:, None, None], (1, 48, 48, 48)).copy()
    levels = {value: place for place, value in enumerate(image[0, :, 0, 0].tolist())}
    rng, dropped, shuffled, times = np.random.default_rng(0), 0, 0, 400
    for _ in range(times):
        found = corrupt(image, rng)
        real = np.vectorize(levels.get, otypes=[float])(found[0, :, ::4, ::4], np.nan)
        dropped += np.isnan(real).mean() < 0.45
        shuffled += bool((np.abs(real - np.arange(48)[:, None, None])[~np.isnan(real)] > 0).any())
    for count, share in ((dropped, 0.5), (shuffled, 0.8)):
        assert abs(count - share * times) < 4 * (times * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("channels, patch", [(1, (8, 16, 24)), (4, (48, 40, 56))], ids=str)
def test_corruption_keeps_shape_type_and_range_and_leaves_the_crop_as_it_is(channels, patch):
    rng = np.random.default_rng(1)
    image = rng.standard_normal((channels, *patch), np.float32)
    before = image.copy()
    for _ in range(10):
        found = corrupt(image, rng)
        assert found.shape == image.shape and found.dtype == np.float32 and np.isfinite(found).all()
        assert before.min() <= found.min() and found.max() <= before.max() and not np.array_equal(found, image)
    assert np.array_equal(image, before)


def test_a_batch_of_one_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="ReconContrastTrainer compares samples and needs two") as error:
        Pair(ReconContrastTrainer, "primus").trainer(tmp_path, batch_size=1)
    assert len(str(error.value).splitlines()) <= 3
