"""One training step of MAETrainer on a ResEnc-L U-Net, 64^3 voxels, batch 2, fp32, against plain PyTorch.

The peer is the same network, loss and SGD in the fewest lines; both clip the gradient. What ours adds (checks, mask
from blocks, parameter groups) must cost nothing that can be measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from benchmarks.common import NoiseStore, Result, compare, make_plan, memory
from nnssl_ext.nn.backbones.base import resolve
from nnssl_ext.planners import resenc
from nnssl_ext.trainers.mae import MAETrainer

PEER = "same network, loss and SGD in plain PyTorch"
BATCH = 2


def _work(quick: bool) -> tuple[tuple[int, int, int], Any]:
    patch = (32, 32, 32) if quick else (64, 64, 64)
    network = resenc.network((1, 1, 1), patch, "nano" if quick else "L", 1e3, BATCH)
    if quick:
        return patch, network
    six = {"n_stages": 6, "strides": [[1] * 3] + [[2] * 3] * 5, "kernel_sizes": [[3] * 3] * 6, "features_per_stage": [32, 64, 128, 256, 320, 320]}
    six |= {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}
    return patch, replace(network, kwargs={**network.kwargs, **six})  # the preset ResEncL, whatever the planner would choose for this patch


def work(side: str, quick: bool) -> Callable[[], object]:
    """A function that does one training step."""
    patch, network = _work(quick)
    store: Any = NoiseStore(patch)
    plan = make_plan(patch, "resenc", replace(network, batch_size=BATCH))
    trainer = MAETrainer(plan, "3d_fullres", MAETrainer.Config(), store, tempfile.gettempdir())
    if side == "ours":
        trainer.initialize()
        trainer.waited = 0.0
        batches = repeat(trainer._dataset(list(range(len(store))), "train")[0])
        return lambda: trainer._update(0, batches)
    torch.manual_seed(0)
    model = ResidualEncoderUNet(input_channels=1, num_classes=1, deep_supervision=False, **resolve(dict(network.kwargs), network.imports))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    image = torch.from_numpy(store.arrays[:BATCH])
    hidden = torch.rand(BATCH, 1, 4, 4, 4) < 0.75
    for axis, size in enumerate(patch, start=2):
        hidden = hidden.repeat_interleave(size // 4, axis)

    def step() -> None:
        loss = ((model(image * ~hidden) - image) ** 2 * hidden).sum() / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()

    return step


def run(quick: bool) -> Result:
    result = compare(work("ours", quick), work("peer", quick), PEER, repetitions=5)
    held = {side: memory("mae_resenc", side, quick) for side in ("ours", "peer")}
    share = held["ours"]["peak"] / held["peer"]["peak"]
    work_done = {"network": "nano, 32^3" if quick else "ResEnc-L, 64^3", "batch": BATCH}
    return replace(result, detail={**result.detail, **work_done, "memory_gb": held, "peak_memory_share": round(share, 3)})
