"""Fine-tuning schedules as nnU-Net trainers: a linear warm-up with a learning rate below that of training from scratch.

nnU-Net finds them through the environment variable ``nnUNet_extTrainer`` (folder `nnunet_trainers`).
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup

from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning.layers import finetuning_groups
from nnssl_ext.finetuning.plans import finetuning_options
from nnssl_ext.finetuning.subsets import nested_subset

CUDA = torch.device("cuda")
EPOCHS_VARIABLE, ITERATIONS_VARIABLE = "nnssl_finetune_epochs", "nnssl_finetune_iterations"


class LabelSubset(nnUNetTrainer):
    """Trains on as many labelled cases of the fold as the plan says; validates on all that the fold has for that."""

    def do_split(self) -> tuple[list[str], list[str]]:
        training, validation = super().do_split()
        wanted = finetuning_options(self.plans_manager.plans)[1]
        if wanted is None:
            return training, validation
        chosen = nested_subset(training, wanted)
        self.print_to_log_file(f"The plan wants {len(chosen)} of {len(training)} labelled cases for training: {', '.join(chosen)}")
        return chosen, validation


class _Schedule(LabelSubset, nnUNetTrainer_warmup):
    """Linear warm-up over `warm_up` epochs to `learning_rate`, then polynomial decay.

    Attributes:
        epochs: including the warm-up.
        warm_up: epochs.
        learning_rate: at the end of the warm-up.
    """

    epochs: ClassVar[int] = 1000
    warm_up: ClassVar[int] = 50
    learning_rate: ClassVar[float]

    def __init__(self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)  # nnU-Net reads the parameters' names: they must stay as they are
        self.num_epochs, self.warmup_duration_whole_net, self.initial_lr = self.epochs, self.warm_up, self.learning_rate

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """As the stock trainer's; that of nnU-Net's warm-up trainer cannot read nnU-Net's checkpoints with torch >= 2.6."""
        nnUNetTrainer.load_checkpoint(self, filename_or_checkpoint)
        if self.warmup_duration_whole_net <= self.current_epoch < self.num_epochs:
            self.optimizer, self.lr_scheduler = self.configure_optimizers("train")  # keeps the optimiser, changes the schedule


class nnsslResEncTrainer(_Schedule):
    """Residual-encoder U-Net: SGD, momentum 0.99, Nesterov, weight decay 3e-5; 1e-3 instead of 1e-2."""

    learning_rate = 1e-3


class nnsslResEncTrainer_150ep(nnsslResEncTrainer):
    epochs, warm_up = 150, 15


class nnsslPrimusTrainer(_Schedule, AbstractPrimus):
    """Primus, built from the plan: AdamW (0.9, 0.98), weight decay 5e-2, gradients clipped at 1; 1e-4 instead of 3e-4."""

    learning_rate = 1e-4
    build_network_architecture = staticmethod(nnUNetTrainer.build_network_architecture)


class nnsslPrimusTrainer_150ep(nnsslPrimusTrainer):
    epochs, warm_up = 150, 15


class nnsslSegFormerTrainer(nnsslPrimusTrainer):
    """SegFormer3D: as Primus."""


class nnsslSegFormerTrainer_150ep(nnsslSegFormerTrainer):
    epochs, warm_up = 150, 15


class _LayerDecay(nnUNetTrainer_warmup):
    """Learning rates that fall block by block from the decoder down to the stem; vectors, positions and registers get no weight decay.

    Attributes:
        layer_decay: factor from a block to the one below it.

    Source: Clark et al. 2020, arXiv:2003.10555; the factor is that of He et al. 2022, arXiv:2111.06377, table 9.
    """

    layer_decay: ClassVar[float] = 0.75

    def configure_optimizers(self, stage: str = "warmup_all") -> Any:
        former = self.optimizer
        optimizer, schedule = super().configure_optimizers(stage)
        if optimizer is not former:
            optimizer.param_groups.clear()
            for group in finetuning_groups(unwrapped(self.network), self.weight_decay, self.layer_decay):
                optimizer.add_param_group(group)
        return optimizer, schedule

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()  # gives every group the schedule's rate
        for group in self.optimizer.param_groups:
            group["lr"] *= group["lr_scale"]


class nnsslPrimusTrainer_lld(_LayerDecay, nnsslPrimusTrainer):
    """Primus with layer-wise learning-rate decay."""


class nnsslPrimusTrainer_lld_150ep(nnsslPrimusTrainer_lld):
    epochs, warm_up = 150, 15


class nnsslSegFormerTrainer_lld(_LayerDecay, nnsslSegFormerTrainer):
    """SegFormer3D with layer-wise learning-rate decay."""


class nnsslSegFormerTrainer_lld_150ep(nnsslSegFormerTrainer_lld):
    epochs, warm_up = 150, 15


class Short(_Schedule):
    """`$nnssl_finetune_epochs` (2) of `$nnssl_finetune_iterations` (5) each, warm-up a tenth, no mirroring: for trials on the CPU."""

    def __init__(self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = (int(value) for value in self.lengths().values())
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)
        self.warmup_duration_whole_net = max(1, self.num_epochs // 10)

    @staticmethod
    def lengths() -> dict[str, str]:
        """The environment variables for epochs and iterations, with what they stand for now."""
        return {EPOCHS_VARIABLE: str(_positive(EPOCHS_VARIABLE, 2)), ITERATIONS_VARIABLE: str(_positive(ITERATIONS_VARIABLE, 5))}

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:  # the name is nnU-Net's
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnsslResEncTrainer_short(Short, nnsslResEncTrainer):
    """Residual encoders in a few hundred steps: AdamW at 2e-2, since SGD with momentum 0.99 has hardly begun by then."""

    learning_rate = 2e-2
    configure_optimizers = AbstractPrimus.configure_optimizers


class nnsslPrimusTrainer_short(Short, nnsslPrimusTrainer):
    """The smallest transformers in a few hundred steps: 3e-3, since at 1e-4 they have hardly begun by then."""

    learning_rate = 3e-3


class nnsslSegFormerTrainer_short(Short, nnsslSegFormerTrainer):
    """The smallest ones in a few hundred steps: as Primus."""

    learning_rate = nnsslPrimusTrainer_short.learning_rate


class nnsslPrimusTrainer_lld_short(_LayerDecay, nnsslPrimusTrainer_short):
    """The smallest ones with layer-wise learning-rate decay."""


class nnsslSegFormerTrainer_lld_short(_LayerDecay, nnsslSegFormerTrainer_short):
    """The smallest ones with layer-wise learning-rate decay."""


DEFAULT_TRAINERS = {
    "resenc": nnsslResEncTrainer.__name__,
    "primus": nnsslPrimusTrainer.__name__,
    "primus_v2": nnsslPrimusTrainer.__name__,
    "segformer3d": nnsslSegFormerTrainer.__name__,
}


def trainer_name(family: str, schedule: str = "") -> str:
    """Our trainer for a backbone family; `schedule` is how its name goes on: "150ep" for nnsslPrimusTrainer_150ep."""
    return "_".join([DEFAULT_TRAINERS[family], *filter(None, [schedule])])


def unwrapped(network: Any) -> Any:
    """A network without the shells of processes and of compilation."""
    network = getattr(network, "module", network)
    return getattr(network, "_orig_mod", network)


def _positive(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"${variable} must be a positive integer, not '{value}'", "environment", f"unset it or export {variable}={default}")
    return int(value)
