"""Small raw datasets on disk for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from nnssl_ext.core.rng import sample_rng


def body_volume(shape: Sequence[int] = (20, 24, 28), index: int = 0) -> np.ndarray:
    """A CT-like ball of tissue in air, int16 (z, y, x)."""
    rng = sample_rng(0, index, "test volume")
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = z**2 + y**2 + x**2 < 0.7 + 0.02 * index
    tissue = 40 + 60 * np.sin(4 * x + index) + rng.normal(0, 10, tuple(shape))
    return np.where(inside, tissue, -1000).astype(np.int16)


def write_image(path: Path, array: np.ndarray, spacing: Sequence[float] = (3.0, 2.0, 2.0), origin: Sequence[float] = (10.0, -20.0, 30.0)) -> Path:
    """Write (z, y, x) with spacing (z, y, x) and origin (x, y, z)."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing][::-1][: image.GetDimension()])
    image.SetOrigin([float(o) for o in origin][: image.GetDimension()])
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def nnunet_dataset(root: Path, cases: int = 3, channels: int = 1, name: str = "Dataset801_Test", modality: str = "CT") -> Path:
    """An nnU-Net raw folder with `cases` volumes."""
    folder = root / name
    for case in range(cases):
        for channel in range(channels):
            write_image(folder / "imagesTr" / f"case{case}_{channel:04d}.nii.gz", body_volume(index=case))
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {str(c): modality for c in range(channels)}, "file_ending": ".nii.gz", "labels": {"background": 0}})
    )
    return folder


def pretrain_dataset(root: Path, subjects: int = 3, name: str = "Dataset802_Test") -> Path:
    """nnssl's pretrain_data.json: each subject has a CT and an MR session."""
    folder, entries = root / name, {}
    for subject in range(subjects):
        sessions = {}
        for session, modality in enumerate(("CT", "MR")):
            array = body_volume(index=2 * subject + session)
            path = write_image(folder / "images" / f"s{subject}" / f"{modality}.nii.gz", array if modality == "CT" else (array + 1000).astype(np.int16))
            image = {"name": path.name, "modality": modality, "image_path": f"$nnssl_raw/{path.relative_to(root)}", "image_info": {}, "associated_masks": None}
            sessions[f"ses{session}"] = {"session_id": f"ses{session}", "session_info": {}, "images": [image]}
        entries[f"s{subject}"] = {"subject_id": f"s{subject}", "subject_info": {"age": 50}, "sessions": sessions}
    datasets = {"7": {"dataset_index": "7", "name": "test", "dataset_info": {}, "subjects": entries}}
    (folder / "pretrain_data.json").write_text(json.dumps({"collection_index": 802, "collection_name": name, "datasets": datasets}))
    return folder
