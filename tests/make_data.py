"""Small plans, fingerprints and in-memory stores for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.plan import Plan
from nnssl_ext.planners.planner import Planner


def make_fingerprint(
    shapes: Sequence[Sequence[int]] = ((40, 48, 44),) * 8,
    spacings: Sequence[Sequence[float]] = ((3.0, 3.0, 3.0),) * 8,
    modality: str = "CT",
    channels: int = 1,
) -> dict[str, Any]:
    """A fingerprint with the fields that a planner reads."""
    cases = {
        f"case{i:03d}": {
            "subject": f"s{i}",
            "modalities": [modality] * channels,
            "shape": list(shape),
            "shape_after_crop": list(shape),
            "spacing": list(spacing),
        }
        for i, (shape, spacing) in enumerate(zip(shapes, spacings))
    }
    statistics = {
        "mean": 40.0,
        "std": 120.0,
        "median": 50.0,
        "min": -1000.0,
        "max": 1500.0,
        "percentile_00_5": -800.0,
        "percentile_99_5": 600.0,
        "voxels": 1000,
    }
    return {"schema_version": 1, "dataset_name": "Dataset801_Test", "channels": channels, "cases": cases, "intensities": {modality: statistics}, "failed": {}}


def make_plan(memory_gb: float = 0.5, **fingerprint: Any) -> Plan:
    """A plan of small networks (32^3 patches by default)."""
    return Planner(make_fingerprint(**fingerprint), memory_gb).plan("nnsslPlans")


class ArrayStore:
    """The reading side of a CaseStore, in memory: smooth textures that differ from case to case."""

    def __init__(self, cases: int = 8, shape: Sequence[int] = (40, 48, 44), channels: int = 1, spacing: Sequence[float] = (3.0, 3.0, 3.0)) -> None:
        self.spacing = tuple(spacing)
        z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
        self.arrays = [
            np.stack([np.sin(z / 5 + i) + np.cos(y / (4 + c) + 0.1 * i) + np.sin(x / 3 + c) for c in range(channels)]).astype(np.float32) for i in range(cases)
        ]

    def __len__(self) -> int:
        return len(self.arrays)

    def shape(self, case: int) -> tuple[int, ...]:
        return self.arrays[case].shape[1:]

    def subject(self, case: int) -> str:
        return f"subject{case}"

    def fill(self, case: int) -> list[float]:
        return [float(channel.min()) for channel in self.arrays[case]]

    def geometry(self, case: int) -> Geometry:
        return Geometry(self.shape(case), self.spacing)

    def body(self, case: int) -> np.ndarray:
        return np.ones([-(-n // 8) for n in self.shape(case)], bool)

    def read(self, case: int, box: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        array = self.arrays[case]
        return array.copy() if box is None else array[(slice(None), *(slice(low, high) for low, high in box))].copy()

    def data_hash(self) -> str:
        return "0" * 64
