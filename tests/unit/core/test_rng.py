import subprocess
import sys

import numpy as np
import pytest

from nnssl_ext.core.rng import sample_rng, torch_seed

FROZEN, FROZEN_SEED = [2600492476, 1405555393, 2239408980], 7763191393346609490  # a change breaks the continuation of every run


def test_the_same_arguments_give_the_same_numbers():
    assert np.array_equal(sample_rng(3, 7, "view").random(100), sample_rng(3, 7, "view").random(100))


@pytest.mark.parametrize("other", [(4, 7, "view"), (3, 8, "view"), (3, 7, "mask")])
def test_seed_index_and_stream_each_change_the_numbers(other):
    assert not np.intersect1d(sample_rng(3, 7, "view").integers(0, 2**63, 1000), sample_rng(*other).integers(0, 2**63, 1000)).size


def test_what_was_drawn_before_does_not_matter():
    first = sample_rng(0, 5).random(10)
    for index in range(5):
        sample_rng(0, index).random(1000)
    assert np.array_equal(sample_rng(0, 5).random(10), first)


def test_neighbouring_indices_are_uncorrelated():
    draws = np.stack([sample_rng(0, index).standard_normal(4000) for index in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def test_the_first_number_is_uniform_over_indices():
    first = np.sort([sample_rng(0, index).random() for index in range(4000)])
    assert np.abs(first - np.arange(4000) / 4000).max() < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov, 1 %


def test_the_numbers_are_the_same_in_another_process():
    code = "from nnssl_ext.core.rng import sample_rng, torch_seed; print(sample_rng(1, 2, 'x').integers(0, 2**62), torch_seed(1, 2))"
    for hash_seed in ("0", "1"):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": "."})
        assert out.stdout.split() == [str(sample_rng(1, 2, "x").integers(0, 2**62)), str(torch_seed(1, 2))]


def test_the_numbers_are_frozen():
    assert sample_rng(0, 0, "view").integers(0, 2**32, 3).tolist() == FROZEN
    assert torch_seed(0, 0) == FROZEN_SEED


def test_large_seeds_and_indices_are_accepted():
    assert sample_rng(2**63, 2**63).random() != sample_rng(2**63, 2**63 - 1).random()


def test_a_torch_seed_fits_into_63_bits():
    seeds = [torch_seed(0, index) for index in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
