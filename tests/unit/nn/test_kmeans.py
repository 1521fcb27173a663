"""K-means: against scikit-learn's from the same centres, plain loops, and clusters that are known."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.nn import assign
from nnssl_ext.nn.kmeans import TOLERANCE, kmeans, lloyd, nearest, plus_plus


def samples(count=3000, dimensions=7, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dimensions)) * rng.uniform(0.5, 2, dimensions) + rng.integers(0, 3, (count, 1))
    return torch.from_numpy(x - x.mean(0)).to(dtype)


def blobs(classes=6, each=50, dimensions=5):
    rng = np.random.default_rng(1)
    middles = 20 * np.concatenate((np.eye(dimensions), -np.eye(dimensions)))[:classes]
    labels = rng.permutation(np.repeat(np.arange(classes), each * np.arange(1, classes + 1)))
    return torch.from_numpy(middles[labels] + rng.normal(size=(len(labels), dimensions))), labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [1, 2, 9])
def test_inertia_and_centres_are_those_of_scikit_learn_from_the_same_initial_centres(classes, seed):
    x = samples(seed=seed)
    start = plus_plus(x, classes, sample_rng(seed, 0))
    theirs = KMeans(classes, init=start.numpy(), n_init=1, tol=TOLERANCE, algorithm="lloyd").fit(x.numpy())
    ours = lloyd(x, start)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)
    counts = np.bincount(theirs.labels_, minlength=classes)
    assert ours.counts.tolist() == sorted(counts.tolist(), reverse=True)
    np.testing.assert_allclose(ours.centres, theirs.cluster_centers_[np.argsort(-counts, kind="stable")], atol=1e-8)


def test_single_precision_gives_nearly_the_same():
    x = samples()
    start = plus_plus(x, 5, sample_rng(0, 0))
    assert lloyd(x.float(), start.float()).inertia == pytest.approx(lloyd(x, start).inertia, rel=1e-4)


def test_separable_blobs_are_found_the_largest_first():
    x, labels = blobs()
    found = kmeans(x, 6, sample_rng(0, 0))
    assert found.counts.tolist() == [300, 250, 200, 150, 100, 50]
    assert np.array_equal(nearest(x, found.centres).numpy(), 5 - labels)
    assert found.inertia == pytest.approx(sum(float(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum()) for k in range(6)))


def test_no_start_is_better_than_the_one_that_is_returned():
    x = samples(600)
    rng = sample_rng(3, 0)
    each = [lloyd(x, plus_plus(x, 12, rng)).inertia for _ in range(4)]
    assert kmeans(x, 12, sample_rng(3, 0), starts=4).inertia == min(each) < max(each)


def test_all_samples_count_in_every_iteration_in_whatever_order_and_however_many_at_once(monkeypatch):
    x = samples(400)
    start, shuffled = plus_plus(x, 4, sample_rng(0, 0)), np.random.default_rng(0).permutation(len(x))
    one = lloyd(x, start)
    monkeypatch.setattr(assign, "ELEMENTS", 70)  # ten samples at a time
    for other in (lloyd(x, start), lloyd(x[shuffled], start), lloyd(x.flip(0), start)):
        torch.testing.assert_close(other.centres, one.centres)
        assert other.inertia == pytest.approx(one.inertia, rel=1e-12) and torch.equal(other.counts, one.counts)
    torch.testing.assert_close(
        one.centres, torch.stack([x[nearest(x, one.centres) == k].mean(0) for k in range(4)]), rtol=0, atol=0.05
    )  # not those of the last ten


def test_the_nearest_centre_is_that_of_a_plain_loop():
    x, centres = samples(50), samples(8, seed=5)
    assert nearest(x, centres).tolist() == [min(range(8), key=lambda k: float(((row - centres[k]) ** 2).sum())) for row in x]


def test_first_centres_are_different_samples_and_drawn_in_proportion_to_their_squared_distance():
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [3.0]])
    second = []
    for seed in range(3000):
        chosen = plus_plus(x, 2, sample_rng(seed, 0))
        assert chosen[0] != chosen[1]
        if chosen[0] == 0:
            second.append(float(chosen[1]))
    assert 0.08 < np.mean([value == 1 for value in second]) < 0.12  # 1 / (1 + 9)


def test_fewer_different_samples_than_clusters_are_refused_and_as_many_are_their_own_centres():
    x = torch.tensor([[0.1, 0.2], [3.3, 4.7]]).repeat(20, 1)
    with pytest.raises(UserError, match="only 2 different samples for 3 clusters"):
        plus_plus(x, 3, sample_rng(0, 0))
    found = kmeans(x, 2, sample_rng(0, 0))
    assert found.inertia == pytest.approx(0, abs=1e-9) and found.counts.tolist() == [20, 20]


def test_a_centre_without_samples_stays_where_it_is():
    found = lloyd(torch.tensor([[0.0], [0.2], [1.0]]), torch.tensor([[0.0], [1.0], [50.0]]))
    assert found.counts.tolist() == [2, 1, 0] and found.centres.flatten().tolist() == pytest.approx([0.1, 1.0, 50.0])
