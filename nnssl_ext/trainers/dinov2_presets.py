"""What DINOv2Trainer derives from the data, the plan and the length of a run where the user sets nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.plan import Plan
from nnssl_ext.nn.dinov2 import CENTRINGS, HeadSize
from nnssl_ext.planners import memory

CARD_GB = 12.0  # memory from which there are 8 local crops per volume, below 4
FEW_CROPS = 1000  # a dataset of fewer distinct crops is called small
KOLEO_VOLUMES = 16  # per step, from which KoLeo is on: its gradient grows as one over the distance of the nearest neighbour
CENTRE_CROPS = 128  # global crops per step from which Sinkhorn balances the summaries' targets, too; below they are centred
LOWEST_RATE = 1e-6  # learning rate at the end
NARROW_RATE = 0.1  # learning rate times width of the encoder, at least: narrow ones on small batches hardly learn at the rate of large ones
CPU_VOLUMES = 16  # per batch on a CPU, where the planned batch is small for the sake of speed


@dataclass(frozen=True)
class Preset:
    """Settings that follow from the amount of data.

    Args:
        prototypes: of each head.
        temperatures: of the teacher, first and last.
    """

    prototypes: int
    temperatures: tuple[float, float]


# With few volumes, views agree less at first. Differences grow only while their correlation between views exceeds the teacher's
# temperature over the student's (0.1); otherwise all targets drift towards the same one. Hence the colder teacher.
PRESETS = {"small": Preset(1024, (0.03, 0.045)), "default": Preset(16384, (0.04, 0.07)), "large": Preset(65536, (0.04, 0.07))}


@dataclass(frozen=True)
class Settings:
    """Everything that a run needs to know beside its Config.

    Args:
        crops: distinct crops of the dataset.
        volumes: per batch, of all processes.
        locals: local crops per volume.
        heads: sizes of both heads.
        centring: of the summaries' targets.
        temperatures: of the teacher, first and last.
        freeze: optimiser steps without update of the prototypes.
        koleo: weight of KoLeo.
        lr: learning rate after the warm-up.
    """

    crops: float
    volumes: int
    locals: int
    heads: HeadSize
    centring: str
    temperatures: tuple[float, float]
    freeze: int
    koleo: float
    lr: float

    def sentence(self) -> str:
        """What was chosen, for the user."""
        chosen = f"{self.heads.prototypes} prototypes, {self.locals} local crops, teacher temperature to {self.temperatures[1]:g}, lr {self.lr:.2g}"
        few = f"; features of fewer than {FEW_CROPS} tend to be poor: add unlabelled cases" if self.crops < FEW_CROPS else ""
        return f"for {self.crops:.0f} distinct crops and {self.volumes} volumes per batch: {chosen}{few}"


def settle(config: Any, *, crops: float, volumes: int, width: int, memory_gb: float, steps: int) -> Settings:
    """The settings of a run; what the configuration leaves open is derived.

    Args:
        config: of the trainer.
        crops: distinct crops of the dataset.
        volumes: per batch, of all processes.
        width: channels of the encoder.
        memory_gb: target of the plan.
        steps: optimiser steps of the run.

    Raises:
        UserError: unknown preset or centring, or not a pair of numbers where one is needed.
    """
    preset = choose_preset(config.preset, crops, volumes * config.accumulate)
    if config.centring not in ("auto", *CENTRINGS):
        raise UserError(f"unknown centring '{config.centring}'", "option -o centring", did_you_mean(config.centring, ("auto", *CENTRINGS)))
    for name in ("teacher_temperature", "momentum", "mask_ratio", "global_share", "local_share"):
        pair = getattr(config, name)
        if len(pair) != 2 and (pair or name != "teacher_temperature"):
            raise UserError(f"{name} needs two numbers", f"option -o {name}", f"write for example -o {name}=0.3,0.6")
        if name.endswith("share") and not 0 < pair[0] <= pair[1] <= 1:
            raise UserError(f"{name} {pair[0]:g},{pair[1]:g} is not a range of shares", f"option -o {name}", "the first must be above 0, the last at most 1")
    return Settings(
        crops=crops,
        volumes=volumes,
        locals=config.locals if config.locals is not None else 8 if memory_gb >= CARD_GB else 4,
        heads=head_size(config, width, preset.prototypes),
        centring=config.centring if config.centring != "auto" else "centre" if 2 * volumes < CENTRE_CROPS else "sinkhorn",
        temperatures=config.teacher_temperature or preset.temperatures,
        freeze=frozen_steps(steps) if config.freeze is None else config.freeze,
        koleo=config.koleo_weight if volumes >= KOLEO_VOLUMES else 0.0,
        lr=learning_rate(volumes * config.accumulate, width) if config.lr is None else config.lr,
    )


def head_size(config: Any, width: int, prototypes: int) -> HeadSize:
    """Sizes of a projection head on `width` channels; what the configuration leaves open is at most the source's."""
    return HeadSize(config.hidden or min(2048, 6 * width), config.bottleneck or min(256, width), config.prototypes or prototypes)


def frozen_steps(steps: int) -> int:
    """Optimiser steps of `steps` during which prototypes are not updated."""
    return min(max(1500, steps // 100), steps // 10)


def learning_rate(volumes: int, width: int) -> float:
    """After the warm-up, for `volumes` per optimiser step and an encoder of `width` channels."""
    return min(1e-3, max(2e-3 * math.sqrt(volumes / 1024), NARROW_RATE / width))


def choose_batch(planned: int, memory_gb: float) -> int:
    """Volumes per batch and process, from the number of crops that the plan's memory target holds: two are large, and there are small ones and a teacher."""
    return CPU_VOLUMES if memory_gb < memory.CARD_GB else max(2, planned // 3)


def choose_preset(name: str, crops: float, volumes: int) -> Preset:
    """The preset called `name`; for "auto" by distinct crops of the dataset and volumes per optimiser step.

    Raises:
        UserError: unknown name.
    """
    if name == "auto":
        name = "small" if crops < 10_000 or volumes < 16 else "large" if crops >= 100_000 and volumes >= 128 else "default"
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'", "option -o preset", did_you_mean(name, ["auto", *PRESETS]))
    return PRESETS[name]


def with_registers(plan: Plan, configuration: str, family: str, count: int) -> Plan:
    """The plan with `count` register tokens in a network, learned tokens that all others attend to; as it is for 0."""
    if not count:
        return plan
    config = plan.configuration(configuration)
    network = config.network(family)
    network = replace(network, kwargs={**network.kwargs, "num_register_tokens": count})
    return replace(plan, configurations={**plan.configurations, configuration: replace(config, networks={**config.networks, family: network})})
