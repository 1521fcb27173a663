"""What DINOv2Trainer chooses by the size of the dataset and of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.plan import Plan

CARD_GB = 12.0  # memory from which there are 8 local crops per volume


@dataclass(frozen=True)
class Preset:
    """Settings that follow from the amount of data.

    Args:
        prototypes: of each head.
        teacher_temperature: at the end of the run.
    """

    prototypes: int
    teacher_temperature: float


PRESETS = {"small": Preset(4096, 0.05), "default": Preset(16384, 0.07), "large": Preset(65536, 0.07)}


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
