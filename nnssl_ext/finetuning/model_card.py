"""README.md of a shared model: a model card of the Hugging Face Hub, from what checkpoint and run folder say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nnssl_ext import __version__
from nnssl_ext.core.plan import ConfigPlan
from nnssl_ext.finetuning.pretrained import Pretrained

UNKNOWN = "unknown"
_FIGURES = re.compile(r"(train|val)/|(probe|health)/")


def model_card(
    pretrained: Pretrained,
    content: Mapping[str, Any],
    run: Mapping[str, Any],
    records: list[dict[str, Any]],
    licence: str,
    name: str | None,
    pictures: Iterable[str] = (),
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        pretrained: the checkpoint.
        content: its whole content.
        run: run.json of its run; empty where that is missing.
        records: lines of its metrics.jsonl.
        licence: an identifier of the Hub's list, or "unknown".
        name: owner/name on the Hub; None for a folder.
        pictures: names of the picture files beside the card.
    """
    method = pretrained.method
    where = f"hf://{name}" if name else "FOLDER"
    sections = {
        "": _introduction(pretrained, content),
        "Data": _data(pretrained, content, run),
        "Plan": _plan(pretrained),
        "Method": _method(content, run),
        "Health": _health(content, run, records, pictures),
        "Licence": _licence(licence),
        "Loading": _loading(pretrained, name),
        "Fine-tuning": _commands(pretrained, content, where),
        "Citation": _citation(pretrained),
    }
    title = f"# {name or f'{method} ({pretrained.family})'}\n\n"
    return _front_matter(pretrained, licence) + title + "\n".join(f"## {heading}\n\n{text}\n" if heading else f"{text}\n" for heading, text in sections.items())


def _front_matter(pretrained: Pretrained, licence: str) -> str:
    modalities = [modality.lower() for modality in pretrained.config.normalization]
    tags = ["self-supervised-learning", "medical-imaging", "3d", "nnunet", *modalities, pretrained.family, pretrained.method]
    fields = {"library_name": "nnssl_ext", "license": licence, "pipeline_tag": "image-feature-extraction", "tags": list(dict.fromkeys(tags))}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---\n\n"  # JSON is YAML


def _introduction(pretrained: Pretrained, content: Mapping[str, Any]) -> str:
    what = "encoder and decoder" if "decoder" in str(content.get("transfer")) else "the encoder"
    return (
        f"A {pretrained.family} backbone for medical images of {pretrained.channels} channel(s), pretrained without labels by {content['trainer_name']} "
        f"of nnssl_ext; {what} was trained. It segments nothing by itself: fine-tune it, or read its features."
    )


def _data(pretrained: Pretrained, content: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    config, cases = pretrained.config, run.get("cases") or {}
    counts = f"{sum(cases.values())} ({', '.join(f'{count} for {use}' for use, count in cases.items())})" if cases else "not recorded beside the checkpoint"
    rows = {
        "dataset": pretrained.plan.dataset_name,
        "volumes": counts,
        "modality": ", ".join(config.normalization),
        "channels": pretrained.plan.channels,
        "median volume after cropping and resampling": f"{_sizes(config.median_shape)} voxels (z, y, x)",
        "SHA-256 of the fingerprint": f"`{pretrained.plan.fingerprint_sha256}`",
        "SHA-256 of the preprocessed data": f"`{content['data_hash']}`" if content.get("data_hash") else "not recorded",
    }
    return _table(("", ""), rows.items())


def _plan(pretrained: Pretrained) -> str:
    config, network = pretrained.config, pretrained.network
    rows = {
        "configuration": pretrained.configuration,
        "spacing": _spacing(config),
        "patch": f"{_sizes(config.patch_size)} voxels (z, y, x)",
        "network": f"`{network.class_name}`, size {network.size}",
        "planner": pretrained.plan.planner,
    }
    rows |= {f"normalisation of {modality}": _normalisation(values) for modality, values in config.normalization.items()}
    decisions = "".join(f"- {sentence}\n" for sentence in pretrained.plan.decisions)
    return _table(("", ""), rows.items()) + (f"\n\nDecisions of the planner:\n\n{decisions}" if decisions else "")


def _normalisation(values: Any) -> str:
    if values.scheme == "ct":
        return f"clip to [{values.low:g}, {values.high:g}], subtract {values.mean:g}, divide by {values.std:g}"
    return str(values.scheme)


def _spacing(config: ConfigPlan) -> str:
    if config.spacing is None:
        return "each case's own"
    return " x ".join("own" if edge is None else f"{edge:g}" for edge in config.spacing) + " mm (z, y, x)"


def _method(content: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    options, changed = content.get("config") or {}, run.get("overrides") or {}
    rows = [(f"`{key}`", f"`{_value(value)}`" + (" (not the default)" if key in changed else "")) for key, value in options.items()]
    packages = ", ".join(f"{package} {version}" for package, version in (content.get("versions") or {}).items()) or "not recorded"
    text = f"{content['trainer_name']}, {content.get('step', 'an unknown number of')} optimiser steps. Packages: {packages}.\n\n"
    if content.get("init"):
        text += f"Started from the weights of {content['init'].get('method')}, step {content['init'].get('step')}.\n\n"
    if run.get("recipe"):
        text += f"Optimisation: {', '.join(f'{key} {_value(value)}' for key, value in run['recipe'].items())}; batch size {run.get('batch_size')}.\n\n"
    return text + (_table(("option", "value"), rows) if rows else "")


def _health(content: Mapping[str, Any], run: Mapping[str, Any], records: list[dict[str, Any]], pictures: Iterable[str]) -> str:
    if not records:
        return "The run folder was not beside the checkpoint: nothing is known of losses and alarms."
    alarms = [(record.get("epoch", -1) + 1, text) for record in records for text in record.get("alarms", ())]
    text = "".join(f"- alarm in epoch {epoch}: {alarm}\n" for epoch, alarm in alarms) or "No alarm.\n"
    last = records[-1]
    if last.get("step") != content.get("step"):
        text += f"\nThe figures are those after step {last.get('step')}, the weights those after step {content.get('step')}.\n"
    rows = [(key, f"{value:.4g}") for key, value in last.items() if _FIGURES.match(key) and isinstance(value, (int, float)) and math.isfinite(value)]
    text += f"\nFigures of epoch {last.get('epoch', -1) + 1}" + (f" of {run['config']['epochs']}" if "epochs" in run.get("config", {}) else "") + ":\n\n"
    return text + _table(("figure", "value"), rows) + "".join(f"\n\n![{picture}]({picture})" for picture in pictures)


def _licence(licence: str) -> str:
    if licence == UNKNOWN:
        return "**UNKNOWN.** Whoever shared this model named no licence: ask before you use it, and respect the terms of the pretraining data."
    return f"Weights: `{licence}`. The terms of the pretraining data apply as well."


def _loading(pretrained: Pretrained, name: str | None) -> str:
    folder = f'Path(snapshot_download("{name}"))' if name else 'Path(".")  # where this file lies'
    primus = "patch_embed_size" in pretrained.network.kwargs
    lines = [
        "import json",
        "from pathlib import Path",
        "from pydoc import locate",
        "",
        *(["import torch"] if primus else []),
        *(["from huggingface_hub import snapshot_download"] if name else []),
        "from safetensors.torch import load_model",
        "",
        f"folder = {folder}",
        'about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["checkpoint"]',
        'config = about["plan"]["configurations"][about["configuration"]]',
        'network = config["networks"][about["family"]]',
        'arguments = {key: locate(value) if key in network["imports"] and value else value for key, value in network["kwargs"].items()}',
        *(['arguments["input_shape"] = config["patch_size"]'] if primus else []),
        'net = locate(network["class_name"])(input_channels=about["plan"]["channels"], num_classes=2, **arguments)',
        *(["net.up_projection = torch.nn.Identity()  # the decoder was not pretrained"] if primus else []),
        'load_model(net, folder / "model.safetensors")',
        "net.eval()",
    ]
    package = pretrained.network.class_name.split(".")[0]
    needed = "PyTorch, safetensors and " + ("nnssl_ext" if package == "nnssl_ext" else package.replace("_", "-"))
    code = "\n".join(lines)
    given = f"hf://{name}" if name else "."
    dense = f'from nnssl_ext.evaluation.features import Extractor\n\nextractor = Extractor.load("{given}")'
    return (
        f"With {needed}:\n\n```python\n{code}\n```\n\nWith nnssl_ext, for dense features of preprocessed volumes (`extractor.features(volume, geometry)`):\n\n"
        f"```python\n{dense}\n```\n\nImages have to be resampled and normalised as the plan says; nnssl_ext and the nnU-Net plans that it writes do so."
    )


def _commands(pretrained: Pretrained, content: Mapping[str, Any], where: str) -> str:
    lines = [
        f"nnssl_finetune -ckpt {where} -d 901 -f 0    # 901: a dataset in nnU-Net's raw format",
        f"nnssl_features -ckpt {where} -i imagesTs -o features",
        f"nnssl_train 801 {pretrained.configuration} -tr {content['trainer_name']} -b {pretrained.family} -init {where}    # pretrain further",
    ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def _citation(pretrained: Pretrained) -> str:
    texts = [text for entry in pretrained.citations for text in entry.get("apa_citations", ())]
    return (
        "".join(f"- {text}\n" for text in texts)
        + f"- The nnssl_ext contributors. nnssl_ext {__version__}: self-configuring self-supervised pretraining of 3D medical images."
    )


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows)])


def _sizes(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
