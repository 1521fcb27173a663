"""Which units a suite has, and what each of them depends on."""

import dataclasses
from collections import Counter

import pytest

from nnssl_ext.benchmark import grid as grid_module
from nnssl_ext.benchmark.data import Data, smaller
from nnssl_ext.benchmark.finetune import finetuned
from nnssl_ext.benchmark.grid import grid, with_families
from nnssl_ext.benchmark.suite import Cells, Method, Network, Quick, Suite
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_json
from nnssl_ext.finetuning.plans import MODES
from nnssl_ext.finetuning.trainers import EPOCHS_VARIABLE, ITERATIONS_VARIABLE
from tests.make_data import make_plan, tiny_plan

SET, TASKS = "Dataset902_Organs", "Dataset904_Tasks"
MAE = Method("MAETrainer", "resenc", 5, 2)
SUITE = Suite(
    "small",
    (MAE, Method("DINOv2Trainer", "primus", 5, 2)),
    seeds=2,
    finetuning=(Cells("full", (2, 4)), Cells("encoder", (2,)), Cells("frozen", (2,), 1)),
    quick={"resenc": Quick(1, 2, 2)},
    probe=(2,),
    negative_control=Method("DINOv2Trainer", "primus", 5, 2, noise=True),
)


def data(tmp_path, organs="organs"):
    tiny_plan().save(tmp_path / "data" / "plan.json")
    datasets = {SET: {"judges": ["segmentation"], "cases": 16}, TASKS: {"judges": ["classification", "registration"], "cases": 0}}
    record = {"folders": {}, "unlabelled": "Dataset802_X", "datasets": datasets, "digests": {"Dataset802_X": "cohort", SET: organs, TASKS: "tasks"}}
    write_json(tmp_path / "data" / "data.json", record)
    return Data(tmp_path)


def test_every_cell_of_the_grid_has_its_units(tmp_path):
    planned = grid(SUITE, data(tmp_path), "cpu")
    runs = [one.run for one in planned if one.run]
    cells = Counter((run["method"], run["family"], run["role"], run["mode"], run["labels"]) for run in runs if run["kind"] == "segmentation")
    assert cells == {
        **{("scratch", family, "baseline", "full", labels): 2 for family in ("resenc", "primus") for labels in (2, 4)},
        **{("random weights", family, "baseline", "frozen", 2): 1 for family in ("resenc", "primus")},
        **{("scratch", family, "upper bound", "full", 16): 1 for family in ("resenc", "primus")},
        **{(name, family, "method", "full", labels): 2 for name, family in (("MAETrainer", "resenc"), ("DINOv2Trainer", "primus")) for labels in (2, 4)},
        **{(name, family, "method", "frozen", 2): 1 for name, family in (("MAETrainer", "resenc"), ("DINOv2Trainer", "primus"))},
        ("MAETrainer", "resenc", "method", "encoder", 2): 2,  # DINOv2 hands over an encoder anyway
        ("DINOv2Trainer on noise", "primus", "negative control", "full", 2): 2,
    }
    kinds = Counter(run["kind"] for run in runs if run["role"] != "negative control" and run["kind"] != "segmentation")
    assert kinds == {"pretrain": 4, "probe": 8 + 2, "classification": 8 + 1, "registration": 8 + 1}  # two methods and two networks, two seeds; controls
    alone = [run["kind"] for run in runs if run["family"] is None]
    assert sorted(alone) == ["classification", "registration"]  # what no network has a part in
    bound = next(one.unit for one in planned if one.run and one.run["role"] == "upper bound")
    assert bound.settings["quick"]["epochs"] == 4 * (SUITE.quick or {}).get(bound.name.split("_")[2], Quick()).epochs
    assert len({one.unit.digest for one in planned}) == len(planned) == len({one.unit.name for one in planned})


def test_a_mode_is_left_out_for_the_families_that_do_not_have_it(tmp_path):
    planned = grid(dataclasses.replace(SUITE, finetuning=tuple(Cells(mode, (2,), 1) for mode in MODES)), data(tmp_path), "cpu")
    found = {
        (run["family"], run["method"], run["mode"]) for run in (one.run for one in planned) if run and run["role"] in ("method", "baseline") and run["mode"]
    }
    for mode in ("frozen", "mlp", "linear", "adapter"):
        for family, method in (("resenc", "MAETrainer"), ("primus", "DINOv2Trainer")):
            own = {(family, method, mode), (family, "random weights", mode)}
            assert own <= found if (family, mode) != ("resenc", "adapter") else not own & found


def test_methods_are_fine_tuned_with_the_seed_of_their_pretraining_and_compared_with_scratch_of_the_same_seed(tmp_path):
    planned = [one for one in grid(SUITE, data(tmp_path), "cpu") if one.run and one.run["kind"] == "segmentation"]
    for one in planned:
        assert one.unit.settings["seed"] == one.run["seed"] and one.run["pretrain_seed"] in (None, one.run["seed"])
        assert one.unit.settings["scratch"] == (one.run["method"] == "scratch")
        assert one.unit.needs.name.startswith("pretrain" if one.run["role"] in ("method", "negative control") else "start")


def digests(suite, data_, device="cpu"):
    return {one.unit.name: one.unit.digest for one in grid(suite, data_, device)}


def test_a_unit_is_another_one_when_something_changes_that_it_depends_on_and_only_then(tmp_path, monkeypatch):
    before, changed = digests(SUITE, data(tmp_path)), {}

    def compare(name, suite=SUITE, **more):
        after = digests(suite, data(tmp_path, **more))
        changed[name] = {one.partition("_")[0] + "_" + one.split("_")[1] for one in before if after.get(one) != before[one]}

    compare("nothing")
    compare("steps", dataclasses.replace(SUITE, methods=(dataclasses.replace(MAE, steps=6), SUITE.methods[1])))
    compare("quick", dataclasses.replace(SUITE, quick={"resenc": Quick(2, 2, 2)}))
    compare("labels", organs="others")
    assert changed["nothing"] == set()
    assert changed["steps"] == {f"{kind}_MAETrainer" for kind in ("pretrain", "finetune", "probe", "classification", "registration")}
    assert changed["quick"] == {"finetune_MAETrainer", "finetune_scratch", "finetune_random"}
    assert {name.split("_")[0] for name in changed["labels"]} == {"finetune", "probe"}
    monkeypatch.setattr(grid_module, "sha256_file", lambda file: "another method")
    compare("code")
    assert {name for name in changed["code"] if name.startswith("pretrain")} == {"pretrain_MAETrainer", "pretrain_DINOv2Trainer"}


def test_the_schedule_is_one_of_nnunets_commands_alone(tmp_path, monkeypatch):
    def settings(quick, schedule=""):
        planned = grid(dataclasses.replace(SUITE, quick=quick, schedule=schedule), data(tmp_path), "cpu")
        return {one.unit.name: one.unit.settings for one in planned if one.unit.work is finetuned}

    name, control = "finetune_MAETrainer_resenc_Dataset902_full_2_0", "finetune_DINOv2Trainer_primus_noise_Dataset902_full_2_1"
    assert {"trainer", "variables"}.isdisjoint(settings({})[name])  # quick fine-tuning is known by its own numbers
    own, short = settings(None), settings(None, "150ep")
    assert (own[name]["trainer"], own[name]["variables"]) == ("nnsslResEncTrainer", {})
    assert short[name]["trainer"] == "nnsslResEncTrainer_150ep" and short[control]["trainer"] == "nnsslPrimusTrainer_150ep"
    monkeypatch.setenv(EPOCHS_VARIABLE, "7")
    assert settings(None, "short")[name]["variables"] == {EPOCHS_VARIABLE: "7", ITERATIONS_VARIABLE: "5"}


def test_a_method_that_cannot_use_a_family_is_told(tmp_path):
    with pytest.raises(UserError, match="DINOv2Trainer"):
        grid(dataclasses.replace(SUITE, methods=(Method("DINOv2Trainer", "resenc"),)), data(tmp_path), "cpu")


def test_a_method_without_a_family_takes_its_own():
    found = with_families(Suite("x", (Method("MAETrainer"), Method("DINOv2Trainer"))))
    assert [method.family for method in found.methods] == ["resenc", "primus"] and found.negative_control is None


def test_a_smaller_network_keeps_spacing_and_preprocessing():
    plan = make_plan()
    config = smaller(plan, "3d_fullres", Network("nano", 16)).configuration("3d_fullres")
    former = plan.configuration("3d_fullres")
    assert config.patch_size == (16, 16, 16) and (config.spacing, config.data_identifier) == (former.spacing, former.data_identifier)
    assert {network.size for network in config.networks.values()} == {"nano"} and {"resenc", "primus"} <= set(config.networks)
