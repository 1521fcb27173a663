"""What fine-tuning takes from a pretraining checkpoint, and how it is fitted to other channels and patch sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_ext.core.adaptation import decoder_modules
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import ConfigPlan, NetworkPlan, Plan
from nnssl_ext.nn.backbones.base import Backbone, backbone_class, build_backbone, check_divisible
from nnssl_ext.nn.channels import repeat_channels
from nnssl_ext.nn.tokens import resize_positions
from nnssl_ext.trainers.checkpoint import load_checkpoint
from nnssl_ext.trainers.model_folder import locate

_NEEDED = ("trainer_name", "family", "configuration", "plan", "nnssl_adaptation_plan")
REGISTERS = "register_tokens"  # of Primus, a parameter; their positions come before those of the patches


@dataclass(frozen=True)
class Pretrained:
    """A pretraining checkpoint, read.

    Args:
        path: the checkpoint's file, or the folder of a shared model.
        method: name of the SSL method, letters and digits.
        family: backbone family.
        configuration: name of the pretraining configuration.
        plan: the pretraining plan.
        modules: the modules (and single parameters) that are transferred, by their names in the library's network.
        weights: their tensors, by the names of the library's state dict (aliases included).
        adaptation: the checkpoint's adaptation plan.
        citations: what to cite.
    """

    path: Path
    method: str
    family: str
    configuration: str
    plan: Plan
    modules: tuple[str, ...]
    weights: dict[str, Tensor]
    adaptation: dict[str, Any]
    citations: list[Any]

    @staticmethod
    def load(path: Path | str) -> Pretrained:
        """Read a checkpoint that `nnssl_train` wrote, or a model that was made of one to be shared; see `load_checkpoint`.

        Raises:
            UserError: unreadable file, or one without plan and adaptation plan.
        """
        path = locate(path)
        content = load_checkpoint(path)
        missing = [key for key in _NEEDED if key not in content]
        if missing:
            raise UserError(f"the checkpoint lacks {', '.join(missing)}", path, "give a checkpoint that nnssl_train wrote")
        adaptation = content["nnssl_adaptation_plan"]
        modules: tuple[str, ...] = (adaptation["key_to_stem"], adaptation["key_to_encoder"])
        modules += decoder_modules(content["network_weights"]) if "decoder" in content.get("transfer", "encoder") else ()
        modules += (REGISTERS,) if REGISTERS in content["network_weights"] else ()
        weights = {key: value for key, value in content["network_weights"].items() if inside(key, modules)}
        bad = [key for key, value in weights.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        if bad:
            raise UserError(f"the pretrained weights hold NaN or infinity: {', '.join(bad[:3])}", path, "use an earlier checkpoint of the same folder")
        return Pretrained(
            path=path,
            method=re.sub(r"[^A-Za-z0-9]", "", content["trainer_name"].removesuffix("Trainer")) or "SSL",
            family=content["family"],
            configuration=content["configuration"],
            plan=Plan.from_dict(content["plan"], path),
            modules=modules,
            weights=weights,
            adaptation=adaptation,
            citations=list(content.get("citations") or []),
        )

    @property
    def config(self) -> ConfigPlan:
        return self.plan.configuration(self.configuration)

    @property
    def network(self) -> NetworkPlan:
        return self.config.network(self.family)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels of the pretraining's patch along the axes of the network: (z, y, x), of slices two of them."""
        axis = self.config.slice_axis
        return tuple(size for other, size in enumerate(self.config.patch_size) if other != axis)

    @property
    def channels(self) -> int:
        return int(self.adaptation["pretrain_num_input_channels"])

    @property
    def identity(self) -> str:
        """Hexadecimal SHA-256 of the transferred tensors and of what they were trained with; the same for copies of the file."""
        digest = hashlib.sha256(repr((self.method, self.family, self.configuration, self.modules, self.plan.fingerprint_sha256)).encode())
        for key in sorted(self.weights):
            tensor = self.weights[key].contiguous()
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def encoder(self) -> Pretrained:
        """The same without a decoder."""
        modules = tuple(module for module in self.modules if module in (self.adaptation["key_to_stem"], self.adaptation["key_to_encoder"], REGISTERS))
        return dataclasses.replace(self, modules=modules, weights={key: value for key, value in self.weights.items() if inside(key, modules)})

    def check_patch_size(self, patch_size: Sequence[int]) -> None:
        """Raise a `UserError` unless the network takes patches of `patch_size` voxels, along its axes."""
        kwargs = self.network.kwargs
        if len(patch_size) != self.network.axes:
            what = f"a patch of a {self.network.axes}D network has {self.network.axes} edges, not {len(patch_size)}"
            raise UserError(what, "patch size", f"give {' '.join('ZYX'[-self.network.axes :])} in voxels")
        if "strides" not in kwargs:
            check_divisible(patch_size, kwargs["patch_embed_size"], "token size")
            return
        total = torch.tensor(kwargs["strides"]).prod(0).tolist()
        check_divisible(patch_size, total, "total stride")
        if list(patch_size) == total and backbone_class(self.config, self.family).instance_norm:
            raise UserError("the deepest feature map would be one voxel, which instance normalisation cannot take", "patch size", "choose a larger -patch_size")

    def backbone(self, channels: int, patch_size: Sequence[int]) -> Backbone:
        """A freshly initialised backbone of the pretrained topology for other channels and another patch size, along the network's axes."""
        config = dataclasses.replace(self.config, patch_size=self.config.in_volume(patch_size))
        return build_backbone(config, self.family, channels, str(self.path))


@dataclass(frozen=True)
class Adapted:
    """Pretrained tensors fitted to a target, with what was done to them.

    Args:
        tensors: by the names of the library's state dict, aliases included.
        resized: names of the position embeddings that were interpolated.
        repeated: names of the input projections whose channels were changed.
    """

    tensors: dict[str, Tensor]
    resized: tuple[str, ...]
    repeated: tuple[str, ...]


def adapt(pretrained: Pretrained, channels: int, patch_size: Sequence[int]) -> Adapted:
    """The reference transform of the pretrained tensors for `channels` and `patch_size` (voxels along the network's axes); all others stay bitwise."""
    tensors, resized, repeated = dict(pretrained.weights), [], []
    for module in pretrained.adaptation["keys_to_in_proj"]:
        name = f"{module}.weight"
        if tensors[name].shape[1] != channels:
            tensors[name] = repeat_channels(tensors[name], channels)
            repeated.append(name)
    positions = pretrained.adaptation["key_to_lpe"]
    if positions is not None:
        token = pretrained.network.kwargs["patch_embed_size"]
        old, new = (tuple(size // t for size, t in zip(patch, token, strict=True)) for patch in (pretrained.config.patch_size, patch_size))
        if old != new:
            extra = pretrained.network.kwargs.get("num_register_tokens", 0)
            tensors[positions] = torch.cat((tensors[positions][:, :extra], resize_positions(tensors[positions][:, extra:], old, new)), 1)
            resized.append(positions)
    return Adapted(tensors, tuple(resized), tuple(repeated))


def inside(key: str, modules: Sequence[str]) -> bool:
    """Whether a tensor of a state dict is one of these modules or lies in one."""
    return any(key == module or key.startswith(module + ".") for module in modules)
