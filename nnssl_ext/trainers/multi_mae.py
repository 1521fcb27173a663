"""Masked autoencoder over several modalities of one anatomy, on Primus."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.plan import Plan
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.masking import block_grid
from nnssl_ext.data.multimodal import MaskedVisit
from nnssl_ext.data.sessions import read_sessions
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.multimodal import MultiModalTransformer, hidden_error, normalised_patches
from nnssl_ext.nn.tokens import block_moments, voxel_mask
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE
from nnssl_ext.trainers.pictures import volume_rows


class MultiMAETrainer(SSLTrainer):
    """Hides most tokens of all modalities of a visit and reconstructs each modality from what is left of all of them.

    loss = sum over modalities of the mean over its hidden tokens of the squared error of their normalised voxels; mean over
    samples. A modality that a visit lacks has no visible token and no loss there.

    Source: Bachmann et al. 2022, arXiv:2204.01678.
    """

    default_family = "primus"
    needs = (frozenset({"token_drop"}),)
    citation = "Bachmann, R., Mizrahi, D., Atanov, A., & Zamir, A. (2022). MultiMAE: multi-modal multi-task masked autoencoders. ECCV, 348-367."

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        visible: float = field(default=1 / 6, metadata=SHARE)  # share of all modalities' tokens together
        stem: str | None = None  # the modality whose stem is handed over; None = the plan's first one
        decoder_depth: int = field(default=2, metadata=AT_LEAST_ONE)  # transformer blocks of each modality's decoder
        decoder_width: int = field(default=192, metadata=AT_LEAST_ONE)  # its channels, at most the encoder's

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        self.sessions = read_sessions(store)
        self.sessions.check_pairs(type(self).__name__, plan.dataset_name)
        self.modalities = self._modalities()

    def _modalities(self) -> tuple[str, ...]:
        """Those of the tokenizer's channels, then all others."""
        found = {name: names for names in self.sessions.modalities for name in names}
        ordered = [*(name for name in self.config_plan.normalization if name in found), *sorted(found)]
        stem = self.config.stem or ordered[0]
        if stem not in found:
            raise UserError(f"no case shows the modality '{stem}'", "option -o stem", did_you_mean(stem, found))
        if len(set(found[stem])) < len(found[stem]):
            raise UserError(f"channels of equal names: {', '.join(found[stem])}", self.plan.dataset_name, "name each channel's modality, and preprocess again")
        return tuple(dict.fromkeys([*found[stem], *ordered]))

    def views(self) -> ViewSpec:
        size, token = self.config_plan.patch_size, self.network_plan.cell
        places = int(np.prod(block_grid(size, token)))
        visible = min(max(1, round(self.config.visible * len(self.modalities) * places)), places - 1)  # something of each modality stays hidden
        return MaskedVisit(Crop(size, body=0.0), self.sessions, self.modalities, token, visible)

    def build(self, backbone: Backbone) -> nn.Module:
        assert isinstance(backbone, PrimusBackbone)
        return MultiModalTransformer(backbone, len(self.modalities), self.config.decoder_depth, self.config.decoder_width)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        image, hidden = self.stacked(batch)
        target = normalised_patches(image, hidden.shape[2:], self.network_plan.cell)
        errors = hidden_error(model(image, hidden.flatten(2)), target, hidden.flatten(2))
        losses = errors.masked_fill(~self.present(batch).to(errors.device), 0.0).mean(0)
        return {"total": losses.sum(), **dict(zip(self.modalities, losses))}

    def stacked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Crops (B, M, z, y, x) and which tokens of them are hidden, (B, M, d, h, w)."""
        views = [batch[name] for name in self.modalities]
        return torch.cat([view.image for view in views], 1), torch.stack([view.mask for view in views if view.mask is not None], 1)

    def present(self, batch: Batch) -> Tensor:
        """Which sample shows which modality, bool (B, M) on the CPU."""
        return torch.tensor([[name in self.sessions.modalities[case] for case in batch[name].cases] for name in self.modalities]).T

    def picture(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        image, hidden = (part[:2] for part in self.stacked(batch))
        mean, deviation = block_moments(image, hidden.shape[2:])  # nothing predicts them
        filled = mean + deviation * self.model.reconstruct(image, hidden).float()
        shown: dict[str, Tensor] = {}
        for number, name in enumerate(self.modalities):
            one, other, mask = image[:, [number]], filled[:, [number]], voxel_mask(hidden[:, number], image.shape[2:])
            shown |= {name: one, f"{name}, visible": one.masked_fill(mask, float(one.min())), f"{name}, reconstruction": torch.where(mask, other, one)}
        return volume_rows(shown)
