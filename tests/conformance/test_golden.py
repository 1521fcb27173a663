"""Losses of thirty steps are those of the day they were written down."""

import json

import pytest

from tests.conformance.pairs import METHODS, PAIRS, own_family
from tests.golden.renew import HERE, STEPS, first_loss_in_fp32, losses


def golden(pair):
    file = HERE / f"{pair.method}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    assert pair.family in kept, f"{pair} has no golden losses: python -m tests.golden.renew {pair.method}"
    return kept[pair.family]


@pytest.mark.parametrize("pair", own_family(PAIRS), ids=str)
def test_losses_are_the_golden_ones(pair):
    kept = golden(pair)
    assert len(kept) == STEPS
    hint = f"the losses of {pair} changed; a change that is meant needs a line in CHANGELOG.md, then: python -m tests.golden.renew {pair.method}"
    assert losses(pair) == pytest.approx(kept, rel=1e-6, abs=1e-6), hint
    assert first_loss_in_fp32(pair) == pytest.approx(kept[0], rel=1e-5, abs=1e-5), hint


def test_no_golden_file_is_left_of_a_method_that_is_gone():
    assert {file.stem for file in HERE.glob("*.json")} == set(METHODS)
