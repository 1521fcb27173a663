"""The whole thread on embedded data: raw volumes, plan, pretraining, hand-off to stock nnU-Net, one page about it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from matplotlib.figure import Figure

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.evaluation.demo_data import make_demo_data
from nnssl_ext.finetuning import nnunet_trainers
from nnssl_ext.finetuning.trainers import EPOCHS_VARIABLE, ITERATIONS_VARIABLE
from nnssl_ext.io.page import Section, write_page
from nnssl_ext.trainers.run_page import health
from nnssl_ext.trainers.sinks import read_metrics

FINETUNE = {EPOCHS_VARIABLE: "15", ITERATIONS_VARIABLE: "40"}
AGREEING = ("momentum=0.96,0.999", "global_share=0.5,1", "local_share=0.1,0.4")  # a fast teacher and views that agree more: the run is short
PRETRAIN = ("epochs=10", "iterations=15", *AGREEING)
TRAINER = "nnsslPrimusTrainer_short"
_PROGRESS = re.compile(r"\d+%\|")  # a state of a progress bar, of no use in a log
FOLDERS = ("nnssl_raw", "nnssl_preprocessed", "nnssl_results", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class Demo:
    """Runs the console commands one after the other as a user would, and keeps what they say.

    Args:
        folder: everything is written below it.
        phantom: procedural phantoms (offline) instead of the real torso volumes.
    """

    def __init__(self, folder: Path, phantom: bool) -> None:
        self.folder, self.phantom = folder.resolve(), phantom
        self.unlabelled, self.labelled = (802, 902) if phantom else (801, 901)
        self.commands: list[tuple[str, float]] = []
        self.environment = dict(os.environ) | {name: str(self.folder / name) for name in FOLDERS} | FINETUNE
        self.environment |= {"nnUNet_extTrainer": nnunet_trainers.__path__[0], "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
        self.environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait must not burn the cores that others need

    def run(self) -> Path:
        """All steps; returns the page.

        Raises:
            UserError: a command failed; its output was shown and is kept in the folder's logs.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True)
        start = time.monotonic()
        self.data = make_demo_data(self.folder / "nnssl_raw", self.folder / "nnUNet_raw", phantom=self.phantom)
        self.commands.append(("(embedded data written)", time.monotonic() - start))
        unlabelled, labelled = str(self.unlabelled), str(self.labelled)
        self.call("nnssl_plan_and_preprocess", "-d", unlabelled, "-gpu_memory_target", "1", "-np", "2")
        self.call("nnssl_train", unlabelled, "3d_fullres", "-tr", "DINOv2Trainer", "-device", "cpu", "-o", *PRETRAIN)
        (checkpoint,) = (self.folder / "nnssl_results").glob("*/*/fold_all/checkpoint_final.pth")
        exported = self.folder / "exported"
        report = self.call("nnssl_export", "-ckpt", str(checkpoint), "-d", labelled, "-out", str(exported), "-batch_size", "2", "-np", "2")
        (weights,) = exported.glob("*.pth")
        (plans,) = (self.folder / "nnUNet_preprocessed").glob("*/nnssl_*.json")
        self.call("nnUNetv2_preprocess", "-d", labelled, "-plans_name", plans.stem, "-c", "3d_fullres", "-np", "2")
        train, short = ("nnUNetv2_train", labelled, "3d_fullres", "0", "-p", plans.stem), ("-tr", TRAINER, "-device", "cpu")
        scores = {}
        for name, options in (("fine-tuned", ("-pretrained_weights", str(weights))), ("from scratch", ())):
            self.environment["nnUNet_results"] = str(self.folder / "nnUNet_results" / name.replace(" ", "_"))
            self.call(*train, *options, *short)
            scores[name] = self.predict(name.replace(" ", "_"), plans.stem)
        return self.page(checkpoint.parent, report, scores)

    def predict(self, name: str, plans: str) -> dict[str, Any]:
        """Predict the test volumes with stock nnU-Net and score them; its summary.json."""
        (raw,) = (self.folder / "nnUNet_raw").iterdir()
        out = self.folder / "predictions" / name
        self.call(
            "nnUNetv2_predict", "-i", str(raw / "imagesTs"), "-o", str(out), "-d", str(self.labelled), "-c", "3d_fullres", "-f", "0", "-p", plans,
            "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta", "-step_size", "0.75",
        )  # fmt: skip
        self.call(
            "nnUNetv2_evaluate_folder", str(raw / "labelsTs"), str(out), "-djfile", str(out / "dataset.json"), "-pfile", str(out / "plans.json"), "-np", "1"
        )
        summary: dict[str, Any] = read_json(out / "summary.json")
        return summary

    def call(self, *command: str) -> str:
        """Run a console command of this environment and show its output; returns what it printed."""
        shown = shlex.join(part.replace(str(self.folder), "$DEMO") for part in command)
        print(f"\n$ {shown}", flush=True)
        start, printed = time.monotonic(), []
        program = str(Path(sys.executable).parent / command[0])
        with subprocess.Popen([program, *command[1:]], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not _PROGRESS.search(line):
                    printed.append(line)
                    print("   ", line.rstrip(), flush=True)
        self.commands.append((shown, time.monotonic() - start))
        log = self.folder / "logs" / f"{len(self.commands):02d}_{command[0]}.txt"
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(printed), encoding="utf-8")
        if process.returncode:
            raise UserError(f"{command[0]} ended with exit code {process.returncode}", log, "read its output above")
        return "".join(printed)

    def page(self, run: Path, report: str, scores: dict[str, dict[str, Any]]) -> Path:
        """Write index.html."""
        sections = [
            self._data(),
            self._plan(),
            *_pretraining(run),
            _export(report.replace(str(self.folder), "$DEMO")),
            self._finetuning(scores),
            self._commands(),
        ]
        note = (
            "This is a smoke run: minutes of training on a handful of volumes. It shows that every step works together; its Dice values say nothing about "
            f"what pretraining is worth. Data are {self.data['sentence']}."
        )
        path = self.folder / "index.html"
        lead = "From raw volumes to a network that stock nnU-Net fine-tuned from a self-supervised checkpoint, on this machine's CPU."
        write_page(path, "nnssl_ext demo", lead, sections, note)
        return path

    def _data(self) -> Section:
        section = Section("Data and fingerprint")
        (file,) = (self.folder / "nnssl_preprocessed").glob("*/dataset_fingerprint.json")
        fingerprint = read_json(file)
        cases = list(fingerprint["cases"].values())
        modalities = sorted({m for case in cases for m in case["modalities"]})
        rows = []
        for modality in modalities:
            chosen = [case for case in cases if modality in case["modalities"]]
            statistics = fingerprint["intensities"][modality]
            rows.append(
                [
                    modality,
                    len(chosen),
                    len({case["subject"] for case in chosen}),
                    *(np.median([case[key] for case in chosen], axis=0).tolist() for key in ("shape", "spacing")),
                ]
                + [statistics["mean"], statistics["std"], statistics["percentile_00_5"], statistics["percentile_99_5"]]
            )
        header = ["modality", "volumes", "subjects", "median shape, voxels", "median spacing, mm", "mean", "std", "0.5 %", "99.5 %"]
        section.text(f"Dataset {fingerprint['dataset_name']}: intensities are those of the body's voxels.")
        section.table(header, rows)
        return section

    def _plan(self) -> Section:
        section = Section("Plan")
        (file,) = (self.folder / "nnssl_preprocessed").glob("*/nnsslPlans.json")
        plan = read_json(file)
        section.text(f"Derived from the fingerprint for {plan['gpu_memory_target_gb']:g} GB:")
        section.list(plan["decisions"])
        return section

    def _finetuning(self, scores: dict[str, dict[str, Any]]) -> Section:
        section = Section("Fine-tuning by nnU-Net")
        epochs, iterations = FINETUNE.values()
        section.text(
            f"Both networks: same plan, same trainer ({TRAINER}, {epochs} epochs of {iterations} steps), same data; they differ in their first weights only. "
            "Dice of the test volumes, mean over cases. (Without -tr, nnU-Net trains 1,000 epochs of 250 steps, which is nothing for minutes on a CPU.)"
        )
        (raw,) = (self.folder / "nnUNet_raw").iterdir()
        labels = {str(value): name for name, value in read_json(raw / "dataset.json")["labels"].items() if value != 0}
        dice = {name: [summary["mean"][value]["Dice"] for value in labels] for name, summary in scores.items()}
        rows = [[label, *(values[i] for values in dice.values())] for i, label in enumerate(labels.values())]
        section.table(["label", *dice], [*rows, ["mean", *(float(np.nanmean(values)) for values in dice.values())]])
        cases = len(next(iter(scores.values()))["metric_per_case"])
        section.text(f"{cases} test volumes, one seed, minutes of training: which of the two is ahead here says nothing about pretraining in general.")
        section.image(self._predictions(raw, list(scores)), "A test volume: reference and predictions, middle coronal slice.")
        for name in scores:
            (curve,) = (self.folder / "nnUNet_results" / name.replace(" ", "_")).glob("*/*/fold_0/progress.png")
            section.image(_smaller(curve), f"nnU-Net's training curves, {name}.")
        return section

    def _predictions(self, raw: Path, names: Sequence[str]) -> Figure:
        case = sorted((raw / "labelsTs").glob("*.nii.gz"))[0].name
        image = raw / "imagesTs" / case.replace(".nii.gz", "_0000.nii.gz")
        volumes = {"reference": raw / "labelsTs" / case} | {name: self.folder / "predictions" / name.replace(" ", "_") / case for name in names}
        grey = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image)))
        middle = grey.shape[1] // 2
        figure = Figure(figsize=(4 * len(volumes), 4.2), layout="constrained")
        for axis, (caption, file) in zip(figure.subplots(1, len(volumes)), volumes.items()):
            label = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))[:, middle]
            axis.imshow(grey[:, middle], cmap="gray", origin="lower", vmin=np.percentile(grey, 1), vmax=np.percentile(grey, 99))
            axis.imshow(np.ma.masked_equal(label, 0), cmap="tab10", origin="lower", alpha=0.55, vmin=1, vmax=10, interpolation="nearest")
            axis.set_title(caption)
            axis.set_axis_off()
        return figure

    def _commands(self) -> Section:
        section = Section("Commands")
        section.text("Everything above came from these commands ($DEMO is the demo's folder):")
        section.table(["command", "seconds"], [[command, round(seconds, 1)] for command, seconds in self.commands])
        section.code("\n".join(f"export {name}={self.environment[name].replace(str(self.folder), '$DEMO')}" for name in (*FOLDERS, *FINETUNE)))
        return section


def _pretraining(run: Path) -> list[Section]:
    section, settings, records = Section("Pretraining"), read_json(run / "run.json"), read_metrics(run / "metrics.jsonl")
    section.text(
        f"{settings['trainer']} on {settings['family']}: {settings['cases']['train']} volumes for training, {settings['cases']['validation']} of other "
        f"subjects for validation, {settings['total_steps']} steps of {settings['batch_size']} volumes. A backbone for use takes some thousand times as many."
    )
    section.image(run / "progress.png", "Losses, figures of the features, learning rate and throughput over the epochs.")
    pictures = sorted((run / "pictures").glob("*.png"))
    section.image(pictures[0], "What the network sees after the first epoch (three orthogonal slices each): crops, hidden tokens, the teacher's features.")
    section.image(pictures[-1], "The same after the last epoch.")
    checks = health(records)
    alarms = [f"Epoch {record['epoch'] + 1}: {text}" for record in records for text in record.get("alarms", ())]
    if alarms:
        checks.list(alarms)
    checks.text(f"{len(alarms) or 'No'} alarm{'s were' if len(alarms) > 1 else ' was'} raised. The run's own page shows the same charts while it trains.")
    return [section, checks]


def _export(report: str) -> Section:
    section = Section("Hand-off to nnU-Net")
    section.code(report.strip())
    return section


def _smaller(picture: Path, width: int = 900) -> Figure:
    """nnU-Net's curves are over 3,000 pixels wide; redrawn for a page."""
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    figure = Figure(figsize=(width / 90, width / 90 * pixels.shape[0] / pixels.shape[1]))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(pixels, interpolation="antialiased")
    axis.set_axis_off()
    return figure
