"""Trilinear interpolation on the grid of a crop."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import affine_transform

from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.interpolate import interpolate
from nnssl_ext.data.spatial import make_affine, rotation_matrix
from nnssl_ext.data.views import read_crops
from tests.make_data import ArrayStore


def plain(source: np.ndarray, affine: np.ndarray, size) -> np.ndarray:
    """The same by a loop over voxels and corners; the edge continues."""
    out = np.zeros((len(source), *size))
    for voxel in np.ndindex(*size):
        place = np.clip(affine @ [*voxel, 1], 0, np.array(source.shape[1:]) - 1)
        for corner in itertools.product((0, 1), repeat=3):
            index = np.minimum(np.floor(place) + corner, np.array(source.shape[1:]) - 1).astype(int)
            weight = np.prod(np.where(corner, place % 1, 1 - place % 1))
            out[(slice(None), *voxel)] += weight * source[(slice(None), *index)]
    return out


def random_affine(index: int, size, shape) -> np.ndarray:
    rng = sample_rng(0, index)
    center = [rng.uniform(-2, n + 1) for n in shape]
    return make_affine(center, size, rng.uniform(0.5, 4, 3), rotation_matrix(rng.uniform(-180, 180, 3)), rng.uniform(0.5, 2, 3), rng.integers(0, 2, 3))


@pytest.mark.parametrize("shape", [(9, 11, 8), (1, 7, 6), (5, 1, 1)])
def test_interpolation_equals_a_plain_loop_over_corners(shape):
    source = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    for i in range(10):
        affine = random_affine(i, (5, 4, 6), shape)
        assert np.abs(interpolate(source, affine, (5, 4, 6)) - plain(source, affine, (5, 4, 6))).max() < 2e-5


def test_crops_equal_scipy_with_background_around_the_case():
    store = ArrayStore(1, shape=(20, 22, 18), channels=2)
    for i in range(10):
        affine = random_affine(i, (12, 13, 14), store.shape(0))
        image = read_crops(store, 0, [affine], [(12, 13, 14)])[0]
        for channel, values in enumerate(store.arrays[0]):
            fill = store.fill(0)[channel]
            expected = affine_transform(values.astype(float), affine[:, :3], affine[:, 3], (12, 13, 14), order=1, mode="grid-constant", cval=fill)
            assert np.abs(image[channel] - expected).max() < 1e-4


def test_the_identity_returns_the_volume_itself():
    source = np.random.default_rng(1).standard_normal((1, 6, 5, 7)).astype(np.float32)
    assert np.abs(interpolate(source, np.eye(3, 4), (6, 5, 7)) - source).max() < 1e-6


def test_without_a_folder_to_write_to_it_is_compiled_in_memory():
    code = (
        "import numpy as np; from nnssl_ext.data.interpolate import interpolate; print(interpolate(np.ones((1, 2, 2, 2), 'f'), np.eye(3, 4), (1, 1, 1)).item())"
    )
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "", "NUMBA_CACHE_DIR": "/dev/null/nowhere"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "1.0", done.stderr
