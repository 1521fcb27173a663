"""Pictures and colours against plain computations."""

import numpy as np
import pytest
import torch
from PIL import Image

from nnssl_ext.trainers import pictures
from nnssl_ext.trainers.colours import cluster_rgb, label_colour, label_rgb, pca_rgb
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.pictures import MARGIN, TILE, blend, draw_run, draw_volumes, enlarge
from tests.make_data import ArrayStore, make_plan


def oracle(features):
    """PCA by singular value decomposition, one token after the other."""
    tokens = np.array([features[b, :, z, y, x] for b in range(len(features)) for z, y, x in np.ndindex(features.shape[2:])], float)
    tokens -= tokens.mean(0)
    _, _, directions = np.linalg.svd(tokens, full_matrices=False)
    colours = np.empty((len(tokens), 3))
    for k in range(3):
        direction = directions[k] * np.sign(directions[k][np.abs(directions[k]).argmax()])
        values = tokens @ direction
        low, high = np.percentile(values, (1, 99))
        colours[:, k] = np.clip((values - low) / (high - low), 0, 1)
    return colours.reshape(len(features), *features.shape[2:], 3)


def test_colours_are_the_first_three_principal_components():
    features = np.random.default_rng(0).standard_normal((2, 6, 3, 4, 5)) * np.array([5, 4, 3, 2, 1, 0.5])[:, None, None, None]
    np.testing.assert_allclose(pca_rgb(torch.from_numpy(features)), oracle(features), atol=1e-5)


def test_colours_do_not_depend_on_the_sign_or_scale_in_which_the_axes_come():
    features = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    first = pca_rgb(features)
    np.testing.assert_array_equal(first, pca_rgb(features))
    np.testing.assert_allclose(first, pca_rgb(3 * features + 7), atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_what_does_not_vary_is_grey(channels):
    assert (pca_rgb(torch.full((1, channels, 2, 2, 2), 3.0)) == 0.5).all()
    one = torch.zeros(1, channels, 2, 2, 2)
    one[:, 0, 0] = 1.0
    colours = pca_rgb(one)
    assert set(np.unique(colours[..., 0])) == {0.0, 1.0} and (colours[..., 1:] == 0.5).all()


def test_clusters_have_the_colour_of_the_likeliest():
    assignments = torch.zeros(1, 5, 2, 1, 1)
    assignments[0, 3, 0], assignments[0, 1, 1] = 1.0, 1.0
    colours = cluster_rgb(assignments)
    np.testing.assert_allclose(colours[0, :, 0, 0], [label_colour(3), label_colour(1)], atol=1e-6)
    assert len({label_colour(number) for number in range(64)}) == 64


def test_numbers_of_clusters_have_the_colours_of_their_probabilities_and_0_is_black():
    labels = np.random.default_rng(0).integers(0, 6, (3, 4, 5))
    likely = torch.nn.functional.one_hot(torch.from_numpy(labels).clamp_min(1) - 1, 5).movedim(-1, 0)[None]
    np.testing.assert_array_equal(label_rgb(labels), np.where(labels[..., None] > 0, cluster_rgb(likely)[0], 0))
    assert label_rgb(np.zeros((2, 2), int)).max() == 0


def test_cells_are_enlarged_to_their_voxels():
    grid = np.arange(8).reshape(2, 2, 2)
    voxels = enlarge(grid, (4, 5, 2))
    for z, y, x in np.ndindex(4, 5, 2):
        assert voxels[z, y, x] == grid[z // 2, y // 3, x]


def test_the_image_stays_visible_below_the_colours():
    image = np.linspace(0, 1, 64).reshape(4, 4, 4)
    colours = np.ones((2, 2, 2, 3))
    assert blend(image, colours)[0, 0, 0].mean() < blend(image, colours)[3, 3, 3].mean()
    assert (0 <= blend(image, colours)).all() and (blend(image, colours) <= 1).all()


def test_slices_are_drawn_in_proportion_to_millimetres_with_the_head_up(tmp_path):
    volume = np.zeros((10, 40, 40), np.float32)
    volume[5:] = 1.0  # the upper half
    draw_volumes([{"crop": volume}], tmp_path / "p.png", spacing=(2.0, 1.0, 1.0))
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("L")).astype(int)
    coronal = pixels[-TILE - 6 : -6, MARGIN + TILE + 4 : MARGIN + 2 * TILE + 4]
    rows = np.flatnonzero((coronal < 128).mean(1) > 0.9)  # the dark half
    assert len(rows) == pytest.approx(TILE / 4, abs=2)  # 20 of 40 mm high, half of it dark
    assert rows.min() > TILE / 2 - 2  # below


@pytest.mark.parametrize("family", ["resenc", "primus", "segformer3d"])
@pytest.mark.parametrize("own", [True, False])
def test_every_method_has_a_picture_that_is_small_and_changes_nothing(family, own, tmp_path, monkeypatch):
    config = MAETrainer.Config(epochs=1, iterations=1, batch_size=3, workers=0)
    trainer = MAETrainer(make_plan(), "3d_fullres", config, ArrayStore(), tmp_path, family=family)
    trainer.initialize()
    shown = {}
    draw = pictures.draw_volumes
    monkeypatch.setattr(pictures, "draw_volumes", lambda rows, *rest: (shown.update(rows[0]), draw(rows, *rest)))
    if not own:
        monkeypatch.setattr(MAETrainer, "picture", lambda self, batch: [])
    batch = trainer._dataset(trainer.train_cases, "train")[0]
    trainer.model.train()
    trainer.backbone.eval()
    modes, state = [m.training for m in trainer.model.modules()], torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    draw_run(trainer, batch, tmp_path / "picture.png")
    assert list(shown) == (["crop", "visible", "reconstruction"] if own else ["image", "image, visible"]) + ["features (PCA)"]
    assert (tmp_path / "picture.png").stat().st_size < 400_000
    assert [m.training for m in trainer.model.modules()] == modes and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert max(trainer.backbone.dense_stride) <= 8
