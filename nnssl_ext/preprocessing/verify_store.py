"""Compare a preprocessed store with its recorded hashes."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from nnssl_ext.preprocessing.parallel import Workers, run_all
from nnssl_ext.preprocessing.store import CaseStore


def verify_store(folder: Path, workers: Workers) -> dict[str, str]:
    """Read every file of a store and compare it with its SHA-256.

    Returns:
        messages of the damaged cases, by identifier.

    Raises:
        UserError: the store has no cases.
    """
    names = CaseStore(folder).identifiers
    title = f"verifying {folder.parent.name} {folder.name}"
    return run_all(partial(_verify, folder=folder), list(range(len(names))), names, workers, title)[1]


def _verify(case: int, folder: Path) -> None:
    _store(folder).verify(case)


@cache
def _store(folder: Path) -> CaseStore:
    """Opened once by each process."""
    return CaseStore(folder)
