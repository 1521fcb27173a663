"""Small plans, fingerprints and in-memory stores for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common import ArrayLabels, intensity_labels
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.plan import NetworkPlan, Plan
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


TINY_SHAPE = (20, 24, 22)
MODALITIES = ["CT", "MR", "PET", "US"]  # of the channels of a case
TINY: Mapping[str, Mapping[str, Any]] = {
    "resenc": {
        "n_stages": 3,
        "features_per_stage": [8, 16, 16],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    },
    "primus": {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "patch_embed_size": [4, 4, 4]},
    "segformer3d": {"features_per_stage": [8, 16], "strides": [[2, 2, 2], [2, 2, 2]], "n_blocks_per_stage": [1, 1], "decoder_width": 12},
}


def tiny_plan(channels: int = 1, patch: tuple[int, int, int] = (16, 16, 16)) -> Plan:
    """A plan whose only configuration, 3d_fullres, has small patches and networks that train in milliseconds; a family without an entry in TINY is left out."""
    plan = make_plan(channels=channels, shapes=(TINY_SHAPE,) * 8)
    made = plan.configuration("3d_fullres")
    networks = {family: _tiny(network, TINY[family]) for family, network in made.networks.items() if family in TINY}
    config = dataclasses.replace(made, patch_size=patch, networks=networks)
    return dataclasses.replace(plan, configurations={"3d_fullres": config})


def slice_plan(channels: int = 1, axis: int = 0) -> Plan:
    """A plan whose only configuration, 2d, has slices across an axis in patches of 16 x 16 voxels."""
    order = (axis, *(other for other in range(3) if other != axis))
    spacing, shape = ([values[order.index(other)] for other in range(3)] for values in ((4.0, 3.0, 3.0), TINY_SHAPE))
    plan = make_plan(channels=channels, shapes=(shape,) * 8, spacings=(spacing,) * 8)
    made = plan.configuration("2d")
    flat = {**TINY["resenc"], **{key: [level[1:] for level in TINY["resenc"][key]] for key in ("kernel_sizes", "strides")}}
    patch = tuple(1 if other == axis else 16 for other in range(3))
    config = dataclasses.replace(made, patch_size=patch, networks={"resenc": _tiny(made.networks["resenc"], flat)})
    return dataclasses.replace(plan, configurations={"2d": config})


def _tiny(network: NetworkPlan, kwargs: Mapping[str, Any]) -> NetworkPlan:
    return dataclasses.replace(network, size="tiny", kwargs={**network.kwargs, **kwargs}, batch_size=2, memory_gb=0.001)


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

    def info(self, case: int) -> dict[str, Any]:
        return {"session": "1", "modalities": MODALITIES[: len(self.arrays[case])], "stored": self.geometry(case).as_dict()}

    def body(self, case: int) -> np.ndarray:
        return np.ones([-(-n // 8) for n in self.shape(case)], bool)

    def read(self, case: int, box: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        array = self.arrays[case]
        return array.copy() if box is None else array[(slice(None), *(slice(low, high) for low, high in box))].copy()

    @property
    def identifiers(self) -> list[str]:
        return [f"case{i}" for i in range(len(self))]

    def clusters(self) -> ArrayLabels:
        return intensity_labels(self.arrays)

    def verify(self, case: int) -> None:
        pass

    def data_hash(self) -> str:
        return "0" * 64


def tiny_store(cases: int = 8, channels: int = 1) -> ArrayStore:
    """Cases for `tiny_plan`."""
    return ArrayStore(cases, TINY_SHAPE, channels)


class PairedStore(ArrayStore):
    """Every two cases are of one visit and show the same in two modalities: one image each, or in all channels of either."""

    def __init__(self, cases: int = 8, channels: int = 1) -> None:
        super().__init__(cases, TINY_SHAPE, channels)
        if channels == 1:
            self.arrays = [np.sin(2 * self.arrays[case - 1]) if case % 2 else array for case, array in enumerate(self.arrays)]

    def subject(self, case: int) -> str:
        return f"subject{case // 2}"

    def info(self, case: int) -> dict[str, Any]:
        found = super().info(case)
        return {**found, "modalities": [MODALITIES[case % 2]]} if len(self.arrays[case]) == 1 else found
