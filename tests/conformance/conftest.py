"""One thread and no pictures: the same numbers everywhere, in little time."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact(undrawn):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
