"""Several modalities in one transformer: a stem for each, one encoder, a decoder for each.

Shape suffixes: B batch, M modalities, N tokens of a modality, K visible tokens of all modalities, P voxels of a token, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.cross_attention import CrossAttentionBlock
from nnssl_ext.nn.places import sine_cosine
from nnssl_ext.nn.precision import wide
from nnssl_ext.nn.tokens import block_moments, gather, patchify, split_tokens, unpatchify
from nnssl_ext.nn.transformer import HEAD_WIDTH, transformer


def patches(image_BMZYX: Tensor, token: Sequence[int]) -> Tensor:
    """Voxels of each token of each modality, (B, M, N, P)."""
    return patchify(image_BMZYX.flatten(0, 1)[:, None], token).unflatten(0, image_BMZYX.shape[:2])


def normalised_patches(image_BMZYX: Tensor, grid: Sequence[int], token: Sequence[int]) -> Tensor:
    """The same, each token minus its mean, over its standard deviation."""
    mean, deviation = block_moments(image_BMZYX, grid)
    return patches((image_BMZYX - mean) / deviation, token)


def hidden_error(prediction_BMNP: Tensor, target_BMNP: Tensor, hidden_BMN: Tensor) -> Tensor:
    """Mean squared error over the hidden tokens of each sample and modality, (B, M); there must be one in each. Visible ones get no gradient."""
    difference = torch.where(hidden_BMN[..., None], wide(prediction_BMNP) - wide(target_BMNP), 0)  # not a product: NaN * 0 = NaN
    return difference.square().mean(3).sum(2) / hidden_BMN.sum(2)


class MultiModalTransformer(nn.Module):
    """Visible tokens of all modalities and a global one pass the encoder together; every modality's decoder reads all of them.

    The backbone's tokenizer is the stem of the first modality, so that the backbone alone encodes this one. A tokenizer of
    several channels is the stems of as many modalities, times the square root of their number: what it makes of all channels
    together is then about as large as what it makes of one modality.

    Args:
        backbone: the encoder, of C channels.
        modalities: number of modalities, C of them at least.
        depth: transformer blocks of each decoder.
        width: its channels; rounded down to a multiple of 48 that is not above the encoder's.

    Source: Bachmann et al. 2022, arXiv:2204.01678, section 3.
    """

    def __init__(self, backbone: PrimusBackbone, modalities: int, depth: int, width: int) -> None:
        super().__init__()
        voxels, count = math.prod(backbone.token), backbone.channels
        self.backbone, self.modalities, self.places = backbone, modalities, math.prod(backbone.grid)
        stems = [nn.Linear(voxels, backbone.width) for _ in range(modalities - count)]
        for stem in stems:
            nn.init.kaiming_normal_(stem.weight, a=1e-2)  # as the library does with the tokenizer
            nn.init.zeros_(stem.bias)
        self.further: Any = nn.ModuleList(stems)
        self.offsets = nn.Parameter(torch.zeros(count, backbone.width)) if count > 1 else None  # embeddings of modalities that share a bias
        self.global_token = nn.Parameter(torch.zeros(1, 1, backbone.width))
        nn.init.normal_(self.global_token, std=0.02)
        width = max(HEAD_WIDTH, min(width, backbone.width) // HEAD_WIDTH * HEAD_WIDTH)
        self.decoders = nn.ModuleList(ModalityDecoder(backbone, modalities, depth, width) for _ in range(modalities))

    def forward(self, image_BMZYX: Tensor, hidden_BMN: Tensor) -> Tensor:
        """Predicted voxels of every token, (B, M, N, P); as many tokens are visible in every sample."""
        visible = split_tokens(hidden_BMN.flatten(1))[0]
        modality, place = visible // self.places, visible % self.places
        embedded = self.embed(gather(patches(image_BMZYX, self.backbone.token).flatten(1, 2), visible), modality)
        encoded = self.backbone.tokens(embedded, keep=place, placeless=self.global_token)
        return torch.stack([decode(encoded, number, modality, place) for number, decode in enumerate(self.decoders)], 1)

    def reconstruct(self, image_BMZYX: Tensor, hidden_BMDHW: Tensor) -> Tensor:
        """Prediction (B, M, z, y, x) of the normalised voxels of every token."""
        values, grid, token = self(image_BMZYX, hidden_BMDHW.flatten(2)), self.backbone.grid, self.backbone.token
        return unpatchify(values.flatten(0, 1), grid, token).unflatten(0, values.shape[:2]).squeeze(2)

    def embed(self, patches_BKP: Tensor, modality_BK: Tensor) -> Tensor:
        """Tokens (B, K, C), each by its modality's stem, whose bias tells the modality."""
        projection, count = self.backbone.net.down_projection.proj, self.backbone.channels
        weights = [count**0.5 * projection.weight.flatten(2).transpose(0, 1), *(stem.weight[None] for stem in self.further)]
        shared = projection.bias.expand(count, -1) if self.offsets is None else projection.bias + self.offsets
        biases = [shared, *(stem.bias[None] for stem in self.further)]
        by_all = F.linear(patches_BKP, torch.cat(weights).flatten(0, 1), torch.cat(biases).flatten()).unflatten(2, (self.modalities, -1))
        return torch.take_along_dim(by_all, modality_BK[..., None, None], 2).squeeze(2)


class ModalityDecoder(nn.Module):
    """What one modality shows everywhere: queries for all of its tokens read the encoded ones, then pass a light transformer."""

    positions: Tensor

    def __init__(self, backbone: PrimusBackbone, modalities: int, depth: int, width: int) -> None:
        super().__init__()
        self.memory = nn.Linear(backbone.width, width)
        self.mask_token, self.modalities = (nn.Parameter(torch.zeros(count, width)) for count in (1, modalities))
        for embedding in (self.mask_token, self.modalities):
            nn.init.normal_(embedding, std=0.02)
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.get_default_dtype()) for n in backbone.grid))
        self.register_buffer("positions", sine_cosine(places[None], width)[0], persistent=False)
        self.read = CrossAttentionBlock(width, width // HEAD_WIDTH, self_attention=False)
        self.blocks = transformer(width, depth, backbone.grid)
        self.head = nn.Linear(width, math.prod(backbone.token))

    def forward(self, encoded_BKC: Tensor, number: int, modality_BK: Tensor, place_BK: Tensor) -> Tensor:
        """Predicted voxels (B, N, P).

        Args:
            encoded_BKC: the global token's features, then those of the visible ones, (B, 1 + K, C).
            number: of the decoder's own modality.
            modality_BK, place_BK: of the visible tokens.
        """
        memory, places = self.memory(encoded_BKC), len(self.positions)
        queries = self.mask_token.to(memory.dtype).expand(len(memory), len(self.modalities) * places, -1)
        slots = (modality_BK * places + place_BK)[..., None].expand(-1, -1, memory.shape[2])
        queries = queries.scatter(1, slots, memory[:, 1:])[:, number * places : (number + 1) * places]
        seen = memory[:, 1:] + self.positions[place_BK] + self.modalities[modality_BK]
        features = self.read(queries + self.positions + self.modalities[number], torch.cat((memory[:, :1], seen), 1))
        return self.head(self.blocks(features)[0])  # type: ignore[no-any-return]
