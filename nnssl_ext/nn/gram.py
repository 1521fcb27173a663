"""Gram anchoring: late in a training, the similarities between the tokens of a crop stay what they once were.

Shape suffixes: G global crops, N tokens, C width, K tokens that are compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnssl_ext.nn.losses import gram_loss
from nnssl_ext.nn.momentum import MomentumTeacher

TOKENS = 256  # of each crop that are compared, at most


class GramAnchor(MomentumTeacher):
    """A copy of the teacher's backbone that stays as it was taken (`update` with momentum 0); see `gram_loss`.

    Source: Siméoni et al. 2025, arXiv:2508.10104, section 4.
    """

    def loss(self, tokens: Tensor, image: Tensor, mask: Tensor, share: float) -> Tensor:
        """Loss of the student's visible tokens.

        Args:
            tokens: of the student, (G, N, C).
            image: crops, (G, channels, z, y, x); the anchor sees all of them.
            mask: bool (G, d, h, w), True = hidden from the student.
            share: of the tokens of a crop that may be hidden, at most.
        """
        net: Any = self.net
        with torch.no_grad():
            kept = net.tokens(image)
        return gram_loss(tokens, kept, visible_tokens(mask.flatten(1), share))


def visible_tokens(mask: Tensor, share: float) -> Tensor:
    """Random tokens of each crop that are visible, (G, K), of torch's generator.

    Args:
        mask: bool (G, N), True = hidden.
        share: of the N tokens that may be hidden, at most.
    """
    count = mask.shape[1] - math.floor(share * mask.shape[1] + 1e-9)
    return torch.rand(mask.shape, device=mask.device).masked_fill(mask, -1.0).topk(max(1, min(TOKENS, count)), 1).indices
