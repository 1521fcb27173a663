import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation import torso


@pytest.fixture(scope="session")
def scans():
    """The real scans in the cache; skips where the cache is empty and the network is off."""
    if not torso.is_cached():
        try:
            for name in torso.SCANS:
                torso.load_scan(name)
        except UserError as error:
            if not error.what.startswith("could not download"):
                raise
            pytest.skip(f"the cache is empty and the scans cannot be fetched: {error.what}")
