"""Input projections for another number of channels."""

from __future__ import annotations

from torch import Tensor


def repeat_channels(weight: Tensor, channels: int) -> Tensor:
    """An input projection for another number of channels.

    Every new channel gets the sum over the old ones, divided by the number of new ones: an image repeated over all
    channels is answered as before. For 1 -> C this is the weight repeated C times and divided by C.

    Args:
        weight: (out, old channels, z, y, x).
        channels: new channels.

    Returns:
        (out, channels, z, y, x).
    """
    repeats = [1, channels] + [1] * (weight.ndim - 2)
    return weight.sum(1, keepdim=True).repeat(repeats) / channels
