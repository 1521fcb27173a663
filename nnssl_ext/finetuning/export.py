"""A pretrained checkpoint as a file that stock nnU-Net takes with ``-pretrained_weights``, verified before it is in place."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import atomic_path, read_json
from nnssl_ext.core.rng import torch_seed
from nnssl_ext.finetuning.plans import FREEZING, FULL, check_configuration, finetuning_options
from nnssl_ext.finetuning.pretrained import Adapted, Pretrained, adapt, inside

TRAINER_FOLDER = Path(__file__).parent / "nnunet_trainers"
_VARIABLE = "nnUNet_extTrainer"


@dataclass(frozen=True)
class ExportReport:
    """What became of every tensor of the target network (aliases counted once).

    Args:
        copied: bitwise the pretrained tensor.
        resized: position embeddings interpolated to the target's token grid.
        repeated: input projections fitted to the target's channels.
        untouched: fresh, seeded initialisation (segmentation layers and what was not pretrained).
        frozen: those of them all that are not trained.
        fraction_of_encoder: values handed over / values of the transferred modules; an export is always 1.0.
    """

    copied: tuple[str, ...]
    resized: tuple[str, ...]
    repeated: tuple[str, ...]
    untouched: tuple[str, ...]
    frozen: tuple[str, ...]
    fraction_of_encoder: float

    def __str__(self) -> str:
        rows = [("copied", self.copied), ("resized", self.resized), ("repeated", self.repeated), ("untouched", self.untouched)]
        rows += [("not trained", self.frozen)] if self.frozen else []
        lines = [f"  {label:<11}{len(names):>5}  {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}".rstrip() for label, names in rows]
        verdict = f"  encoder handed over: {100 * self.fraction_of_encoder:.1f} %, verified with nnU-Net's own loader"
        return "\n".join(["tensors of the nnU-Net network:", *lines, verdict])


@dataclass(frozen=True)
class Target:
    """The network that a trainer will build from a plan.

    Args:
        plans: nnU-Net's plans file; `dataset.json` lies beside it.
        configuration: name of a configuration in it.
        trainer: name of the trainer class.
    """

    plans: Path
    configuration: str
    trainer: str

    @property
    def mode(self) -> str:
        return finetuning_options(read_json(self.plans))[0]

    @property
    def channels(self) -> int:
        manager = PlansManager(read_json(self.plans))
        return int(determine_num_input_channels(manager, self.configuration, read_json(self.plans.parent / "dataset.json")))

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(PlansManager(read_json(self.plans)).get_configuration(self.configuration).patch_size)

    def build(self, seed: int) -> nn.Module:
        """The network with an initialisation that `seed` determines; torch's random state is left as it was."""
        manager = PlansManager(read_json(self.plans))
        labels = manager.get_label_manager(read_json(self.plans.parent / "dataset.json"))
        builder = find_trainer(self.trainer).build_network_architecture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, 0, "export"))
            network: nn.Module = builder(manager, manager.get_configuration(self.configuration), self.channels, labels.num_segmentation_heads, True)
        return network.eval()


def find_trainer(name: str) -> Any:
    """nnU-Net's trainer class called `name`: stock, ours, or from the folders of `nnUNet_extTrainer`.

    Raises:
        UserError: nnU-Net does not find it.
    """
    former = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = with_our_trainers(former)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise UserError(f"nnU-Net finds no trainer '{name}'", "option -tr", f"check the name; folders of other trainers belong in ${_VARIABLE}") from None
    finally:
        os.environ.pop(_VARIABLE)
        if former is not None:
            os.environ[_VARIABLE] = former


def with_our_trainers(value: str | None) -> str:
    """A value of `nnUNet_extTrainer` with our folder appended."""
    folders = [folder for folder in (value or "").split(os.pathsep) if folder]
    return os.pathsep.join(folders + [str(TRAINER_FOLDER)] * (str(TRAINER_FOLDER) not in folders))


def export_nnunet(
    ckpt: Pretrained | Path | str, nnunet_plans: Path | str, configuration: str, out: Path | str, trainer: str = "nnUNetTrainer", seed: int = 0
) -> ExportReport:
    """Write the file that `nnUNetv2_train ... -tr TRAINER -pretrained_weights OUT` takes.

    The very network that the trainer will build is built, the pretrained tensors are loaded into its modules, and its
    whole state dict is saved: nnU-Net wants every tensor outside the segmentation layers. The file is in place only
    after nnU-Net's own loader has brought every pretrained tensor into a second network.

    Args:
        ckpt: a pretraining checkpoint.
        nnunet_plans: plans file in the dataset's folder of `$nnUNet_preprocessed`.
        configuration: a configuration of the plans.
        out: the file to write.
        trainer: name of nnU-Net's trainer class.
        seed: of the initialisation of what was not pretrained.

    Raises:
        UserError: the target network cannot take all of the pretrained tensors, or the verification failed.
    """
    target = Target(Path(nnunet_plans), configuration, trainer)
    given = ckpt if isinstance(ckpt, Pretrained) else Pretrained.load(ckpt)
    pretrained = given if target.mode == FULL else given.encoder()
    check_configuration(pretrained, configuration)
    adapted = adapt(pretrained, target.channels, target.patch_size)
    network = target.build(seed)
    fraction = _check_fit(network, adapted, pretrained, target)
    frozen = _check_frozen(network, pretrained, target)
    content = {
        "network_weights": {key: value.detach().cpu() for key, value in load_into_modules(network, adapted.tensors, pretrained.modules).items()},
        "nnssl_adaptation_plan": _adaptation(pretrained, target),
        "citations": pretrained.citations,
        "nnssl_export": {
            "method": pretrained.method,
            "family": pretrained.family,
            "identity": given.identity,
            "plans": target.plans.stem,
            "configuration": configuration,
            "trainer": trainer,
            "mode": target.mode,
            "seed": seed,
            "nnssl_ext": __version__,
        },
    }
    with atomic_path(out) as temporary:
        torch.save(content, temporary)
        verify(temporary, pretrained, adapted, target, seed + 1)
    unique = [name for name, _ in network.named_parameters()] + [name for name, _ in network.named_buffers() if name in content["network_weights"]]
    changed = {*adapted.resized, *adapted.repeated}
    return ExportReport(
        copied=tuple(name for name in unique if name in adapted.tensors and name not in changed),
        resized=tuple(name for name in unique if name in adapted.resized),
        repeated=tuple(name for name in unique if name in adapted.repeated),
        untouched=tuple(name for name in unique if name not in adapted.tensors),
        frozen=frozen,
        fraction_of_encoder=fraction,
    )


def load_into_modules(network: nn.Module, tensors: dict[str, Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
    """Load `tensors` into the named modules and return the network's state dict; all aliases agree since they share storage."""
    for module in modules:
        if module in tensors:  # a parameter
            network.get_parameter(module).data.copy_(tensors[module])
            continue
        part = {key.removeprefix(module + "."): value for key, value in tensors.items() if key.startswith(module + ".")}
        network.get_submodule(module).load_state_dict(part, strict=True)
    state: dict[str, Tensor] = network.state_dict()
    return state


def verify(file: Path, pretrained: Pretrained, adapted: Adapted, target: Target, seed: int) -> None:
    """Load `file` as nnU-Net will, and compare with the pretrained encoder: every tensor, and the features of a fixed input.

    Raises:
        UserError: nnU-Net refuses the file, or the encoder that it ends up with is another one.
    """
    network = target.build(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_pretrained_weights(network, str(file))
    except (AssertionError, KeyError, RuntimeError) as error:
        raise UserError(f"nnU-Net's loader refuses the exported weights: {str(error).splitlines()[0][:160]}", target.plans, "please report this") from error
    state = network.state_dict()
    wrong = [key for key, value in adapted.tensors.items() if key not in state or not torch.equal(state[key].cpu(), value)]
    if wrong:
        raise UserError(f"nnU-Net loaded other values than the pretrained ones in {len(wrong)} tensors: {_some(wrong)}", target.plans, "please report this")
    with torch.random.fork_rng(devices=[]):
        backbone = pretrained.backbone(target.channels, target.patch_size).eval()
    load_into_modules(backbone.net, adapted.tensors, pretrained.modules)
    shape = backbone.patch_size
    if "token_drop" not in backbone.supports:  # a convolutional encoder is checked on a smaller input: two voxels of the deepest map
        shape = tuple(min(size, 2 * stride) for size, stride in zip(shape, backbone.strides[-1], strict=True))
    image = torch.randn((1, target.channels, *shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone.pyramid(image)
        backbone.net = network
        loaded = backbone.pyramid(image)
    if not all(torch.equal(a, b) for a, b in zip(expected, loaded, strict=True)):
        raise UserError("the encoder that nnU-Net loaded gives other features than the pretrained one", target.plans, "please report this")


def _check_fit(network: nn.Module, adapted: Adapted, pretrained: Pretrained, target: Target) -> float:
    """Fraction of the values of the transferred modules, of checkpoint and target together, that can be handed over."""
    state = {key: value for key, value in network.state_dict().items() if inside(key, pretrained.modules)}
    sizes = {key: max(tensor.numel() for tensor in (state.get(key), adapted.tensors.get(key)) if tensor is not None) for key in {*state, *adapted.tensors}}
    fits = {key for key, value in state.items() if key in adapted.tensors and adapted.tensors[key].shape == value.shape}
    fraction = sum(sizes[key] for key in fits) / max(1, sum(sizes.values()))
    lost = sorted(sizes.keys() - fits)
    if lost:
        raise UserError(
            f"{target.trainer} would take only {100 * fraction:.1f} % of the pretrained encoder; these tensors do not fit: {_some(lost)}",
            f"{target.plans}, configuration {target.configuration}",
            "use the plans that nnssl_export writes, with nnUNetTrainer or a trainer of the pretrained network's size",
        )
    return fraction


def _check_frozen(network: nn.Module, pretrained: Pretrained, target: Target) -> tuple[str, ...]:
    """Names of the parameters that the network keeps from being trained: all of the encoder's where the plan freezes it."""
    frozen = tuple(name for name, parameter in network.named_parameters() if not parameter.requires_grad)
    if target.mode in FREEZING and any(inside(name, pretrained.modules) and name not in frozen for name, _ in network.named_parameters()):
        what = f"{target.trainer} builds a network of its own, which the mode '{target.mode}' does not freeze"
        raise UserError(what, "option -tr", "use a trainer that builds the network of the plan, such as nnUNetTrainer or ours")
    return frozen


def _adaptation(pretrained: Pretrained, target: Target) -> dict[str, Any]:
    """The checkpoint's adaptation plan with the channels and the patch size that the exported tensors have now."""
    patch = [int(size) for size in pretrained.config.in_volume(target.patch_size)]
    plan = pretrained.adaptation["pretrain_plan"]["configurations"]
    configurations = {name: {**values, "patch_size": patch} for name, values in plan.items()}
    changed = {"pretrain_plan": {"configurations": configurations}, "pretrain_num_input_channels": target.channels, "recommended_downstream_patchsize": patch}
    return {**pretrained.adaptation, **changed}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
