"""One training step of DINOv2Trainer against the plain implementation of `dinov2_plain`: same network, crops, batch and optimiser.

Ours at its default hides 30 to 60 % of the tokens of half of the global crops; the peer hides half of the tokens of all of them,
as public implementations do. So the ratio has two causes, less work and the same work done faster; `detail` holds the second one
by itself ("same masks"), with operations, the heads' share of them, and memory. Operations are counted without drop path, which
ours does not compute where it drops, and once more with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, cycle
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import NoiseStore, Result, compare, make_plan, memory
from benchmarks.dinov2_plain import PlainDINOv2, PlainEncoder, PlainHead, PlainNetwork
from nnssl_ext.data.loader import Batch
from nnssl_ext.nn.dinov2 import Crops, Network
from nnssl_ext.planners import primus
from nnssl_ext.trainers.dinov2 import DINOv2Trainer

BATCH, TOKEN, BOTTLENECK = 2, 8, 256
BATCHES = 4  # that differ in their masks, in turn
DROP_PATH = 0.2
PEER = "plain full-head implementation kept in benchmarks/"


@dataclass(frozen=True)
class Setting:
    """Sizes of the work: edges of global crops (local ones are half as long), local crops, Primus, heads."""

    patch: int
    locals: int
    size: str
    depth: int
    hidden: int
    prototypes: int


SETTINGS = {
    "a": Setting(64, 4, "tiny", 4, 2048, 8192),
    "b": Setting(64, 8, "tiny", 6, 2048, 65536),
    "quick": Setting(32, 2, "nano", 2, 64, 256),
}
MASKS: dict[str, dict[str, Any]] = {"default": {}, "same": {"mask_probability": 1.0, "mask_ratio": (0.5, 0.5)}}


def make_trainer(name: str, masks: str, drop_path: float) -> DINOv2Trainer:
    """Ours, not yet initialised; its prototypes are not frozen."""
    setting = SETTINGS[name]
    patch = (setting.patch,) * 3
    network = primus.network((1, 1, 1), patch, setting.size, 1e3, BATCH)
    network = replace(network, kwargs={**network.kwargs, "eva_depth": setting.depth, "drop_path_rate": drop_path})
    config = DINOv2Trainer.Config(
        batch_size=BATCH,
        locals=setting.locals,
        hidden=setting.hidden,
        bottleneck=BOTTLENECK,
        prototypes=setting.prototypes,
        freeze=0,
        **MASKS[masks],
    )
    store: Any = NoiseStore((round(1.5 * setting.patch),) * 3)
    return DINOv2Trainer(make_plan(patch, "primus", network), "3d_fullres", config, store, tempfile.gettempdir())


def draw(trainer: DINOv2Trainer) -> list[Batch]:
    """Some batches of it."""
    dataset = trainer._dataset(list(range(len(trainer.store))), "train")
    return [dataset[i] for i in range(BATCHES)]


def make_plain(name: str, drop_path: float) -> PlainDINOv2:
    """The peer, ready for its first step."""
    setting = SETTINGS[name]
    preset = primus.SIZES[setting.size]
    width = preset["embed_dim"]
    torch.manual_seed(0)
    encoder = PlainEncoder(setting.patch, TOKEN, width, setting.depth, preset["eva_numheads"], drop_path)
    heads = [PlainHead(width, setting.hidden, BOTTLENECK, setting.prototypes) for _ in range(2)]
    return PlainDINOv2(PlainNetwork(encoder, *heads), setting.prototypes, temperature=0.04)


def work(side: str, what: tuple[str, str, float]) -> Callable[[], object]:
    """A function that does one training step.

    Args:
        side: "ours" or "peer".
        what: setting, masks, drop path.
    """
    name, masks, drop_path = what
    trainer = make_trainer(name, masks, drop_path)
    turn = cycle(draw(trainer))
    if side == "ours":
        trainer.initialize()
        trainer.waited = 0.0
        steps = count()  # each draws its own drop path
        return lambda: trainer._update(next(steps), turn)
    plain = make_plain(name, drop_path)

    def step() -> None:
        crops = Crops.of(next(turn))
        assert crops.small is not None
        plain.step(crops.large, crops.small, crops.mask)

    return step


def gflop(function: Callable[[], object], times: int) -> float:
    """Operations in 1e9 that matrix products, convolutions and attention do in a call, mean over so many."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(times):
            function()
    return counter.get_total_flops() / times / 1e9


def encode(trainer: DINOv2Trainer, crops: Crops) -> None:
    """What a step does without heads and losses: encoders and summaries, forward and backward."""
    student: Network = trainer.model.student.train()
    outputs = [*student(crops.large, crops.mask), student(crops.small)[0]]
    torch.autograd.backward([output.sum() for output in outputs])
    trainer.model.teacher(crops.large)


def operations(name: str, times: int) -> dict[str, Any]:
    """GFLOP per step (mean over so many) without drop path and with it, the hidden share of all tokens, and the heads' share of the operations of ours."""
    found: dict[str, dict[str, float]] = {}
    for label, drop_path in (("gflop", 0.0), ("gflop_drop_path", DROP_PATH)):
        found[label] = {key: gflop(work("ours", (name, masks, drop_path)), times) for key, masks in (("ours", "default"), ("ours_same_masks", "same"))}
        found[label]["peer"] = gflop(work("peer", (name, "same", drop_path)), 1)
    trainer = make_trainer(name, "default", 0.0)
    trainer.initialize()
    crops = [Crops.of(batch) for batch in draw(trainer)[:times]]
    encoders = gflop(lambda: encode(trainer, crops[0]), 1)
    found["heads_share"] = {key: 1 - encoders / value for key, value in found["gflop"].items() if key != "peer"}
    found["hidden_share"] = {"ours": sum(len(c.hidden) / c.mask.numel() for c in crops) / len(crops)}
    return {label: {key: round(value, 3) for key, value in values.items()} for label, values in found.items()}


def measure(name: str, repetitions: int) -> Result:
    """All figures of a setting."""
    peer, default, same = ("peer", "same"), ("ours", "default"), ("ours", "same")
    steps = {side: work(side[0], (name, side[1], DROP_PATH)) for side in (peer, default, same)}
    result = compare(steps[default], steps[peer], PEER, repetitions)
    equal = compare(steps[same], steps[peer], PEER, repetitions)
    del steps
    drawn = f"dinov2.draw(dinov2.make_trainer({name!r}, 'default', 0.0))"  # what loads and compiles the augmentation is in the base of both
    held = {" ".join(side): memory("dinov2", side[0], (name, side[1], DROP_PATH), prepare=drawn) for side in (peer, default, same)}
    above = {key: value["peak"] - value["base"] for key, value in held.items()}
    shares = {key: round(value / above["peer same"], 3) for key, value in above.items() if key != "peer same"}
    same_masks = {key: value for key, value in equal.as_dict().items() if key in ("ratio", "min", "max", "ours", "peer")} | {"wall_s": equal.detail["wall_s"]}
    detail = {
        **vars(SETTINGS[name]),
        "batch": BATCH,
        "same_masks": same_masks,
        **operations(name, min(repetitions, BATCHES)),
        "memory_gb": held,
        "above_base_share": shares,
    }
    return replace(result, detail={**result.detail, **detail})


@torch.no_grad()
def copy_weights(source: Network, target: PlainNetwork) -> None:
    """Give the plain network the weights of ours."""
    prefixes = {"backbone.": "encoder.", "mask_token": "encoder.mask_token", "summary.": "encoder."}
    state = {}
    for name, value in source.state_dict().items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        state[prefixes.get(prefix, "") + name.removeprefix(prefix)] = value
    target.load_state_dict(state)
