"""CroCo in 3D: cross-view completion on Primus."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.plan import ConfigPlan, Plan
from nnssl_ext.data.cross_views import COLOUR, CounterpartPair, Counterparts, HiddenFirst, OtherSubjects, other_modalities, other_sessions
from nnssl_ext.data.iou_pairs import IoUPair
from nnssl_ext.data.loader import Batch
from nnssl_ext.data.partners import training_partners
from nnssl_ext.data.views import Crop, ViewSpec
from nnssl_ext.nn.backbones.base import Backbone, build_backbone
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.croco import CroCo
from nnssl_ext.nn.losses import masked_mse
from nnssl_ext.nn.places import composed, token_places
from nnssl_ext.preprocessing.store import CaseStore
from nnssl_ext.trainers.base import Losses, SSLTrainer
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.config import AT_LEAST_ONE, SHARE, check_interval
from nnssl_ext.trainers.pictures import SAMPLES, Rows, masked_rows, volume_rows

SECOND = ("overlap", "session", "modality", "subject")


class CroCo3DTrainer(SSLTrainer):
    """Hides nearly all of a first view and completes it with the help of a second view of the same place, of which everything is visible.

    One encoder for both views; it sees visible tokens alone. The decoder attends to the first view, then to the second, and knows
    where every token lies in mm. The loss is the mean squared error of hidden tokens, each less its mean and over its standard deviation.

    Source: Weinzaepfel et al. 2022, arXiv:2210.10716; Weinzaepfel et al. 2023, arXiv:2211.10408.
    """

    default_family = "primus"
    needs = (frozenset({"token_drop"}),)
    citation = (
        "Weinzaepfel, P., Leroy, V., Lucas, T., Brégier, R., Cabon, Y., Arora, V., ... Revaud, J. (2022). "
        "CroCo: Self-supervised pre-training for 3D vision tasks by cross-view completion. NeurIPS."
    )

    @dataclass(frozen=True)
    class Config(SSLTrainer.Config):
        second: str = "overlap"  # the second view: "overlap": another crop of the case; or the same place in another "session", "modality", "subject"
        iou: tuple[float, ...] = field(default=(0.3, 0.6), metadata=SHARE)  # of the two views, lowest and highest; "overlap" only
        mask_ratio: float = field(default=0.9, metadata=SHARE)  # share of the first view's tokens that are hidden (section 4)
        decoder_depth: int = field(default=8, metadata=AT_LEAST_ONE)  # blocks of the decoder (section 4)
        decoder_width: int = field(default=512, metadata=AT_LEAST_ONE)  # its channels (section 4)

    def __init__(
        self, plan: Plan, configuration: str, config: Config, store: CaseStore, folder: Path | str, *, family: str | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(plan, configuration, config, store, folder, family=family, device=device)
        check_interval(config.iou, "iou")
        if config.second not in SECOND:
            raise UserError(f"unknown second view '{config.second}'", "option -o second", did_you_mean(config.second, SECOND))
        self.counterparts = self._counterparts()

    def _counterparts(self) -> Counterparts | None:
        store, method, dataset = self.store, f"{type(self).__name__} with second={self.config.second}", self.plan.dataset_name
        if self.config.second == "overlap":
            return None
        if self.config.second == "subject":
            return OtherSubjects(training_partners(store, self.config.seed, method, dataset))
        return (other_sessions if self.config.second == "session" else other_modalities)(store, method, dataset)

    def views(self) -> ViewSpec:
        size, token = self.config_plan.patch_size, tuple(self.network_plan.kwargs["patch_embed_size"])
        pair: ViewSpec = IoUPair(size, self.config.iou, intensity=COLOUR)
        if self.counterparts is not None:
            pair = CounterpartPair(Crop(size, intensity=COLOUR), self.counterparts, alone=pair)
        return HiddenFirst(pair, token, self.config.mask_ratio)

    def build(self, backbone: Backbone) -> nn.Module:
        return completion(backbone, self.config_plan, self.config)

    def places(self, batch: Batch) -> Tensor:
        """Centres of the tokens of both views in mm from the first view's centre, (2, B, N, 3)."""
        first, second = batch["first"], batch["second"]
        affine = second.affine
        if self.counterparts is not None:
            carried = [np.eye(3, 4) if a == b else self.counterparts.carry(self.store, a, b) for a, b in zip(first.cases, second.cases)]
            affine = composed(torch.from_numpy(np.stack(carried)), affine)
        size, spacing = first.image.shape[2:], self.config_plan.spacing_for((1.0, 1.0, 1.0))
        both = [token_places(first.affine, view, size, self.model.backbone.token, spacing) for view in (first.affine, affine)]
        return torch.stack(both).to(first.image)

    def step(self, model: nn.Module, batch: Batch) -> Losses:
        first = batch["first"]
        prediction, target = model(first.image, first.mask, batch["second"].image, self.places(batch))
        return {"total": masked_mse(prediction, target, torch.ones_like(prediction, dtype=torch.bool))}

    def picture(self, batch: Batch) -> Rows:
        first, second = batch["first"], batch["second"]
        assert first.mask is not None
        image, mask, other = first.image[:SAMPLES], first.mask[:SAMPLES], second.image[:SAMPLES]
        reconstruction = self.model.reconstruct(image, mask, other, self.places(batch)[:, :SAMPLES])
        rows = masked_rows(image, mask, reconstruction, "reconstruction (mean, spread given)")
        return [{**row, **beside} for row, beside in zip(rows, volume_rows({"second view": other}))]


def completion(backbone: Backbone, plan: ConfigPlan, config: Any) -> CroCo:
    """The model around a fresh backbone.

    Args:
        plan: of the configuration; the position embedding counts in shortest edges of a token.
        config: has `decoder_depth` and `decoder_width`.
    """
    assert isinstance(backbone, PrimusBackbone)
    unit = min(edge * mm for edge, mm in zip(backbone.token, plan.spacing_for((1.0, 1.0, 1.0))))
    return CroCo(backbone, config.decoder_depth, config.decoder_width, unit)


def completion_of(path: Path | str) -> CroCo:
    """Encoder and decoder as a checkpoint of `CroCo3DTrainer` holds them, in evaluation mode; `CroCo.features` compares two images.

    Raises:
        UserError: unreadable file, or a checkpoint of another method.
    """
    content = load_checkpoint(path)
    name, expected = content.get("trainer_name"), CroCo3DTrainer.__name__
    if name != expected:
        raise UserError(f"a checkpoint of {name} has no decoder for two views", path, f"give one of {expected}")
    plan = Plan.from_dict(content["plan"], Path(path))
    config = plan.configuration(content["configuration"])
    model = completion(build_backbone(config, content["family"], plan.channels, str(path)), config, SimpleNamespace(**content["config"]))
    model.load_state_dict(content["ssl_state"])
    return model.eval()
