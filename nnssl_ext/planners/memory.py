"""What a training takes of memory: weights, and what a sample needs beside them."""

from __future__ import annotations

from dataclasses import dataclass

CARD_GB = 6.0  # targets from here on are a card's, which trains in bfloat16; smaller ones are a CPU's, which trains in float32


@dataclass(frozen=True)
class Footprint:
    """Memory of a network in training.

    Args:
        parameters: trained numbers.
        bytes_per_parameter: weight, gradient and the optimizer's moments, 4 each, and what autocast copies.
        units: what the memory of a sample grows with: feature elements of a U-Net, tokens x channels x blocks of a transformer.
        bytes_per_unit: by precision; the peak of a step, that is activations kept for the backward pass, and gradients beside them.
        further_bytes: of a sample, whatever the precision.
    """

    parameters: float
    bytes_per_parameter: float
    units: float
    bytes_per_unit: dict[str, float]
    further_bytes: float = 0.0

    def batch(self, target_gb: float, most: int) -> tuple[int, float]:
        """The largest batch within the target, 1 to `most`, and its memory in GB (more than the target where a single sample is)."""
        kind = precision(target_gb)
        fixed = self.bytes_per_parameter * self.parameters / 1e9
        sample = (self.units * self.bytes_per_unit[kind] + self.further_bytes) / 1e9
        batch = int(min(most, max(1, (target_gb - fixed) // sample)))
        return batch, max(0.001, round(float(fixed + batch * sample), 3))


def precision(target_gb: float) -> str:
    """The number format in which a training with this memory target is assumed to run."""
    return "fp32" if target_gb < CARD_GB else "bf16"
