"""The protocol that every backbone family follows, and how a plan becomes a backbone.

Shape suffixes: B batch, C channels, N tokens, K kept tokens.
"""

from __future__ import annotations

import pydoc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from nnssl_ext.core.adaptation import EncoderKeys
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.plan import ConfigPlan
from nnssl_ext.core.registry import all_classes

COARSEST = 8  # voxels per cell of the map that is taken for dense features, at most (unless the network has none as fine)


class Backbone(nn.Module):
    """An encoder (with decoder where the family has one) that SSL methods train and nnU-Net takes over.

    Args:
        channels: input channels.
        patch_size: voxels of the input, (z, y, x).
        class_name: dotted name of the network class.
        kwargs: its keyword arguments; those named in `imports` hold dotted names.

    Attributes:
        net: the network of that class; its state dict is what a checkpoint transfers.
        strides: voxels per cell of each pyramid level, (z, y, x).
        widths: channels of each pyramid level.
        decoded: channels of what `decode` gives.
        supports: what a method may ask for: "pyramid", "decoder", "token_drop", ...; "volume" where
            features depend on more than their own slice.
        axes: of the network: 3, or 2 for one that reads slices.
        instance_norm: whether maps went through InstanceNorm, after which their averages hardly differ between volumes and
            a map of one voxel is impossible.
    """

    family: ClassVar[str]
    supports: ClassVar[frozenset[str]]
    axes: ClassVar[int] = 3
    instance_norm: ClassVar[bool] = False
    net: Any
    strides: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    decoded: int

    def __init__(self, channels: int, patch_size: Sequence[int], class_name: str, kwargs: dict[str, Any], imports: Sequence[str]) -> None:
        super().__init__()
        self.channels, self.patch_size = channels, tuple(patch_size)
        self.class_name, self.kwargs, self.imports = class_name, dict(kwargs), tuple(imports)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps (B, widths[i], z/strides[i], ...), finest first."""
        raise self._cannot("pyramid")

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Full-resolution features (B, C, z, y, x) of a pyramid, before any segmentation layer."""
        raise self._cannot("decoder")

    def project(self, maps: list[Tensor], layer: nn.Module) -> Tensor:
        """`layer`, linear and pointwise, on what `decode` gives: layer(decode(maps)), in the order that takes the least memory."""
        return layer(self.decode(maps))  # type: ignore[no-any-return]

    def tokens(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Token features (B, N, C); with `keep` (B, K) only those tokens are read and encoded, (B, K, C)."""
        raise self._cannot("token_drop")

    def train_decoder(self, on: bool) -> None:
        """Whether the decoder is trained; a trainable one that a method never calls would make processes wait for its gradients."""

    def pooled(self, x: Tensor) -> Tensor:
        """Global average of the deepest map, (B, widths[-1])."""
        return self.pyramid(x)[-1].flatten(2).mean(2)

    def dense(self, x: Tensor) -> Tensor:
        """One map that tells what is where, for pictures, probes and registration: (B, dense_width, z/dense_stride, ...)."""
        return self.pyramid(x)[feature_level(self)]

    @property
    def dense_stride(self) -> tuple[int, ...]:
        """Voxels per cell of `dense`, (z, y, x)."""
        return tuple(self.strides[feature_level(self)])

    @property
    def dense_width(self) -> int:
        """Channels of `dense`."""
        return self.widths[feature_level(self)]

    def adaptation(self) -> EncoderKeys:
        """Where encoder, stem, input projection and positions lie in `network_weights`."""
        raise self._cannot("adaptation")

    def network_weights(self) -> dict[str, Tensor]:
        """The network's state dict, under its own names."""
        return dict(self.net.state_dict())

    def _cannot(self, what: str) -> UserError:
        return UserError(f"the {self.family} backbone has no '{what}'", type(self).__name__, f"it offers: {', '.join(sorted(self.supports))}")


def feature_level(backbone: Backbone) -> int:
    """Index of the deepest map whose cells are still small enough to recognise anatomy."""
    fine = [level for level, strides in enumerate(backbone.strides) if max(strides) <= COARSEST]
    return fine[-1] if fine else 0


def resolve(kwargs: dict[str, Any], imports: Sequence[str]) -> dict[str, Any]:
    """`kwargs` with the dotted names of the keys in `imports` replaced by the objects they name."""
    return {key: pydoc.locate(value) if key in imports and value is not None else value for key, value in kwargs.items()}


def families(axes: int = 3) -> dict[str, type[Backbone]]:
    """Backbone classes by family name, of volumes or, with two axes, of slices."""
    return {cls.family: cls for cls in all_classes(Backbone, "nnssl_ext.nn.backbones").values() if cls.axes == axes}


def backbone_class(config: ConfigPlan, family: str) -> type[Backbone]:
    """The class of a configuration's backbone.

    Raises:
        UserError: the configuration has no network of this family.
    """
    return families(config.network(family).axes)[family]


def build_backbone(config: ConfigPlan, family: str, channels: int, where: str = "plan") -> Backbone:
    """The backbone of a configuration, freshly initialised from torch's current random state.

    Args:
        config: the configuration; its `networks` name class and arguments.
        family: name of the backbone family.
        channels: input channels.
        where: named in errors.

    Raises:
        UserError: unknown family; patch size not divisible by the strides or the token.
    """
    network, cls = config.network(family), backbone_class(config, family)
    return cls(channels, config.patch_size, network.class_name, dict(network.kwargs), network.imports)


def check_support(backbone: type[Backbone], needs: Iterable[frozenset[str]], method: str) -> None:
    """Raise a `UserError` unless the backbone supports all of at least one set of `needs`."""
    needs, offered = tuple(needs), backbone.supports
    if not any(need <= offered for need in needs):
        wanted = " or ".join("+".join(sorted(need)) for need in needs)
        name = backbone.family if backbone.axes == 3 else f"{backbone.family} on slices"
        raise UserError(f"{method} needs {wanted}; {name} offers {', '.join(sorted(offered))}", "option -b", "choose another backbone or trainer")


def check_divisible(size: Sequence[int], divisor: Sequence[int], what: str, name: str = "patch size", where: str = "patch_size of the plan") -> None:
    """Raise a `UserError` unless every axis of `size`, called `name`, is a multiple of `divisor`, called `what`."""
    if any(edge % step for edge, step in zip(size, divisor, strict=True)):
        shape, steps = "x".join(map(str, size)), "x".join(map(str, divisor))
        raise UserError(f"{name} {shape} is not divisible by the {what} {steps}", where, "round each axis to a multiple, or plan again")
