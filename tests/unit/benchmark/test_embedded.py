"""The data of the embedded suite: what is true of them is known."""

import numpy as np
import SimpleITK as sitk

from nnssl_ext.benchmark.embedded import CLASSES, PAIRS, PHANTOM_TASKS, write_tasks
from nnssl_ext.benchmark.suite import Generator
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation.classification import read_labels
from nnssl_ext.evaluation.phantom import make_pair
from nnssl_ext.evaluation.placement import to_index
from nnssl_ext.evaluation.registration_metrics import landmark_errors
from nnssl_ext.evaluation.registration_pairs import read_keypoints, read_pairs

SMALL = Generator(lesions=4, pairs=1, size=32, spacing=6.0)


def test_lesions_are_of_two_kinds_and_pairs_have_their_landmarks(tmp_path):
    assert write_tasks(tmp_path, SMALL, 1) == PHANTOM_TASKS
    folder = tmp_path / PHANTOM_TASKS
    lines = read_labels(folder / CLASSES)
    assert [line.label for line in lines] == ["benign", "malignant"] * 2 and len({line.subject for line in lines}) == 4
    assert all((folder / "images" / f"{line.case}.nii.gz").is_file() for line in lines)
    (pair,) = read_pairs(folder / PAIRS)
    truth = make_pair(0, 500_000, (32,) * 3, (6.0,) * 3, ("CT", "CT"), 18.0)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(pair.labels[0]))), truth.fixed.labels)
    grid = Geometry((32,) * 3, (6.0,) * 3)
    fixed, moving = (to_index(read_keypoints(path), grid) for path in pair.keypoints)
    assert landmark_errors(fixed, moving, np.zeros((3, 32, 32, 32)), (6.0,) * 3).mean() > 2  # mm, before any registration
    assert landmark_errors(fixed, moving, truth.displacement / 6, (6.0,) * 3).max() < 0.01  # the true field brings them together


def test_what_is_written_is_kept(tmp_path):
    write_tasks(tmp_path, SMALL, 1)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / PHANTOM_TASKS).rglob("*")}
    write_tasks(tmp_path, SMALL, 1)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / PHANTOM_TASKS).rglob("*")}
