"""The fine-tuning schedules, and how nnU-Net finds them."""

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning import trainers
from nnssl_ext.finetuning.commands import Machine, environment
from nnssl_ext.finetuning.export import TRAINER_FOLDER, find_trainer, with_our_trainers
from nnssl_ext.finetuning.networks import PlannedPrimus
from nnssl_ext.finetuning.nnunet_trainers import nnssl_trainers

pytestmark = pytest.mark.nnunet


@pytest.mark.parametrize("name", nnssl_trainers.__all__)
def test_nnunet_finds_the_trainer_in_our_folder(name, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    found = recursive_find_trainer_class_by_name(name)
    assert found is getattr(trainers, name) and issubclass(found, nnUNetTrainer)
    assert list(inspect.signature(found.build_network_architecture).parameters)[:2] == ["plans_manager", "configuration_manager"]
    assert list(inspect.signature(found.__init__).parameters) == list(inspect.signature(nnUNetTrainer.__init__).parameters)


@pytest.mark.slow
def test_the_folder_is_found_from_a_process_that_knows_only_the_variable():
    code = "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as f; print(f('nnsslPrimusTrainer_short').__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(Machine("cpu")) | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("nnssl_ext.finetuning.trainers"), done.stderr


def test_our_folder_is_appended_once():
    both = with_our_trainers("/one")
    assert both == f"/one{os.pathsep}{TRAINER_FOLDER}" and with_our_trainers(both) == both and with_our_trainers(None) == str(TRAINER_FOLDER)


def test_an_unknown_trainer_is_a_user_error_and_the_environment_stays():
    with pytest.raises(UserError, match="finds no trainer 'nnUNetTrainr'"):
        find_trainer("nnUNetTrainr")
    assert "nnUNet_extTrainer" not in os.environ


def test_what_the_user_has_set_wins(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "5")
    assert environment(Machine("cpu", processes=3))["nnUNet_n_proc_DA"] == "5"
    assert environment(Machine("cpu", processes=3))["nnUNet_def_n_proc"] == "3"


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_bad_number_of_epochs_is_a_user_error(value, monkeypatch):
    monkeypatch.setenv(trainers.EPOCHS_VARIABLE, value)
    with pytest.raises(UserError, match="positive integer"):
        trainers._positive(trainers.EPOCHS_VARIABLE, 2)


@pytest.mark.parametrize(("name", "peak", "epochs", "warm_up"), [("nnsslResEncTrainer", 1e-3, 1000, 50), ("nnsslPrimusTrainer_150ep", 1e-4, 150, 15)])
def test_the_learning_rate_rises_linearly_then_falls(name, peak, epochs, warm_up):
    trainer = object.__new__(getattr(trainers, name))
    trainer.network, trainer.device, trainer.training_stage = torch.nn.Linear(2, 2), torch.device("cpu"), None
    trainer.num_epochs, trainer.warmup_duration_whole_net, trainer.initial_lr, trainer.weight_decay = (
        trainer.epochs,
        trainer.warm_up,
        trainer.learning_rate,
        0.0,
    )
    trainer.current_epoch, trainer.print_to_log_file = 0, lambda *_: None
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    rates = []
    for epoch in range(epochs):
        if epoch == warm_up:
            trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers("train")
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(peak / warm_up) and rates[warm_up - 1] == pytest.approx(peak) == max(rates)
    assert rates[warm_up:] == sorted(rates[warm_up:], reverse=True) and rates[-1] < 0.02 * peak


def test_with_layer_decay_every_group_follows_the_schedule_at_its_own_share():
    cls = trainers.nnsslPrimusTrainer_lld
    trainer = object.__new__(cls)
    trainer.network = PlannedPrimus(1, 2, embed_dim=48, eva_depth=2, eva_numheads=2, patch_embed_size=(8, 8, 8), input_shape=(16, 16, 16))
    trainer.device, trainer.training_stage, trainer.optimizer, trainer.lr_scheduler = torch.device("cpu"), None, None, None
    trainer.num_epochs, trainer.warmup_duration_whole_net, trainer.initial_lr, trainer.weight_decay = 20, 4, cls.learning_rate, 0.05
    trainer.current_epoch, trainer.print_to_log_file, trainer.logger = 0, lambda *_: None, SimpleNamespace(log=lambda *_: None)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    optimizer = trainer.optimizer
    for epoch in range(trainer.num_epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        rate = cls.learning_rate * ((epoch + 1) / 4 if epoch < 4 else (1 - (epoch - 4) / 16) ** 0.9)
        for group in trainer.optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"])
    assert trainer.optimizer is optimizer and {group["lr_scale"] for group in optimizer.param_groups} == {0.75**layer for layer in range(4)}
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == len(list(trainer.network.parameters()))
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)


def test_the_shells_of_processes_and_of_compilation_are_taken_off():
    network = torch.nn.Linear(2, 2)
    assert trainers.unwrapped(SimpleNamespace(module=SimpleNamespace(_orig_mod=network))) is network and trainers.unwrapped(network) is network
