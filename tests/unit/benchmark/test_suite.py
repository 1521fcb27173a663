"""The file of a benchmark: every mistake is told with its place, and the committed one can be read."""

from pathlib import Path

import pytest
import yaml

from nnssl_ext.benchmark.grid import check, with_families
from nnssl_ext.benchmark.pretrain import config_of, trainer_class
from nnssl_ext.benchmark.suite import Cells, Generator, Method, Quick, Suite, check_numbers, read_suite
from nnssl_ext.cli.benchmark import arguments
from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning.plans import MODES
from nnssl_ext.nn.backbones.base import check_support, families

EMBEDDED = Path(__file__).parents[3] / "benchmarks" / "learning" / "suite.yaml"
MAE = Method("MAETrainer")
SMALL = {"name": "small", "methods": [{"trainer": "MAETrainer", "steps": 5}], "finetuning": [{"mode": "full", "labels": [2]}]}


def written(tmp_path, **changes):
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changes}))
    return file


@pytest.mark.parametrize("full", [False, True])
def test_the_embedded_suite_is_complete(full):
    suite = with_families(read_suite(EMBEDDED, full))
    check(suite, EMBEDDED)
    assert len(suite.methods) >= 4 and suite.negative_control.noise and suite.upper_bound and suite.probe and suite.classification and suite.registration
    for method in suite.all_methods:
        check_support(families()[method.family], trainer_class(method.trainer).needs, method.name)
        assert method.family in suite.quick and method.steps and method.batch
    full_labels = {count for cells in suite.finetuning if cells.mode == "full" for count in cells.labels}
    assert full_labels == {2, 4, 8} and {cells.mode for cells in suite.finetuning} == {"full", "encoder", "frozen", "linear"} <= set(MODES)
    assert suite.generator.labelled > max(full_labels)  # the upper bound is another run than the last step of the grid


def test_the_full_grid_replaces_what_it_names():
    short, full = read_suite(EMBEDDED), read_suite(EMBEDDED, True)
    assert full.generator == short.generator and full.quick == short.quick and len(full.methods) > len(short.methods) and full.digest != short.digest


def test_values_have_the_types_of_their_fields(tmp_path):
    content = {"quick": {"resenc": {"epochs": 3}}, "generator": {"spacing": 6}, "registration": None}
    suite = read_suite(written(tmp_path, **content))
    assert suite.quick == {"resenc": Quick(epochs=3)} and suite.generator == Generator(spacing=6.0) and suite.registration is None
    assert suite.methods == (Method("MAETrainer", steps=5),) and suite.finetuning == (Cells("full", (2,)),)
    assert read_suite(written(tmp_path, unlabelled=802, labelled=[902])).labelled == ("902",)


MISTAKES = {
    "unknown key 'sedes'": {"sedes": 3},
    "unknown key 'trianer'": {"methods": [{"trianer": "MAETrainer"}]},
    "the key 'trainer' is missing": {"methods": [{"steps": 3}]},
    "'many' is no whole number": {"seeds": "many"},
    "'True' is no whole number": {"seeds": True},
    "'0.5' is no whole number": {"seeds": 0.5},
    "'3' is no mapping": {"generator": 3},
    "no method is named": {"methods": []},
    "0 seeds are impossible": {"seeds": 0},
    "must be at least 1": {"finetuning": [{"mode": "full", "labels": [0]}]},
    "99 labels are wanted, 16 cases are labelled": {"finetuning": [{"mode": "full", "labels": [99]}]},
    "labelled datasets are named beside embedded data": {"labelled": [902]},
    "no labelled dataset is named": {"unlabelled": 802},
    "two methods are called": {"methods": [{"trainer": "MAETrainer"}] * 2},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_with_its_place(message, tmp_path):
    file = written(tmp_path, **MISTAKES[message])
    with pytest.raises(UserError, match=message) as caught:
        read_suite(file)
    assert str(file) in caught.value.where and caught.value.fix


def test_the_closest_key_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        read_suite(written(tmp_path, methods=[{"trianer": "MAETrainer"}]))
    assert caught.value.fix == "did you mean 'trainer'?" and caught.value.where.endswith("methods[0].trianer")


def test_a_file_that_is_no_suite_is_told(tmp_path):
    for content, message in (("a: [", "can't be read"), ("- a", "no mapping")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            read_suite(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="can't be read"):
        read_suite(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="no full grid"):
        read_suite(written(tmp_path), full=True)


def test_unknown_trainers_options_and_modes_are_told_before_anything_is_computed():
    for method, message in ((Method("MAETrainr"), "MAETrainr"), (Method("MAETrainer", options={"mask": 1}), "mask")):
        with pytest.raises(UserError, match=message):
            check(Suite("x", (method,)), "here")
    with pytest.raises(UserError, match="no mode 'ful'"):
        check(Suite("x", (Method("MAETrainer"),), finetuning=(Cells("ful", (2,)),)), "here")


def test_a_mode_that_no_family_has_is_told_with_those_that_they_have():
    alone, both = (MAE,), (MAE, Method("MAETrainer", "primus"))
    check(Suite("x", both, finetuning=(Cells("adapter", (2,)),)), "here")
    for methods in (alone, (*alone, Method("PatchClusterTrainer", "resenc"))):
        with pytest.raises(UserError, match="no mode adapter for resenc") as caught:
            check(Suite("x", methods, finetuning=(Cells("full", (2,)), Cells("adapter", (2,)))), "here")
        assert caught.value.fix == "choose among full, encoder, frozen, mlp, linear"


def test_the_command_line_offers_every_mode():
    (choices,) = (action.choices for action in arguments()._actions if action.dest == "mode")
    assert tuple(choices) == tuple(MODES)


def test_steps_are_divided_into_windows_and_options_have_the_types_of_the_config():
    config = config_of(Method("MAETrainer", "resenc", 450, 4, {"lr": "1e-3", "optimizer": "adamw"}), 2)
    assert (config.epochs, config.iterations, config.batch_size, config.seed, config.lr) == (5, 90, 4, 2, 1e-3)
    assert config_of(Method("MAETrainer", steps=2), 0).epochs == 2
    own = config_of(Method("DINOv2Trainer", options={"local_share": [0.1, 0.4]}), 0)
    assert own.epochs == 1000 and own.local_share == (0.1, 0.4)


def test_the_digest_of_a_suite_depends_on_its_content():
    one, other = (Suite("x", (Method("MAETrainer", steps=steps),)) for steps in (5, 6))
    assert one.digest != other.digest == Suite("x", (Method("MAETrainer", steps=6),)).digest
    check_numbers(one, "here")
