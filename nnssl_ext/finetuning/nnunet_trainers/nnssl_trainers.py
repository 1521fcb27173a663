"""nnU-Net imports every module of this folder when the environment variable ``nnUNet_extTrainer`` names it."""

from nnssl_ext.finetuning.trainers import (
    nnsslPrimusTrainer,
    nnsslPrimusTrainer_150ep,
    nnsslPrimusTrainer_lld,
    nnsslPrimusTrainer_lld_150ep,
    nnsslPrimusTrainer_lld_short,
    nnsslPrimusTrainer_short,
    nnsslResEncTrainer,
    nnsslResEncTrainer_150ep,
    nnsslResEncTrainer_short,
    nnsslSegFormerTrainer,
    nnsslSegFormerTrainer_150ep,
    nnsslSegFormerTrainer_lld,
    nnsslSegFormerTrainer_lld_150ep,
    nnsslSegFormerTrainer_lld_short,
    nnsslSegFormerTrainer_short,
)

__all__ = [
    "nnsslPrimusTrainer",
    "nnsslPrimusTrainer_150ep",
    "nnsslPrimusTrainer_lld",
    "nnsslPrimusTrainer_lld_150ep",
    "nnsslPrimusTrainer_lld_short",
    "nnsslPrimusTrainer_short",
    "nnsslResEncTrainer",
    "nnsslResEncTrainer_150ep",
    "nnsslResEncTrainer_short",
    "nnsslSegFormerTrainer",
    "nnsslSegFormerTrainer_150ep",
    "nnsslSegFormerTrainer_lld",
    "nnsslSegFormerTrainer_lld_150ep",
    "nnsslSegFormerTrainer_lld_short",
    "nnsslSegFormerTrainer_short",
]
