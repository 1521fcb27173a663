"""The page of a plan: what was decided, from which numbers, and what the patch looks like beside a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from nnssl_ext.core.plan import ConfigPlan, Plan
from nnssl_ext.io.page import Section, write_page
from nnssl_ext.planners.primus import local_crop, token_size

AXES = ("z", "y", "x")
PLANES = ((1, 2, "axial"), (0, 2, "coronal"), (0, 1, "sagittal"))  # vertical axis, horizontal axis


def write_plan_page(path: Path, plan: Plan, fingerprint: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: HTML file.
        plan: the plan.
        fingerprint: what it was made from.
    """
    cases = list(fingerprint["cases"].values())
    spacings, shapes = (np.array([case[key] for case in cases], float) for key in ("spacing", "shape_after_crop"))
    median = np.median(spacings, axis=0)
    sections = [_configurations(plan, median), _cases(plan, spacings, shapes), _patches(plan, median), _networks(plan), _decisions(plan)]
    failed = len(fingerprint.get("failed", {}))
    lead = f"{plan.dataset_name}: {len(cases):,} cases, planned by {plan.planner} for {plan.gpu_memory_target_gb:g} GB."
    note = f"{failed:,} cases could not be read and are not part of the plan; see integrity.html." if failed else ""
    write_page(path, f"Plan {plan.plans_name}", lead, sections, note)


def _spacing(config: ConfigPlan, median: np.ndarray) -> np.ndarray:
    return np.asarray(config.spacing_for(median.tolist()))


def _configurations(plan: Plan, median: np.ndarray) -> Section:
    section = Section("Configurations")
    rows: list[list[Any]] = []
    for name, config in plan.configurations.items():
        spacing = "each case's own" if config.spacing is None else ["own" if s is None else round(s, 3) for s in config.spacing]
        local = "–" if config.slice_axis is not None else list(local_crop(config.patch_size, token_size(_spacing(config, median).tolist())))
        rows.append([name, spacing, list(config.median_shape), list(config.patch_size), local])
    section.table(["configuration", "spacing, mm (z, y, x)", "median case, voxels", "patch", "local crop"], rows)
    schemes = next(iter(plan.configurations.values())).normalization.items()
    rows = [[name, s.scheme, *((s.mean, s.std, s.low, s.high) if s.scheme == "ct" else ("–",) * 4)] for name, s in schemes]
    section.table(["modality", "normalisation", "mean", "standard deviation", "clip low", "clip high"], rows)
    return section


def _cases(plan: Plan, spacings: np.ndarray, shapes: np.ndarray) -> Section:
    section = Section("Cases")
    figure = Figure(figsize=(11, 5), layout="constrained")
    target = plan.configurations["3d_fullres"].spacing_for(np.median(spacings, axis=0).tolist())
    for row, (values, label) in enumerate(((spacings, "spacing, mm"), (shapes, "voxels of the body box"))):
        for axis in range(3):
            chart = figure.add_subplot(2, 3, 3 * row + axis + 1)
            low, high = values[:, axis].min(), values[:, axis].max()
            margin = 0.05 * (high - low) or 0.05 * high
            chart.hist(values[:, axis], bins=24, range=(low - margin, high + margin), color="tab:blue")
            chart.set_xlabel(f"{label}, {AXES[axis]}")
            chart.yaxis.set_major_locator(MaxNLocator(integer=True))
            if row == 0:
                chart.axvline(target[axis], color="tab:red", label="3d_fullres")
                chart.legend()
    section.image(figure, "Number of cases by spacing and by size of the body box; red: the spacing of 3d_fullres.")
    return section


def _patches(plan: Plan, median: np.ndarray) -> Section:
    section = Section("What a network sees")
    names = [name for name in plan.configurations if name != "noresample"]
    figure = Figure(figsize=(11, 2.9 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        config = plan.configurations[name]
        spacing = _spacing(config, median)
        for column, (vertical, horizontal, plane) in enumerate(PLANES):
            chart = figure.add_subplot(len(names), 3, 3 * row + column + 1)
            _boxes(chart, config, spacing, vertical, horizontal)
            chart.set_title(f"{name}, {plane}", fontsize=9)
            if row == 0 and column == 0:
                chart.legend(fontsize=7, loc="upper right")
    section.image(figure, "To scale, in mm: the median case, a patch (also the global crop of multi-crop methods) and a local crop with its tokens.")
    return section


def _boxes(chart: Axes, config: ConfigPlan, spacing: np.ndarray, vertical: int, horizontal: int) -> None:
    token = token_size(spacing.tolist())
    shapes = [("median case", config.median_shape, "0.85"), ("patch", config.patch_size, "tab:blue")]
    if config.slice_axis is None:
        shapes.append(("local crop", local_crop(config.patch_size, token), "tab:orange"))
    for label, shape, colour in shapes:
        height, width = shape[vertical] * spacing[vertical], shape[horizontal] * spacing[horizontal]
        corner = (-width / 2, -height / 2)
        chart.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="black", alpha=0.55, label=label, linewidth=0.8))
    if config.slice_axis is None:
        chart.vlines(np.arange(-width / 2, width / 2, token[horizontal] * spacing[horizontal]), -height / 2, height / 2, colors="black", linewidth=0.3)
        chart.hlines(np.arange(-height / 2, height / 2, token[vertical] * spacing[vertical]), -width / 2, width / 2, colors="black", linewidth=0.3)
    chart.set_aspect("equal")
    chart.autoscale_view()
    chart.set_xlabel(f"{AXES[horizontal]}, mm", fontsize=8)
    chart.set_ylabel(f"{AXES[vertical]}, mm", fontsize=8)


def _networks(plan: Plan) -> Section:
    section = Section("Networks")
    rows, bars = [], []
    for name, config in plan.configurations.items():
        for family, network in config.networks.items():
            rows.append([f"{name}, {family}", network.size, network.batch_size, network.memory_gb, network.memory_gb / plan.gpu_memory_target_gb * 100])
            bars.append((f"{name}, {family}", network.memory_gb))
    section.table(["network", "size", "batch", "memory, GB", "share of the target, %"], rows)
    figure = Figure(figsize=(10, 0.32 * len(bars) + 0.9), layout="constrained")
    chart = figure.add_subplot()
    chart.barh([label for label, _ in bars], [memory for _, memory in bars], color="tab:green")
    chart.axvline(plan.gpu_memory_target_gb, color="tab:red")
    chart.invert_yaxis()
    chart.set_xlabel("estimated memory in training, GB; red: the target")
    section.image(figure, "Estimated memory of each network at its batch size.")
    return section


def _decisions(plan: Plan) -> Section:
    section = Section("Decisions")
    section.list(plan.decisions)
    return section
