"""The study of second views: what is shuffled, and what stays."""

import torch

from benchmarks.cross_view import VIEWS
from nnssl_ext.data.loader import ViewBatch


def test_another_samples_second_view_comes_with_the_offsets_of_the_true_one():
    images, affine = torch.arange(3.0)[:, None, None, None, None].expand(3, 1, 2, 2, 2), torch.randn(3, 3, 4)
    batch = {name: ViewBatch(images.clone(), None, (5, 6, 7), affine) for name in ("first", "second")}
    found = {name: change(batch) for name, change in VIEWS.items()}
    assert all(torch.equal(views["first"].image, images) for views in found.values())
    assert all(torch.equal(views["second"].affine, affine) and views["second"].cases == (5, 6, 7) for views in found.values())
    assert {name: views["second"].image[:, 0, 0, 0, 0].tolist() for name, views in found.items()} == {
        "true": [0, 1, 2],
        "shuffled": [2, 0, 1],
        "zero": [0, 0, 0],
    }
