"""Pictures of clusters: their colours, what is dark, and through where they are cut."""

import numpy as np
import torch

from nnssl_ext.trainers.cluster_pictures import DARK, cluster_rows
from nnssl_ext.trainers.colours import cluster_rgb
from nnssl_ext.trainers.pictures import blend, draw_volumes


def made(shared):
    image, clusters = torch.rand(2, 2, 4, 6, 8), torch.randn(2, 5, 2, 3, 4)
    return image, clusters, cluster_rows({"first": (image, clusters, shared), "second": (image.flip(0), clusters, ~shared)})


def test_slices_lie_in_the_middle_of_what_is_shared_and_are_dark_elsewhere():
    shared = torch.zeros(2, 4, 6, 8, dtype=torch.bool)
    shared[:, 2:, 1:4, 4:] = True
    image, clusters, rows = made(shared)
    assert [list(row) for row in rows] == [["first", "second", "first, clusters", "second, clusters"]] * 2
    for sample, row in enumerate(rows):
        factor = np.where(shared[sample].numpy(), 1, DARK)[..., None]
        bright = blend(image[sample, 0].numpy(), cluster_rgb(clusters)[sample]) * factor
        for found, expected in zip(row["first, clusters"], (bright[2], bright[:, 2], bright[:, :, 5])):
            np.testing.assert_allclose(found, expected)
        grey = row["first"][0]
        assert grey.shape == (6, 8, 3) and (grey[..., 0] == grey[..., 1]).all() and (grey[0] <= DARK).all() and (grey[1:4, 4:] > DARK).any()


def test_crops_that_share_nothing_are_cut_in_their_middle_and_the_rows_can_be_drawn(tmp_path):
    _, _, rows = made(torch.zeros(2, 4, 6, 8, dtype=torch.bool))
    assert [cut.shape for cut in rows[0]["first"]] == [(6, 8, 3), (4, 8, 3), (4, 6, 3)]
    assert all((cut <= DARK).all() for cut in rows[0]["first"]) and any((cut > DARK).any() for cut in rows[0]["second"])
    draw_volumes(rows, tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").stat().st_size > 0
