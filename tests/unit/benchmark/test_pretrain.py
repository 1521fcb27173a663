"""Pretraining as a unit: noise has nothing of the volumes."""

import numpy as np

from nnssl_ext.benchmark import pretrain
from nnssl_ext.benchmark.pretrain import NoiseStore
from nnssl_ext.preprocessing.store import CaseStore


def test_noise_is_white_always_alike_and_the_same_in_overlapping_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(CaseStore, "__init__", lambda self, folder: None)
    monkeypatch.setattr(CaseStore, "shape", lambda self, case: (16, 20, 24))
    monkeypatch.setattr(CaseStore, "fill", lambda self, case: [0.0, 0.0])
    monkeypatch.setattr(CaseStore, "data_hash", lambda self: "volumes")
    store = NoiseStore(tmp_path)
    whole = store.read(0)
    assert whole.shape == (2, 16, 20, 24) and whole.dtype == np.float32 and abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05
    box = ((2, 10), (4, 12), (0, 24))
    assert np.array_equal(store.read(0, box), whole[:, 2:10, 4:12]) and not np.array_equal(store.read(1), whole)
    assert store.data_hash() == "noise volumes"


def test_noise_is_kept_as_far_as_there_is_room_and_alike_beyond(tmp_path, monkeypatch):
    monkeypatch.setattr(CaseStore, "__init__", lambda self, folder: None)
    monkeypatch.setattr(CaseStore, "shape", lambda self, case: (4, 4, 4))
    monkeypatch.setattr(CaseStore, "fill", lambda self, case: [0.0])
    monkeypatch.setattr(pretrain, "KEPT", 2 * 4**4)
    store = NoiseStore(tmp_path)
    first = [store.read(case) for case in range(3)]
    first[0][:] = 0  # a copy
    assert list(store._kept) == [0, 1] and store.read(0).any()
    assert np.array_equal(store.read(2), first[2]) and np.array_equal(NoiseStore(tmp_path).read(1), first[1])
