"""One training step of MAETrainer on Primus-S, 64^3 voxels, batch 2, fp32, against a plain implementation.

The plain one follows the formula literally: embed all tokens, keep a quarter, encode them, put them and mask tokens back
into the full sequence with a loop over samples, two decoder blocks as wide as the encoder, transposed convolutions back
to voxels, mean squared error on the hidden voxels, AdamW. Encoder, patch, batch, mask ratio and optimiser are the same.
Ours reads only visible tokens, leaves out what drop path drops, has a decoder of width 192 and a linear layer to the voxels
of hidden tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.building_blocks.eva import Eva
from einops import rearrange
from torch import Tensor, nn

from benchmarks.common import NoiseStore, Result, compare, make_plan, memory
from nnssl_ext.planners import primus
from nnssl_ext.trainers.mae import MAETrainer

PATCH, BATCH, RATIO = (64, 64, 64), 2, 0.75
PEER = "plain full-sequence implementation kept in benchmarks/"


class PlainMAE(nn.Module):
    """Masked autoencoder as the formula says, nothing saved."""

    def __init__(self, width: int, depth: int, heads: int, token: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {"init_values": 0.1, "scale_attn_inner": True}
        self.net = Primus(1, width, (token,) * 3, 1, depth, heads, PATCH, drop_path_rate=0.2, **settings)
        self.grid = tuple(size // token for size in PATCH)
        self.decoder = Eva(width, 2, heads, ref_feat_shape=self.grid, **settings)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.token = token

    def forward(self, x: Tensor) -> Tensor:
        """Loss of crops (B, 1, z, y, x)."""
        z, y, w = self.grid
        eva = self.net.eva
        tokens = rearrange(self.net.down_projection(x), "b c z y x -> b (z y x) c") + eva.pos_embed
        count = tokens.shape[1]
        keep = torch.stack([torch.randperm(count)[: round((1 - RATIO) * count)].sort().values for _ in x])
        encoded = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        rotary = eva.rope.get_embed()[keep].unsqueeze(1)
        for block in eva.blocks:
            encoded = block(encoded, rope=rotary)
        encoded = eva.norm(encoded)
        full, hidden = [], []
        for sample in range(len(x)):
            sequence = self.mask_token.repeat(count, 1)
            sequence[keep[sample]] = encoded[sample]
            full.append(sequence)
            is_hidden = torch.ones(count, dtype=torch.bool)
            is_hidden[keep[sample]] = False
            hidden.append(is_hidden)
        decoded, _ = self.decoder(torch.stack(full))
        predicted = self.net.up_projection(rearrange(decoded, "b (z y x) c -> b c z y x", z=z, y=y, x=w).contiguous())
        mask = rearrange(torch.stack(hidden), "b (z y x) -> b 1 z y x", z=z, y=y, x=w)
        for axis in (2, 3, 4):
            mask = mask.repeat_interleave(self.token, axis)
        return ((predicted - x) ** 2 * mask).sum() / mask.sum()


def work(side: str, quick: bool) -> Callable[[], object]:
    """A function that does one training step."""
    network = primus.network((1, 1, 1), PATCH, "nano" if quick else "S", 1e3, BATCH)
    store: Any = NoiseStore(PATCH)
    trainer = MAETrainer(
        make_plan(PATCH, "primus", replace(network, batch_size=BATCH)), "3d_fullres", MAETrainer.Config(), store, tempfile.gettempdir(), family="primus"
    )  # type: ignore[arg-type]
    if side == "ours":
        trainer.initialize()
        trainer.waited = 0.0
        batches = repeat(trainer._dataset(list(range(len(store))), "train")[0])
        steps = count()  # each draws its own drop path
        return lambda: trainer._update(next(steps), batches)
    torch.manual_seed(0)
    preset = network.kwargs
    model = PlainMAE(preset["embed_dim"], preset["eva_depth"], preset["eva_numheads"], preset["patch_embed_size"][0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05, betas=(0.9, 0.98))
    image = torch.from_numpy(store.arrays[:BATCH])

    def step() -> None:
        loss = model(image)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def run(quick: bool) -> Result:
    result = compare(work("ours", quick), work("peer", quick), PEER, repetitions=3 if quick else 15, warm_up=2)
    held = {side: memory("mae_primus", side, quick) for side in ("ours", "peer")}
    share = held["ours"]["peak"] / held["peer"]["peak"]
    above = (held["ours"]["peak"] - held["ours"]["base"]) / (held["peer"]["peak"] - held["peer"]["base"])
    work_done = {"network": "Primus nano" if quick else "Primus-S", "patch": list(PATCH), "batch": BATCH, "mask_ratio": RATIO}
    return replace(result, detail={**result.detail, **work_done, "memory_gb": held, "peak_memory_share": round(share, 3), "above_base_share": round(above, 3)})
