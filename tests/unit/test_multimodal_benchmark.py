"""The study of what one modality tells of the other: its pairs, its crops, its table."""

from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.multimodal import ALL, NONE, OTHER, SOME, crops_of, judge, table
from benchmarks.pairs import PairedPhantoms
from nnssl_ext.data.sessions import Image, read_sessions


class Model(torch.nn.Module):
    """Predicts the other modality's visible voxels in the same place, 0 where there are none."""

    def forward(self, image, hidden):
        other = image.flatten(2).unflatten(2, (8, -1))[:, [1, 0]]
        return torch.where(hidden[:, [1, 0], :, None], 0.0, other)


def test_pairs_are_of_one_subject_on_one_grid():
    store = PairedPhantoms(range(3), 16, 12.0)
    assert len(store) == 6 and abs(float(store.arrays[3].mean())) < 1e-5 and abs(float(store.arrays[3].std()) - 1) < 1e-3
    assert read_sessions(store).images(2) == {"CT": [Image(2, 0)], "MR": [Image(3, 0)]}
    edges = [np.abs(np.diff(array[0], axis=0)) for array in store.arrays]  # the same anatomy has its edges in the same places
    alike = np.corrcoef([edge.ravel() for edge in edges])
    assert alike[0, 1] > alike[0, 3] and alike[2, 3] > alike[2, 1]


def test_two_opposite_crops_of_each_subject_are_judged():
    store = SimpleNamespace(arrays=np.random.default_rng(0).standard_normal((4, 1, 40, 36, 33), np.float32))
    crops = crops_of(store)
    assert crops.shape == (4, 2, 32, 32, 32)
    assert np.array_equal(crops[2, 1], store.arrays[3, 0, :32, :32, :32]) and np.array_equal(crops[3, 0], store.arrays[2, 0, 8:, 4:, 1:])


def test_a_model_that_copies_the_other_modality_is_seen_to_profit_from_all_of_its_own_subject_most(monkeypatch):
    monkeypatch.setattr("benchmarks.multimodal.normalised_patches", lambda image, grid, token: image.flatten(2).unflatten(2, (8, -1)))
    anatomy = torch.randn(6, 1, 8, 2, 2)
    image, trainer = anatomy.expand(-1, 2, -1, -1, -1), SimpleNamespace(backbone=SimpleNamespace(grid=(2, 2, 2), token=None), model=Model())
    for modality in range(2):
        found = judge(trainer, image, modality)
        assert (found[ALL] == 0).all() and (found[NONE] > found[SOME] - 1e-6).all() and (found[OTHER] > 0).all() and found[NONE].shape == (3,)
        assert found[NONE].mean() > found[SOME].mean() > 0 and found[OTHER].mean() > found[NONE].mean()


def test_the_table_has_medians_ranges_and_for_how_many_subjects_it_helps():
    runs = [[{NONE: np.array([1.0, 1.0 + seed]), SOME: np.ones(2), ALL: np.array([0.5, 1.5]), OTHER: np.ones(2)}] * 2 for seed in range(3)]
    lines = table(runs).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| CT | 1.500 (1.000 to 2.000) | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) |") and lines[3].endswith("| 1, 2, 2 of 2 |")
