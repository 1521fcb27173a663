"""Functions over voxels as machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_FLAGS = {"nnan", "nsz", "contract", "reassoc"}  # what it takes to vectorise; there are no NaNs


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code for one thread, kept on disk where there is a folder to write to (else made anew in every process)."""
    try:
        return numba.njit(function, cache=True, nogil=True, fastmath=_FLAGS, error_model="numpy")  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(function, nogil=True, fastmath=_FLAGS, error_model="numpy")  # type: ignore[no-any-return]
