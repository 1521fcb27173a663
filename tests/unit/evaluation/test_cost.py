"""Time and memory of a piece of work."""

import time

import numpy as np
import psutil
import pytest

from nnssl_ext.evaluation.cost import Cost


def test_memory_is_the_most_that_was_held_at_any_time():
    before = psutil.Process().memory_info().rss / 1e9
    with Cost() as measured:
        block = np.ones(25_000_000)  # 0.2 GB
        time.sleep(0.05)
        del block
    with Cost() as idle:
        pass
    assert before + 0.15 < measured.figures()["memory_gb"] < before + 0.5
    assert idle.figures()["memory_gb"] < measured.figures()["memory_gb"] - 0.1


def test_waiting_takes_time_but_no_processor():
    with Cost() as measured:
        time.sleep(0.3)
    figures = measured.figures()
    assert figures["seconds"] >= 0.3 and figures["cpu_seconds"] < figures["seconds"]


def test_an_error_ends_the_measurement_and_is_raised():
    with pytest.raises(ValueError, match="broken"), Cost():
        raise ValueError("broken")
