"""Every random number of the project: a pure function of (seed, index, stream)."""

from __future__ import annotations

import hashlib

import numpy as np


def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


def sample_rng(seed: int, index: int, stream: str = "view") -> np.random.Generator:
    """An independent generator for one sample.

    Counter-based (Philox): the key holds the seed and the stream, the highest counter word holds the
    index, so that two generators never overlap and none depends on how many were drawn before.

    Args:
        seed: the run's seed, >= 0.
        index: number of the sample, step or case, >= 0.
        stream: what the numbers are for; streams are independent of each other.
    """
    key = np.array([seed, _stream_key(stream)], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def torch_seed(seed: int, index: int, stream: str = "step") -> int:
    """A 63-bit seed for ``torch.manual_seed``; the same function of (seed, index, stream) as `sample_rng`."""
    return int(sample_rng(seed, index, stream).integers(0, 2**63 - 1))
