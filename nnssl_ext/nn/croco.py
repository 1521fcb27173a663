"""Cross-view completion: an encoder for two views, and a decoder that fills in one of them beside the other.

Shape suffixes: B batch, N tokens, K hidden tokens, P values of a token's voxels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.cross_attention import CrossAttentionBlock
from nnssl_ext.nn.places import sine_cosine
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.tokens import block_moments, gather, patchify, split_tokens, unpatchify

HEAD_WIDTH = 32  # channels per attention head of the decoder, as in the source


class CroCo(nn.Module):
    """One encoder for both views; a decoder whose blocks attend to the first view's tokens and then to the second's; a linear layer to voxels.

    The decoder knows where tokens lie by places in mm alone, so that it also knows where either view lies relative to the other.

    Args:
        backbone: the encoder.
        depth: blocks of the decoder.
        width: its channels, a multiple of `HEAD_WIDTH`.
        unit: mm; what a step of one is to the position embedding.

    Raises:
        UserError: another width.

    Source: Weinzaepfel et al. 2022, arXiv:2210.10716, section 3.
    """

    def __init__(self, backbone: PrimusBackbone, depth: int, width: int, unit: float) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            raise UserError(
                f"the decoder's width is a multiple of {HEAD_WIDTH}, not {width}", "option -o decoder_width", f"give {-(-width // HEAD_WIDTH) * HEAD_WIDTH}"
            )
        self.backbone, self.unit = backbone, unit
        self.embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder = nn.ModuleList(CrossAttentionBlock(width, width // HEAD_WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, backbone.channels * math.prod(backbone.token))

    def features(self, first: Tensor, second: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the decoder makes of the first view's tokens beside the second view, (B, N, width); for registration without a mask.

        Args:
            first, second: (B, C, z, y, x).
            places: centres of the tokens of both in mm from the first view's centre, (2, B, N, 3), see `places.token_places`.
            mask: (B, d, h, w) bool over the first view's tokens, True = hidden: their voxels have no influence.
        """
        positions = sine_cosine(places.flatten(0, 1) / self.unit, self.embed.out_features).to(self.embed.weight.dtype)
        here, there = positions.unflatten(0, places.shape[:2])
        memory = self.embed(self.backbone.tokens(second)) + there
        tokens = self._tokens(first, mask) + here
        for block in self.decoder:
            tokens = block(tokens, memory)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def _tokens(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Embedded tokens of an image in the grid's order, the mask token in the place of hidden ones."""
        if mask is None:
            return self.embed(self.backbone.tokens(image))  # type: ignore[no-any-return]
        visible, hidden = split_tokens(mask.flatten(1))
        encoded = self.embed(self.backbone.tokens(image, keep=visible))
        filled = torch.cat((encoded, self.mask_token.to(encoded.dtype).expand(len(image), hidden.shape[1], -1)), 1)
        return gather(filled, torch.cat((visible, hidden), 1).argsort(1))

    def forward(self, first: Tensor, mask: Tensor, second: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and target of the hidden tokens, (B, K, P): their voxels, less their mean, over their standard deviation (by channel)."""
        hidden = split_tokens(mask.flatten(1))[1]
        prediction = self.head(gather(self.features(first, second, places, mask), hidden))
        target = first.detach()
        mean, deviation = block_moments(target, mask.shape[1:])
        return prediction, gather(patchify((target - mean) / deviation, self.backbone.token), hidden)

    def reconstruct(self, first: Tensor, mask: Tensor, second: Tensor, places: Tensor) -> Tensor:
        """The first view (B, C, z, y, x) as predicted, with the mean and standard deviation of its own tokens: nothing predicts these."""
        mean, deviation = block_moments(first, mask.shape[1:])
        values = unpatchify(self.head(self.features(first, second, places, mask)), mask.shape[1:], self.backbone.token)
        return mean + deviation * wide(values)
