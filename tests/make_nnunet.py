"""Small nnU-Net datasets, and checkpoints as `nnssl_train` writes them, for tests of the hand-off."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

from nnssl_ext.core.plan import NetworkPlan, Plan
from nnssl_ext.finetuning.commands import hand_off
from nnssl_ext.finetuning.plans import PlanOptions
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.planners.primus import network as primus_network
from nnssl_ext.trainers.checkpoint import adaptation_plan, save_checkpoint
from nnssl_ext.trainers.dinov2_presets import with_registers
from tests.make_data import make_plan

LABELS: dict[str, Any] = {"background": 0, "organ": 1, "tumour": 2}


def make_checkpoint(
    path: Path,
    family: str,
    channels: int = 1,
    configuration: str = "3d_fullres",
    transfer: str = "encoder",
    size: str | None = None,
    modality: str = "CT",
    registers: int = 0,
    plan: Plan | None = None,
) -> Path:
    """A checkpoint with random weights of a tiny backbone (patch 32x32x32, spacing 3 mm).

    Args:
        path: the file to write.
        family: name of the backbone family.
        channels: input channels of the pretraining.
        configuration: of the plan.
        transfer: "encoder" or "encoder+decoder".
        size: of a Primus, such as "S"; default: the plan's.
        modality: of the pretraining images.
        registers: register tokens of a Primus.
        plan: of the pretraining, in place of that one.
    """
    plan = plan or make_plan(channels=channels, modality=modality)
    config = plan.configuration(configuration)
    if size is not None:
        network: NetworkPlan = primus_network((3.0, 3.0, 3.0), config.patch_size, size, 4.0, 2)
        config = dataclasses.replace(config, networks={**config.networks, "primus": network})
        plan = dataclasses.replace(plan, configurations={**plan.configurations, configuration: config})
    plan = with_registers(plan, configuration, family, registers)
    config = plan.configuration(configuration)
    torch.manual_seed(1)
    backbone = build_backbone(config, family, channels)
    for tensor in backbone.net.state_dict().values():  # nothing may equal an initial value (zeros, ones)
        if tensor.is_floating_point():
            tensor.add_(0.01 * torch.randn_like(tensor))
    save_checkpoint(
        path,
        {
            "trainer_name": "MAETrainer",
            "family": family,
            "configuration": configuration,
            "plan": plan.as_dict(),
            "config": {},
            "step": 3,
            "transfer": transfer,
            "network_weights": backbone.network_weights(),
            "nnssl_adaptation_plan": adaptation_plan(backbone, config, configuration).as_dict(),
            "citations": [{"type": "Pretraining Method", "name": "MAE", "apa_citations": ["He et al. 2022"]}],
        },
    )
    return path


def make_dataset(
    roots: dict[str, Path], number: int = 901, channels: Sequence[str] = ("CT",), labels: dict[str, Any] | None = None, cases: int = 5, listed: bool = True
) -> str:
    """An nnU-Net raw dataset of random blobs (36^3 voxels of 3 mm), with one test case; returns its name.

    Args:
        roots: the folders by the names of nnU-Net's environment variables.
        number: dataset ID.
        channels: channel names.
        labels: of dataset.json; the segmentations hold 0, 1 and 2.
        cases: training cases.
        listed: name the files in dataset.json; without, nnU-Net forks 12 processes to find them.
    """
    name, rng = f"Dataset{number:03d}_Tiny", np.random.default_rng(number)
    folder = roots["nnUNet_raw"] / name
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for case in range(cases + 1):
        half = "Ts" if case == cases else "Tr"
        z, y, x = np.meshgrid(*(np.arange(36),) * 3, indexing="ij")
        centre = rng.uniform(14, 22, 3)
        distance = np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
        segmentation = (distance < 10).astype(np.uint8) + (distance < 5)
        for channel in range(len(channels)):
            image = 100.0 * segmentation + rng.normal(0, 20, segmentation.shape)
            _write(image.astype(np.float32), folder / f"images{half}" / f"case{case}_{channel:04d}.nii.gz")
        _write(segmentation.astype(np.uint8), folder / f"labels{half}" / f"case{case}.nii.gz")
    description: dict[str, Any] = {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": labels or LABELS,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if listed:
        files = {
            f"case{i}": {"images": [f"imagesTr/case{i}_{c:04d}.nii.gz" for c in range(len(channels))], "label": f"labelsTr/case{i}.nii.gz"}
            for i in range(cases)
        }
        description["dataset"] = files
    if any(isinstance(value, list) for value in description["labels"].values()):
        description["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(description))
    return name


def write_fingerprint(roots: dict[str, Path], name: str, channels: int, relative_size: float = 1.0, cases: int = 5) -> None:
    """What `nnUNetv2_extract_fingerprint` would write for `make_dataset`, without its processes."""
    statistics = {"mean": 7.0, "median": 6.0, "std": 3.0, "min": -9.0, "max": 99.0, "percentile_99_5": 90.0, "percentile_00_5": -5.0}
    content = {
        "spacings": [[3.0, 3.0, 3.0]] * (cases - 1) + [[6.0, 6.0, 6.0]],
        "shapes_after_crop": [[36, 36, 36]] * cases,
        "foreground_intensity_properties_per_channel": {str(i): dict(statistics) for i in range(channels)},
        "median_relative_size_after_cropping": relative_size,
    }
    folder = roots["nnUNet_preprocessed"] / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_fingerprint.json").write_text(json.dumps(content))


def preprocess(folder: Path, monkeypatch: Any) -> dict[str, Path]:
    """nnU-Net's folders with the dataset 901, fingerprinted and preprocessed by nnU-Net itself for plans of our kind."""
    roots = make_roots(folder, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    pretrained = Pretrained.load(make_checkpoint(folder / "c.pth", "resenc"))
    handoff = hand_off(pretrained, make_dataset(roots, 901), PlanOptions(), "nnUNetTrainer")
    preprocess_dataset(901, handoff.plans.stem, ("3d_fullres",), (1,), show_progress_bar=False)
    return roots


def make_roots(folder: Path, monkeypatch: Any) -> dict[str, Path]:
    """nnU-Net's three folders below `folder`, set in the environment."""
    roots = {name: folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, path in roots.items():
        path.mkdir(exist_ok=True, parents=True)
        monkeypatch.setenv(name, str(path))
    return roots


def _write(array: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((3.0, 3.0, 3.0))
    sitk.WriteImage(image, str(path))
