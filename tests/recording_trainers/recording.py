"""Our shortest trainers, which note the network they begin with; nnU-Net finds them through ``nnUNet_extTrainer``."""

from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_ext.finetuning.trainers import nnsslPrimusTrainer_short, nnsslResEncTrainer_short, nnsslSegFormerTrainer_short

FIRST = "before_the_first_step.pth"


class _Recording(nnUNetTrainer):
    def on_train_start(self):
        super().on_train_start()
        torch.save(self.network.state_dict(), Path(self.output_folder) / FIRST)


class RecordingResEncTrainer(_Recording, nnsslResEncTrainer_short):
    pass


class RecordingPrimusTrainer(_Recording, nnsslPrimusTrainer_short):
    pass


class RecordingSegFormerTrainer(_Recording, nnsslSegFormerTrainer_short):
    pass
