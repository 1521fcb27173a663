"""New runs that start from the weights of earlier ones."""

import dataclasses
import hashlib
import json

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning.hub import share
from nnssl_ext.nn.channels import repeat_channels
from nnssl_ext.nn.tokens import resize_positions
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
from nnssl_ext.trainers.description import describe
from nnssl_ext.trainers.dinov2 import DINOv2Trainer
from nnssl_ext.trainers.initial import Initial
from nnssl_ext.trainers.mae import MAETrainer
from tests.conformance.pairs import first_batch
from tests.make_data import tiny_plan, tiny_store
from tests.toy_trainers import ToyCentreTrainer, ToyEMATrainer

pytestmark = pytest.mark.usefixtures("undrawn")
STEM = "net.down_projection.proj.weight"
DINO = {"prototypes": 16, "hidden": 16, "bottleneck": 8, "locals": 1}


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_results", str(tmp_path))


def make(cls, folder, family="primus", patch=(16, 16, 16), channels=1, seed=0, depth=2, **options):
    """A run of two epochs of two steps."""
    plan = tiny_plan(channels)
    config = plan.configuration("3d_fullres")
    networks = {**config.networks, "primus": dataclasses.replace(config.networks["primus"], kwargs={**config.networks["primus"].kwargs, "eva_depth": depth})}
    plan = dataclasses.replace(plan, configurations={"3d_fullres": dataclasses.replace(config, patch_size=patch, networks=networks)})
    settings = cls.Config(epochs=2, iterations=2, batch_size=2, workers=0, seed=seed, **options)
    return cls(plan, "3d_fullres", settings, tiny_store(channels=channels), folder, family=family)


def trained(cls, folder, **options):
    """Trained to the end; its last checkpoint."""
    make(cls, folder, **options).fit()
    return folder / "checkpoint_final.pth"


def filled(trainer, file):
    """An initialised trainer with the weights of a checkpoint."""
    trainer.init = Initial.open(str(file))
    trainer.initialize()
    trainer.init.fill(trainer)
    return trainer


def changed(file, path, **parts):
    """A copy of a checkpoint with other parts; a part that is None is left out."""
    content = {**load_checkpoint(file), **parts}
    save_checkpoint(path, {name: value for name, value in content.items() if value is not None})
    return path


def test_the_same_method_goes_on_with_heads_and_its_first_loss_is_the_old_models(tmp_path, capsys):
    file = trained(MAETrainer, tmp_path / "old")
    old = make(MAETrainer, tmp_path / "old")
    old.initialize()
    old.load(load_checkpoint(file), file)
    run = filled(make(MAETrainer, tmp_path / "new", seed=1), file)
    losses = []
    for trainer in (old, run):
        torch.manual_seed(0)
        losses.append(float(trainer.step(trainer.model, first_batch(run))["total"].detach()))
    assert losses[0] == losses[1]
    assert not run.optimizer.state and run.next_step == 0
    tensors = len(run.model.state_dict())
    line = f"starting from old/checkpoint_final.pth (MAETrainer, step 4, with its heads): {tensors} tensors loaded, 0 of them resized, 0 left"
    assert line in capsys.readouterr().out


def test_a_student_and_its_teacher_go_on_with_the_teachers_weights_and_the_centre_stays(tmp_path):
    file = trained(ToyCentreTrainer, tmp_path / "old")
    state = load_checkpoint(file)["ssl_state"]
    model = filled(make(ToyCentreTrainer, tmp_path / "new", seed=1), file).model
    assert not torch.equal(state["student.head.1.weight"], state["teacher.net.head.1.weight"]) and bool(state["centre"].any())
    assert torch.equal(model.centre, state["centre"])
    for name, value in model.student.state_dict().items():
        assert torch.equal(value, model.teacher.net.state_dict()[name]) and torch.equal(value, state[f"teacher.net.{name}"])


def test_another_method_takes_only_the_backbone_into_student_and_teacher(tmp_path, capsys):
    file = trained(MAETrainer, tmp_path / "old")
    run = make(ToyEMATrainer, tmp_path / "new")
    run.initialize()
    heads = {name: value.clone() for name, value in run.model.state_dict().items() if "backbone" not in name}
    filled(run, file)
    weights = load_checkpoint(file)["network_weights"]
    for backbone in (run.model.student.backbone, run.model.teacher.net.backbone):
        assert all(torch.equal(value, weights[name]) for name, value in backbone.network_weights().items())
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in heads.items())
    assert all(torch.equal(value, run.model.student.state_dict()[name]) for name, value in run.model.teacher.net.state_dict().items())
    left = [name for name in run.model.state_dict() if not any(part in name for part in (".eva.", ".down_projection."))]
    assert f"backbone only): {len(run.model.state_dict()) - len(left)} tensors loaded, 0 of them resized, {len(left)} left" in capsys.readouterr().out


@pytest.mark.parametrize("decoder", [True, False])
def test_a_trained_decoder_is_taken_over_by_a_method_that_trains_one(decoder, tmp_path):
    file = trained(MAETrainer, tmp_path / "old", family="resenc")
    file = changed(file, tmp_path / "other.pth", trainer_name="OtherTrainer", transfer="encoder+decoder" if decoder else "encoder")
    run = make(MAETrainer, tmp_path / "new", family="resenc", seed=1)
    run.initialize()
    before = {name: value.clone() for name, value in run.backbone.network_weights().items()}
    after, weights = filled(run, file).backbone.network_weights(), load_checkpoint(file)["network_weights"]
    for name, value in after.items():
        trained_ = name.startswith("encoder.") or (decoder and name.startswith(("decoder.stages", "decoder.transpconvs"))) or "decoder.encoder" in name
        assert torch.equal(value, weights[name] if trained_ else before[name]), name


@pytest.mark.parametrize("cls", [MAETrainer, ToyEMATrainer])
def test_positions_follow_another_patch_also_one_with_as_many_tokens(cls, tmp_path, capsys):
    file = trained(MAETrainer, tmp_path / "old", patch=(8, 16, 16))
    content = load_checkpoint(file)
    for patch, grid in (((16, 16, 16), (4, 4, 4)), ((16, 8, 16), (4, 2, 4))):
        run = filled(make(cls, tmp_path / "new", patch=patch), file)
        wanted = resize_positions(content["network_weights"]["eva.pos_embed"], (2, 4, 4), grid)
        assert torch.equal(run.backbone.net.eva.pos_embed, wanted)
        if cls is MAETrainer:
            assert torch.equal(run.model.decoder.pos_embed, resize_positions(content["ssl_state"]["decoder.pos_embed"], (2, 4, 4), grid))
        assert "2 of them resized" in capsys.readouterr().out  # of the decoder, or of the teacher


@pytest.mark.parametrize(("theirs", "ours"), [(0, 2), (2, 0), (2, 2)])
def test_register_tokens_are_no_part_of_the_grid(theirs, ours, tmp_path):
    file = trained(DINOv2Trainer, tmp_path / "old", **DINO, registers=theirs)
    content = load_checkpoint(file)
    other = changed(file, tmp_path / "other.pth", trainer_name="OtherTrainer")
    net = filled(make(DINOv2Trainer, tmp_path / "new", patch=(16, 8, 16), **DINO, registers=ours), other).model.student.backbone.net
    weights = content["network_weights"]["eva.pos_embed"]
    assert torch.equal(net.eva.pos_embed[:, ours:], resize_positions(weights[:, theirs:], (4, 4, 4), (4, 2, 4)))
    assert torch.equal(net.eva.pos_embed[:, :ours], weights[:, :theirs] if theirs == ours else torch.zeros(1, ours, 48))


@pytest.mark.parametrize("family", ["primus", "resenc", "segformer3d"])
def test_other_channels_repeat_the_stem_and_begin_what_depends_on_them_in_a_head(family, tmp_path, capsys):
    file = trained(MAETrainer, tmp_path / "old", family=family)
    state = load_checkpoint(file)["ssl_state"]
    model = filled(make(MAETrainer, tmp_path / "new", family=family, channels=2), file).model
    encoder = "backbone.net.encoder.stem."
    stem = {"primus": "backbone." + STEM, "resenc": f"{encoder}convs.0.conv.weight", "segformer3d": f"{encoder}projection.weight"}[family]
    assert torch.equal(model.state_dict()[stem], repeat_channels(state[stem], 2))
    assert "2 left at their initialisation" in capsys.readouterr().out  # weight and bias of the last layer
    filled(make(MAETrainer, tmp_path / "same", family=family), file)
    assert "0 left at their initialisation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MAETrainer, {"depth": 3}, "tensors of the checkpoint and of this run don't fit each other: backbone.net.eva.blocks.2."),
        (MAETrainer, {"depth": 1}, "tensors of the checkpoint and of this run don't fit each other: backbone.net.eva.blocks.1."),
        (ToyEMATrainer, {"depth": 1}, "don't fit each other: student.backbone.net.eva.blocks.1."),
        (MAETrainer, {"decoder_width": 24, "decoder_depth": 1}, None),  # a width is at least 48
        (MAETrainer, {"family": "resenc"}, "holds a primus network, this run trains resenc"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(cls, options, message, tmp_path):
    file = trained(MAETrainer, tmp_path / "old")
    run = make(cls, tmp_path / "new", **options)
    if message is None:
        filled(run, file)
        return
    with pytest.raises(UserError, match=message) as error:
        filled(run, file)
    assert len(str(error.value).splitlines()) == 3


def test_a_head_of_another_width_is_refused_by_name(tmp_path):
    file = trained(MAETrainer, tmp_path / "old")
    content = load_checkpoint(file)
    wider = {**content["ssl_state"], "embed.bias": torch.zeros(96)}
    with pytest.raises(UserError, match=r"1 tensors .* don't fit each other: embed.bias 96, here 48\n"):
        filled(make(MAETrainer, tmp_path / "new"), changed(file, tmp_path / "wider.pth", ssl_state=wider))


def test_a_head_that_only_one_of_the_two_has_starts_anew_or_is_dropped(tmp_path, capsys):
    file = trained(MAETrainer, tmp_path / "old")
    filled(make(MAETrainer, tmp_path / "new", decoder_depth=3), file)
    assert "with its heads" in (report := capsys.readouterr().out) and " 0 left" not in report
    filled(make(MAETrainer, tmp_path / "new", decoder_depth=1), file)
    assert " 0 left at their initialisation" in capsys.readouterr().out


def test_a_class_that_extends_the_method_goes_on_with_its_heads(tmp_path, capsys):
    class LongerTrainer(MAETrainer):
        pass

    filled(make(LongerTrainer, tmp_path / "new"), trained(MAETrainer, tmp_path / "old"))
    assert "with its heads" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused(tmp_path):
    file = trained(MAETrainer, tmp_path / "old")
    state = load_checkpoint(file)["ssl_state"]
    state["head.bias"][3] = float("nan")
    with pytest.raises(UserError, match="hold NaN or infinity: head.bias"):
        filled(make(MAETrainer, tmp_path / "new"), changed(file, tmp_path / "nan.pth", ssl_state=state))


def test_a_checkpoint_of_nnssl_hands_over_its_encoder(tmp_path, capsys):
    content = load_checkpoint(trained(MAETrainer, tmp_path / "old"))
    plan = {**content["nnssl_adaptation_plan"], "key_to_encoder": "encoder.eva", "key_to_stem": "encoder.down_projection"}
    weights = {f"encoder.{name}": value for name, value in content["network_weights"].items()} | {"head.weight": torch.zeros(2)}
    theirs = {"network_weights": weights, "nnssl_adaptation_plan": plan, "current_epoch": 7, "trainer_name": "BaseMAETrainer", "init_args": {"a": [1]}}
    torch.save(theirs, tmp_path / "theirs.pth")
    run = filled(make(ToyEMATrainer, tmp_path / "new"), tmp_path / "theirs.pth")
    assert all(torch.equal(value, content["network_weights"][name]) for name, value in run.model.student.backbone.network_weights().items())
    assert "BaseMAETrainer" in capsys.readouterr().out
    del theirs["nnssl_adaptation_plan"]
    torch.save(theirs, tmp_path / "old.pth")
    with pytest.raises(UserError, match="lacks nnssl_adaptation_plan"):
        Initial.open(str(tmp_path / "old.pth"))


def test_the_origin_is_in_run_json_and_checkpoints_without_a_path_of_the_machine(tmp_path):
    file = trained(MAETrainer, tmp_path / "old")
    run = make(MAETrainer, tmp_path / "new")
    run.init = Initial.open("old/checkpoint_final.pth")  # relative to $nnssl_results
    run.fit()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    origin = {"file": "old/checkpoint_final.pth", "sha256": digest, "method": "MAETrainer", "step": 4}
    assert load_checkpoint(tmp_path / "new" / "checkpoint_final.pth")["init"] == origin
    told = json.loads((tmp_path / "new" / "run.json").read_text(encoding="utf-8"))
    assert told["init"] == origin and "-init old/checkpoint_final.pth" in told["command"]
    assert run.init.tag == f"init={digest[:8]}"
    outside = tmp_path.parent / f"{tmp_path.name}_outside.pth"
    outside.write_bytes(file.read_bytes())
    assert Initial.open(str(outside)).identity == {**origin, "file": outside.name}


def test_a_run_that_goes_on_needs_the_earlier_checkpoint_no_more_and_ends_the_same(tmp_path):
    file = trained(MAETrainer, tmp_path / "old")
    for folder, stops in (("whole", [None]), ("parts", [3, None])):
        for number, stop in enumerate(stops):
            run = make(MAETrainer, tmp_path / folder, seed=1)
            digits = Initial.open(str(file)).tag.removeprefix("init=")
            run.init = Initial.open(digits, begun=True) if number else Initial.open(str(file))
            run.fit(resume=number > 0, stop_at=stop)
            assert run.init.identity["step"] == 4 and not run.init.content and describe(run)["init"]["method"] == "MAETrainer"
    one, two = (load_checkpoint(tmp_path / folder / "checkpoint_final.pth") for folder in ("whole", "parts"))
    assert one["init"] == two["init"] and all(torch.equal(value, two["ssl_state"][name]) for name, value in one["ssl_state"].items())


def test_a_checkpoint_that_is_gone_has_a_remedy_when_the_run_has_begun(tmp_path):
    with pytest.raises(UserError, match="digits behind init="):
        Initial.open(str(tmp_path / "gone.pth"), begun=True)
    for path in ("gone.pth", "0123abcd"):
        with pytest.raises(UserError, match="checkpoint not found"):
            Initial.open(path)


@pytest.mark.parametrize("heads", [False, True])
def test_a_shared_model_hands_over_its_backbone_or_with_heads_all_as_its_checkpoint_does(tmp_path, capsys, heads):
    file = trained(ToyCentreTrainer, tmp_path / "old")
    share(file, str(tmp_path / "model"), heads=heads)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "Figures of epoch 2 of 2" in card and "train/total" in card and "No alarm." in card
    old = filled(make(ToyCentreTrainer, tmp_path / "a", seed=1), file).model.state_dict()
    new = make(ToyCentreTrainer, tmp_path / "b", seed=1)
    model = filled(new, tmp_path / "model").model.state_dict()
    differ = {name for name in old if not torch.equal(old[name], model[name])}
    net = set(load_checkpoint(file)["network_weights"])
    assert not differ if heads else differ and not any(name.removeprefix(place) in net for name in differ for place in ("student.net.", "teacher.net.net."))
    assert new.init.identity["file"] == "model" and new.init.identity["step"] == 4 and new.init.tag.startswith("init=")
    assert f"ToyCentreTrainer, step 4, {'with its heads' if heads else 'backbone only'}" in capsys.readouterr().out
    run = make(ToyCentreTrainer, tmp_path / "c", seed=1)
    run.init = Initial.open(str(tmp_path / "model"))
    run.fit()
    assert load_checkpoint(tmp_path / "c" / "checkpoint_final.pth")["step"] == 4
