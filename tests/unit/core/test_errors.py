import pickle

import pytest

from nnssl_ext.core.errors import UserError, did_you_mean


def test_an_error_says_what_where_and_fix_in_three_lines():
    text = str(UserError("it broke", "/some/file", "mend it"))
    assert text == "it broke\n  where: /some/file\n  fix: mend it"


def test_empty_parts_of_an_error_are_left_out():
    assert str(UserError("it broke")) == "it broke"
    assert str(UserError("it broke", fix="mend it")) == "it broke\n  fix: mend it"


def test_an_error_survives_the_way_back_from_a_worker_process():
    error = pickle.loads(pickle.dumps(UserError("it broke", "there", "mend it")))
    assert (error.what, error.where, error.fix) == ("it broke", "there", "mend it")
    assert str(error) == "it broke\n  where: there\n  fix: mend it"


@pytest.mark.parametrize(
    ("name", "closest"), [("MEATrainer", "MAETrainer"), ("maetrainer", "MAETrainer"), ("3dfullres", "3d_fullres"), ("simclrtrainer", "SimCLRTrainer")]
)
def test_a_misspelt_name_gets_the_closest_one(name, closest):
    assert did_you_mean(name, ["MAETrainer", "SimCLRTrainer", "3d_fullres", "3d_lowres"]) == f"did you mean '{closest}'?"


def test_a_name_like_no_other_lists_what_is_known_in_order():
    assert did_you_mean("zzzz", ["beta", "alpha"]) == "known: alpha, beta"


def test_no_more_than_twelve_names_are_listed():
    text = did_you_mean("zzzz", [f"name{i:02d}" for i in range(13)])
    assert text.endswith("name11, ...")
    assert text.count("name") == 12


def test_nothing_known_is_said_plainly():
    assert did_you_mean("anything", []) == "none is known"
