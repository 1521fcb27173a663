"""Arrays as blosc2 files that are read box by box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.core.files import atomic_path


def blosc2() -> Any:
    """The library, imported with the first case: it takes half a second, and no command should wait for it before it says what it does."""
    import blosc2

    return blosc2


def compress(array: np.ndarray, patch_size: Sequence[int]) -> bytes:
    """Content of the file of an array (C, z, y, x); chunks have the size of a training patch (z, y, x), blocks a quarter of its edges."""
    chunks = (1, *(min(n, p) for n, p in zip(array.shape[1:], patch_size)))
    blocks = (1, *(min(n, max(8, p // 4)) for n, p in zip(chunks[1:], patch_size)))
    library = blosc2()
    parameters = library.CParams(codec=library.Codec.LZ4, clevel=5, nthreads=1)  # read two to three times as fast as ZSTD
    content: bytes = library.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=parameters).to_cframe()
    return content


def write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # not by blosc2, which doesn't say that the disk is full


def open_array(path: Path) -> Any:
    """The array in a file, of which only blocks that are indexed are decompressed."""
    library = blosc2()
    return library.open(str(path), mode="r", dparams=library.DParams(nthreads=1))
