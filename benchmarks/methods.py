"""One training step of every method on its own backbone family, against one of MAETrainer on the same family: time and memory.

Smallest networks, 48^3 voxels (32^3 with --quick), two volumes per step, each method's own settings; the batch is made once.
A Markdown table of all methods is printed; the result is that of the dearest one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count, repeat
from typing import Any

from benchmarks.common import PAIRED, NoiseStore, PairedStore, Result, compare, make_plan, memory
from nnssl_ext.core.registry import all_classes
from nnssl_ext.planners import primus, resenc, segformer3d
from nnssl_ext.trainers.base import SSLTrainer

BATCH, PEER = 2, "MAETrainer"
NETWORKS: dict[str, Callable[..., Any]] = {"resenc": resenc.network, "primus": primus.network, "segformer3d": segformer3d.network}


@cache
def methods() -> dict[str, type[SSLTrainer]]:
    """The registered trainers by name."""
    return all_classes(SSLTrainer, "nnssl_ext.trainers")


def work(side: str, argument: tuple[str, bool]) -> Callable[[], object]:
    """A function that does one training step.

    Args:
        side: name of the trainer.
        argument: backbone family, and whether the crops are small.
    """
    (family, quick), cls = argument, methods()[side]
    patch = (32, 32, 32) if quick else (48, 48, 48)
    network = NETWORKS[family]((1, 1, 1), patch, "nano", 1e3, BATCH)
    store: Any = (PairedStore if side in PAIRED else NoiseStore)([2 * edge for edge in patch])
    plan = make_plan(patch, family, replace(network, batch_size=BATCH))
    trainer = cls(plan, "3d_fullres", cls.Config(batch_size=BATCH), store, tempfile.gettempdir(), family=family)
    trainer.initialize()
    trainer.waited = 0.0
    batches = repeat(trainer._dataset(list(range(len(store))), "train")[0])
    steps = count()  # each draws its own random numbers
    return lambda: trainer._update(next(steps), batches)


@cache
def above_base(name: str, argument: tuple[str, bool]) -> float:
    """Memory in GB that two steps need beside libraries and modules."""
    held = memory("methods", name, argument)
    return held["peak"] - held["base"]


def measure(name: str, quick: bool) -> Result:
    """A method against its peer."""
    argument = methods()[name].default_family, quick
    timed = compare(work(name, argument), work(PEER, argument), f"{PEER} on {argument[0]}", repetitions=3 if quick else 9, warm_up=2)
    above, of_peer = above_base(name, argument), above_base(PEER, argument)
    details = {"family": argument[0], "above_base_gb": round(above, 3), "above_base_of_peer": round(above / of_peer, 2)}
    return replace(timed, detail={**timed.detail, **details})


def table(results: dict[str, Result]) -> str:
    """Markdown: a row for each method."""
    lines = ["| trainer | backbone | step (CPU-s) | step (wall s) | times MAETrainer's step | memory above base (GB) | times MAETrainer's |", "|---" * 7 + "|"]
    for name, result in sorted(results.items()):
        found = result.detail
        times = f"{1 / result.ratio:.2f} ({1 / result.max:.2f} to {1 / result.min:.2f})"
        lines.append(
            f"| {name} | {found['family']} | {result.ours:.3f} | {found['wall_s']['ours']:.3f} | {times} "
            f"| {found['above_base_gb']:.3f} | {found['above_base_of_peer']:.2f} |"
        )
    return "\n".join(lines)


def run(quick: bool) -> Result:
    results = {name: measure(name, quick) for name in methods()}
    print(table(results))
    dearest = min(results, key=lambda name: results[name].ratio)
    rows = {name: {"ratio": round(result.ratio, 3), "step": round(result.ours, 4), **result.detail} for name, result in sorted(results.items())}
    return replace(results[dearest], detail={"dearest": dearest, "batch": BATCH, "methods": rows})
