"""Cross-view retrieval on the validation subjects: a quality of dense features that needs no labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnssl_ext.nn import distributed, parallel
from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.correspondence import retrieval
from nnssl_ext.trainers.pictures import evaluating

if TYPE_CHECKING:
    from nnssl_ext.trainers.base import SSLTrainer


@torch.no_grad()
def view_retrieval(trainer: SSLTrainer, first: str, second: str) -> dict[str, float]:
    """Share of the tokens of a view whose nearest token in the other one is the right one, to one token; of the first validation batch.

    Args:
        first, second: names of two views of equal size.

    Returns:
        "retrieval" in [0, 1], of the tokens of all ranks; empty without validation subjects, and where the views have no place in common.
    """
    if not trainer.val_cases:
        return {}
    batch, backbone = trainer.val_data[0], trainer.transferred()
    assert isinstance(backbone, PrimusBackbone)
    views = [batch[name].to(trainer.device) for name in (first, second)]
    kind = next(backbone.parameters()).dtype  # of a model in double precision, too
    with parallel.together(trainer.model), evaluating(trainer.model), trainer.update.autocast():
        one, other = (backbone.tokens(view.image.to(kind)) for view in views)
    found = retrieval(one, other, views[0].affine, views[1].affine, backbone.grid_of(views[0].image.shape[2:]), backbone.token)
    count = float(found["count"])
    hits, asked = (distributed.mean(value, trainer.device) for value in (count * float(found["hits"]), count))
    return {"retrieval": hits / asked} if asked else {}
