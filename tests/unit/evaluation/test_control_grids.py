"""Means of displacements on control grids against plain loops."""

import numpy as np
import pytest
import torch

from nnssl_ext.evaluation.control_grids import ControlGrids, LegacyGrids

SHAPE = (4, 5, 6)


def plain_means(volume, passes, outside):
    """Repeated means over 3^3 cells; `outside` is the value beyond the faces, or None: not counted."""
    for _ in range(passes):
        ends = np.pad(volume, 1, constant_values=np.nan if outside is None else outside)
        volume = np.array([np.nanmean(ends[tuple(slice(i, i + 3) for i in p)]) for p in np.ndindex(*volume.shape)]).reshape(volume.shape)
    return volume


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(
    ("means", "outside"),
    [
        (ControlGrids().smooth, lambda v: None),
        (ControlGrids().relax, lambda v: v.mean()),
        (LegacyGrids().smooth, lambda v: 0.0),
        (LegacyGrids().relax, lambda v: 0.0),
    ],
)
def test_means_are_those_of_plain_loops(means, outside, passes):
    values = np.random.default_rng(0).standard_normal((3, *SHAPE)) + 2
    expected = np.stack([plain_means(v, passes, outside(v)) for v in values])
    np.testing.assert_allclose(means(torch.from_numpy(values)[None], 3, passes)[0].numpy(), expected, atol=1e-12)


def test_a_translation_stays_what_it_is():
    shift = torch.tensor([1.5, -0.25, 3.0], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    torch.testing.assert_close(ControlGrids().relax(shift, 3, 5), shift)
    assert (LegacyGrids().relax(shift, 3, 5)[:, :, 0].abs() < 0.5 * shift[:, :, 0].abs()).all()  # zeros outside draw it down
