"""MIND-SSC against its definition."""

import numpy as np
import torch

from nnssl_ext.evaluation.mind import PAIRS, SIX, mind_ssc


def by_loops(image, radius, dilation):
    """Voxel by voxel, in double precision."""
    last = np.array(image.shape) - 1

    def patch(centre, neighbour):
        """Mean squared differences need the neighbour's intensity at every voxel of the window that lies inside."""
        offsets = np.ndindex(*[2 * radius + 1] * 3)
        places = [np.array(centre) + np.array(o) - radius for o in offsets]
        places = [p for p in places if (p >= 0).all() and (p <= last).all()]
        return np.array([image[tuple(np.clip(p + dilation * np.array(neighbour), 0, last))] for p in places])

    apart = np.zeros((12, *image.shape))
    for centre in np.ndindex(*image.shape):
        for number, (a, b) in enumerate(PAIRS):
            apart[(number, *centre)] = ((patch(centre, SIX[a]) - patch(centre, SIX[b])) ** 2).mean()
    apart -= apart.min(0)
    variance = apart.mean(0)
    return np.exp(-apart / variance.clip(1e-3 * variance.mean(), 1e3 * variance.mean()))


def test_the_descriptor_is_that_of_plain_loops():
    image = np.random.default_rng(0).standard_normal((4, 5, 3))
    found = mind_ssc(torch.from_numpy(image), 1, 2)
    assert found.shape == (12, 4, 5, 3)
    np.testing.assert_allclose(found.numpy(), by_loops(image, 1, 2), rtol=1e-9)


def test_there_are_twelve_pairs_of_neighbours_at_the_square_root_of_two():
    apart = {sum((p - q) ** 2 for p, q in zip(SIX[a], SIX[b])) for a, b in PAIRS}
    assert len(PAIRS) == len(set(PAIRS)) == 12 and apart == {2} and all(sum(map(abs, neighbour)) == 1 for neighbour in SIX)


def test_scale_offset_and_sign_of_the_intensities_do_not_matter():
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 8, 8)))
    torch.testing.assert_close(mind_ssc(-250 * image + 40), mind_ssc(image))


def test_a_flat_image_has_finite_descriptors():
    assert mind_ssc(torch.full((6, 6, 6), 3.0)).isfinite().all()
