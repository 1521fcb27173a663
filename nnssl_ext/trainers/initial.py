"""A new run that starts from the weights of an earlier checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnssl_ext.core.adaptation import decoder_modules
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.paths import RESULTS, root
from nnssl_ext.nn import parallel
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.channels import repeat_channels
from nnssl_ext.nn.tokens import resize_positions
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.model_folder import locate, model_sha256, repository

if TYPE_CHECKING:
    from nnssl_ext.trainers.base import SSLTrainer

_DIGITS = 8  # of the hash, in the name of the results folder
_STUDENT, _TEACHER = "student.", "teacher.net."  # how a model calls them


class Initial:
    """An earlier checkpoint, of `nnssl_train` or of nnssl, whose weights a new run starts from.

    Args:
        identity: "file", relative to $nnssl_results where it lies there, else its name alone; "sha256"; "method" and "step" of its run.
            Of a shared model, "file" is its folder or its name on the Hugging Face Hub, and the hash is that of its weights.
        content: of the checkpoint; empty in a run that has begun and needs no more of it.
    """

    def __init__(self, identity: Mapping[str, Any], content: Mapping[str, Any] | None = None) -> None:
        self.identity, self.content = dict(identity), content or {}

    @staticmethod
    def open(path: str, begun: bool = False) -> Initial:
        """Read a checkpoint.

        Args:
            path: of the file, or what else `load_checkpoint` takes; also relative to $nnssl_results.
            begun: the run has begun, and the digits behind "init=" in its folder's name are enough.

        Raises:
            UserError: the file is missing, damaged or no pretraining checkpoint.
        """
        if begun and re.fullmatch(rf"[0-9a-f]{{{_DIGITS}}}", path):
            return Initial({"sha256": path})
        results = root(RESULTS).resolve()
        remote = repository(path) is not None
        file = (locate(path) if remote or Path(path).exists() else results / path).resolve()
        if begun and not file.exists():
            raise UserError("checkpoint not found", f"option -init {path}", "give instead the digits behind init= in the name of the run's folder")
        content = load_checkpoint(file, foreign=True)
        if "nnssl_adaptation_plan" not in content:
            raise UserError("the checkpoint lacks nnssl_adaptation_plan", file, "give a checkpoint that nnssl_train or nnssl wrote")
        name = path if remote else file.relative_to(results).as_posix() if file.is_relative_to(results) else file.name
        return Initial({"file": name, "sha256": model_sha256(file), "method": content.get("trainer_name"), "step": content.get("step")}, content)

    @property
    def tag(self) -> str:
        """What the name of the results folder shows."""
        return f"init={self.identity['sha256'][:_DIGITS]}"

    def with_heads(self, cls: type) -> bool:
        """Whether a trainer of the class `cls` takes over the whole model: it has the checkpoint's method, or extends it."""
        return "ssl_state" in self.content and self.identity["method"] in [base.__name__ for base in cls.__mro__]

    def fill(self, trainer: SSLTrainer) -> None:
        """Load the weights into the model of an initialised trainer, say what became of them, and forget them here.

        The whole model (see `with_heads`) means heads, centres and queues, and a student gets the weights of the teacher that followed
        it. Any other checkpoint hands over its backbone, to student and teacher.

        Raises:
            UserError: tensors that don't fit, or that are not finite.
        """
        same, content, self.content = self.with_heads(type(trainer)), self.content, {}
        file, family = self.identity["file"], content.get("family", trainer.family)
        if family != trainer.family:
            raise UserError(f"the checkpoint holds a {family} network, this run trains {trainer.family}", file, f"-b {family}, or another checkpoint")
        prefixes, given = _whole(content, trainer.model) if same else _backbones(content, trainer.model, trainer.trains_decoder)
        target = trainer.model.state_dict(keep_vars=True)
        tensors = {name: _fitted(name, given[name], target[name].shape, trainer.backbone, content) for name in target if name in given}
        unlike = {name: f"{name} {_shape(tensors[name])}, here {_shape(target[name])}" for name in tensors if tensors[name].shape != target[name].shape}
        if content["nnssl_adaptation_plan"]["pretrain_num_input_channels"] != trainer.plan.channels:
            unlike = {name: text for name, text in unlike.items() if name.startswith(prefixes)}  # what a head makes of the channels starts anew
        _check({**unlike, **{name: name for name in target.keys() ^ given.keys() if name.startswith(prefixes)}}, tensors, file)
        tensors = {name: value for name, value in tensors.items() if value.shape == target[name].shape}
        parallel.load_weights(trainer.model, tensors, strict=False)
        if trainer.rank == 0:
            resized = _distinct(target, (name for name in tensors if tensors[name] is not given[name]))
            loaded, count = _distinct(target, tensors), _distinct(target, target)
            what = f"{self.identity['method']}, step {self.identity['step']}, {'with its heads' if same else 'backbone only'}"
            print(f"starting from {file} ({what}): {loaded} tensors loaded, {resized} of them resized, {count - loaded} left at their initialisation")


def _whole(content: Mapping[str, Any], model: nn.Module) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Prefixes of what has to be complete, and the whole model's tensors."""
    state = content["ssl_state"]
    taught = {name: state.get(name.replace(_STUDENT, _TEACHER, 1), value) if name.startswith(_STUDENT) else value for name, value in state.items()}
    return tuple(f"{place}net." for place in _places(model) if any(name.startswith(place) for name in state)), taught


def _backbones(content: Mapping[str, Any], model: nn.Module, decoder: bool) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Prefixes of what has to be complete, and the transferred tensors under the names of every backbone in the model."""
    theirs = content["nnssl_adaptation_plan"]
    given: dict[str, Tensor] = {}
    prefixes: list[str] = []
    for place, backbone in _places(model).items():
        ours = backbone.adaptation()
        modules = {theirs["key_to_stem"]: ours.stem, theirs["key_to_encoder"]: ours.encoder}
        if decoder and "decoder" in content.get("transfer", ""):
            modules |= {name: name for name in decoder_modules(content["network_weights"])}
        for old, new in modules.items():
            prefixes.append(f"{place}net.{new}.")
            weights = content["network_weights"]
            given |= {prefixes[-1] + name.removeprefix(f"{old}."): value for name, value in weights.items() if name.startswith(f"{old}.")}
    return tuple(prefixes), given


def _places(model: nn.Module) -> dict[str, Backbone]:
    """The backbones of a model (a student's and its teacher's) by the prefix of their tensors."""
    return {f"{name}." if name else "": module for name, module in model.named_modules() if isinstance(module, Backbone)}


def _fitted(name: str, value: Tensor, shape: torch.Size, backbone: Backbone, content: Mapping[str, Any]) -> Tensor:
    """A tensor for this run's channels and token grid; itself where nothing is to be done."""
    keys, adaptation = backbone.adaptation(), content["nnssl_adaptation_plan"]
    if f".{name}".endswith(tuple(f".{module}.weight" for module in keys.in_proj)) and value.shape[1] != shape[1]:
        return repeat_channels(value, shape[1])
    if keys.positions is not None and name.split(".")[-1] == keys.positions.split(".")[-1]:
        (patch, *_) = (plan["patch_size"] for plan in adaptation["pretrain_plan"]["configurations"].values())
        old, new = ([size // step for size, step in zip(voxels, backbone.strides[-1])] for voxels in (patch, backbone.patch_size))
        theirs, ours = value.shape[1] - math.prod(old), shape[1] - math.prod(new)  # register tokens, whose positions come first
        if theirs >= 0 and ours >= 0 and (old, theirs) != (new, ours):
            first = value[:, :theirs] if theirs == ours else value.new_zeros(1, ours, value.shape[2])
            return torch.cat((first, resize_positions(value[:, theirs:], old, new)), 1)
    return value


def _check(unfit: Mapping[str, str], tensors: Mapping[str, Tensor], file: str) -> None:
    if unfit:
        shown = ", ".join([unfit[name] for name in sorted(unfit)][:3]) + ", ..." * (len(unfit) > 3)
        text = f"{len(unfit)} tensors of the checkpoint and of this run don't fit each other: {shown}"
        raise UserError(text, file, "repeat the options and the network of that run, or give another checkpoint")
    if names := [name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]:
        raise UserError(f"the weights hold NaN or infinity: {', '.join(names[:3])}", file, "use an earlier checkpoint of the same folder")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _distinct(target: Mapping[str, Tensor], names: Iterable[str]) -> int:
    """Number of tensors, those of several names counted once."""
    return len({id(target[name]) for name in names})
