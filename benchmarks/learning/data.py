"""What the suite learns from: a cohort of unlabelled phantoms, and labelled ones of other subjects as a dataset of nnU-Net.

Everything is made once, below one folder, and has a hash.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import phantoms
from benchmarks.common import make_plan
from benchmarks.methods import NETWORKS
from nnssl_ext.benchmark.data import folders
from nnssl_ext.benchmark.untrained import untrained
from nnssl_ext.core.files import read_json, sha256_file, sha256_json, write_json
from nnssl_ext.core.plan import NetworkPlan, Normalization, Plan
from nnssl_ext.evaluation.demo_data import PHANTOM_SET, write_dataset_902
from nnssl_ext.finetuning.commands import FOLDERS, Machine, hand_off, run
from nnssl_ext.finetuning.plans import PlanOptions
from nnssl_ext.finetuning.pretrained import Pretrained

SIZE, SPACING = 64, 3.0  # voxels per edge of a volume, mm
LABELLED, TEST = 8, 8  # subjects to fine-tune with, at most, and to test
SUBSETS = (2,)  # labelled subjects of each fold
CONFIGURATION = "3d_fullres"
NANO = "nano"


@dataclass(frozen=True)
class Data:
    """Where the data lie.

    Args:
        root: the suite's folder.
    """

    root: Path

    @staticmethod
    def beside(folder: Path) -> Data:
        """Of the suite that a unit's folder belongs to."""
        return Data(folder.parent.parent)

    @property
    def cohort(self) -> Path:
        """Of `benchmarks.phantoms`."""
        return self.root / "data" / "phantoms"

    def nnunet(self, name: str) -> Path:
        """One of nnU-Net's folders."""
        return self.root / "data" / name

    @property
    def folders(self) -> dict[str, str]:
        """All of them, by their environment variables."""
        return {name: str(self.nnunet(name)) for name in FOLDERS}

    @property
    def labelled(self) -> Path:
        """The raw dataset."""
        return self.nnunet("nnUNet_raw") / PHANTOM_SET

    @property
    def splits(self) -> Path:
        """Subsets of the labelled subjects, nested, in the form of nnU-Net's splits_final.json."""
        return self.root / "data" / "splits.json"

    def digest(self) -> str:
        """Of all volumes, labels and splits."""
        arrays = [sha256_file(self.cohort / f"{name}.npy") for name in ("images", "labels", "bodies")]
        records = (self.cohort / "phantoms.json", self.labelled / "generator.json", self.splits)
        return sha256_json(arrays + [read_json(path) for path in records])

    @property
    def pairs(self) -> Path:
        """Second images of the cohort's subjects, see `phantoms.make_pairs`."""
        return self.root / "data" / "pairs"

    def prepare_pairs(self, processes: int) -> str:
        """Make them where they are missing; their digest. (That of everything else doesn't depend on them.)"""
        phantoms.make_pairs(self.pairs, self.cohort, processes)
        return sha256_json([sha256_file(self.pairs / "images.npy"), read_json(self.pairs / "pairs.json")])

    def plan(self, family: str, edge: int, batch: int) -> Plan:
        """A plan with the smallest network of a backbone family, and the intensities of the cohort.

        Args:
            edge: voxels of the patch.
            batch: volumes per step.
        """
        edges = (edge,) * 3
        network: NetworkPlan = NETWORKS[family]((SPACING,) * 3, edges, NANO, 1e3, batch)
        made = make_plan(edges, family, replace(network, batch_size=batch))
        statistics = Normalization(**read_json(self.cohort / "phantoms.json")["normalization"])
        config = replace(made.configuration(CONFIGURATION), spacing=(SPACING,) * 3, median_shape=(SIZE,) * 3, normalization={"CT": statistics})
        return replace(made, configurations={CONFIGURATION: config})

    def prepare(self, processes: int) -> None:
        """Make whatever is missing, with nnU-Net's own preprocessing."""
        phantoms.make(self.cohort, processes, SIZE, SPACING)
        made = write_dataset_902(self.nnunet("nnUNet_raw"), train=LABELLED, test=TEST, size=SIZE, spacing=SPACING, workers=processes)
        if self.splits.is_file() and not made["written"]:
            return
        shutil.rmtree(self.nnunet("nnUNet_preprocessed"), ignore_errors=True)
        with folders(self.folders):
            checkpoint = untrained(self.plan("resenc", 16, 2), CONFIGURATION, "resenc", 0, self.root / "data" / "untrained.pth")
            handoff = hand_off(Pretrained.load(checkpoint), PHANTOM_SET, PlanOptions(), "nnUNetTrainer")
            run(handoff.preprocess(Machine("cpu")), Machine("cpu"))
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (self.labelled / "labelsTr").glob("*.nii.gz"))
        write_json(self.splits, [{"train": cases[:count], "val": cases[-1:]} for count in SUBSETS])  # nnU-Net wants to validate; it decides nothing
