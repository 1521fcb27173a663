"""Data set 803: registered CT and MR images and follow-up scans of phantoms."""

import dataclasses

import numpy as np
import pytest

from nnssl_ext.core.paths import preprocessed_folder
from nnssl_ext.core.plan import Normalization
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.multimodal import MaskedVisit
from nnssl_ext.data.sessions import Image, read_sessions
from nnssl_ext.data.views import Crop
from nnssl_ext.evaluation.demo_pairs import PHANTOM_PAIRS, write_dataset_803
from nnssl_ext.evaluation.phantom import make_pair, make_phantom
from nnssl_ext.io.readers import read_volume
from nnssl_ext.preprocessing.parallel import Workers
from nnssl_ext.preprocessing.preprocessor import preprocess
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_data import tiny_plan

GRID = {"shape": (32,) * 3, "spacing": (6.0,) * 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Root of the data, with raw and preprocessed images of two subjects."""
    root = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnssl_raw", "nnssl_preprocessed", "nnssl_results"):
            patch.setenv(name, str(root / name))
        assert write_dataset_803(root / "nnssl_raw", count=2, size=32, spacing=6.0)["written"]
        assert not write_dataset_803(root / "nnssl_raw", count=2, size=32, spacing=6.0)["written"]
        plan = tiny_plan()
        config = dataclasses.replace(plan.configuration("3d_fullres"), spacing=(6.0,) * 3, normalization=dict.fromkeys(("CT", "MR"), Normalization("zscore")))
        plan = dataclasses.replace(plan, configurations={"3d_fullres": config})
        assert preprocess(PHANTOM_PAIRS, plan, "3d_fullres", Workers(1)) == {}
        yield root / "nnssl_raw" / PHANTOM_PAIRS / "images", CaseStore(preprocessed_folder(PHANTOM_PAIRS) / config.data_identifier)


def volume(folder, name):
    return read_volume(folder / f"phantom_0001_{name}.nii.gz")[0]


def test_both_modalities_show_the_same_anatomy_and_the_follow_up_shows_it_deformed_as_told(written):
    ct, mr, later = (volume(written[0], name) for name in ("visit_0_CT", "visit_0_MR", "visit_1_CT"))
    pair = make_pair(0, 300_001, **GRID, modalities=("CT", "CT"), max_mm=9.0)
    first, other = pair.moving, make_phantom(0, 300_001, **GRID, modality="MR")
    assert np.array_equal(first.labels, other.labels)
    assert np.array_equal(ct, np.rint(first.image)) and np.array_equal(mr, np.rint(other.image)) and np.array_equal(later, np.rint(pair.fixed.image))
    assert 0.02 < (pair.fixed.labels != first.labels).mean() < 0.1 and 5.0 < np.linalg.norm(pair.displacement, axis=0).max() <= 9.0 + 1e-3


def test_pairs_and_follow_ups_are_found_in_the_preprocessed_store(written):
    sessions = read_sessions(written[1])
    assert len(sessions.identifiers) == 6 and len(set(sessions.subjects)) == 2
    sessions.check_pairs("SomeTrainer", PHANTOM_PAIRS)
    for case, (session, modality) in enumerate(zip(sessions.sessions, (names[0] for names in sessions.modalities))):
        others = [o for o in range(6) if sessions.subjects[o] == sessions.subjects[case] and o != case]
        same = [o for o in others if sessions.sessions[o] == session]
        assert sessions.images(case) == {sessions.modalities[o][0]: [Image(o, 0)] for o in (case, *same)}
        wanted = [o for o in others if o not in same and modality == "CT" and sessions.modalities[o] == ("CT",)]
        assert sessions.follow_ups(case) == wanted and len(same) == (session == "visit_0")


def test_crops_of_a_pair_are_slices_of_the_same_voxels(written):
    store = written[1]
    sessions = read_sessions(store)
    case = sessions.modalities.index(("MR",))
    views = MaskedVisit(Crop((16, 16, 16), body=0.0), sessions, ("CT", "MR"), (4, 4, 4), 21).sample(store, case, sample_rng(0, 0))
    assert np.array_equal(views["CT"].affine, views["MR"].affine) and views["CT"].case == sessions.images(case)["CT"][0].case
    body = store.info(case)["body_box"]
    assert body == store.info(views["CT"].case)["body_box"] and store.shape(case) == store.shape(views["CT"].case)
