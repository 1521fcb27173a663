import copy
import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import write_json
from nnssl_ext.core.plan import SCHEMA, ConfigPlan, NetworkPlan, Normalization, Plan

NETWORK = NetworkPlan("tiny", "package.Net", {"strides": [[1, 1, 1], [2, 2, 2]], "norm_op": "torch.nn.InstanceNorm3d"}, ("norm_op",), 2, 1.5)


def config(**changes):
    values = {
        "data_identifier": "nnsslPlans_3d_fullres",
        "spacing": (3.0, 1.0, 1.0),
        "patch_size": (32, 64, 64),
        "median_shape": (50, 120, 120),
        "normalization": {"CT": Normalization("ct", 10.0, 100.0, -900.0, 800.0)},
        "resampling": {"order": 3, "order_z": 0, "force_separate_z": None},
        "networks": {"resenc": NETWORK},
    }
    return ConfigPlan(**{**values, **changes})


def plan():
    configurations = {"3d_fullres": config(), "noresample": config(spacing=None)}
    return Plan("Dataset801_Test", "nnsslPlans", "Planner", 1, 8.0, "0" * 64, ("because",), configurations)


def slices(**changes):
    network = NetworkPlan("tiny", "package.Net", {"strides": [[1, 1], [2, 4]]}, (), 2, 1.5)
    return config(**{"spacing": (1.0, None, 0.5), "patch_size": (64, 1, 64), "networks": {"resenc": network}, **changes})


def test_a_configuration_of_slices_knows_its_axis_and_keeps_the_distance_of_slices():
    assert (slices().slice_axis, config().slice_axis, config(spacing=None).slice_axis) == (1, None, None)
    assert slices().spacing_for((9.0, 8.0, 7.0)) == (1.0, 8.0, 0.5)
    assert config().spacing_for((9.0, 8.0, 7.0)) == (3.0, 1.0, 1.0) and config(spacing=None).spacing_for((9.0, 8.0, 7.0)) == (9.0, 8.0, 7.0)
    assert slices().in_volume(slices().network("resenc").cell) == (2, 1, 4) and config().in_volume((2, 2, 2)) == (2, 2, 2)
    assert slices().network("resenc").axes == 2 and config().network("resenc").axes == 3
    with pytest.raises(UserError, match="'primus' has no network for slices.*\n.*\n.*-b resenc"):
        slices().network("primus")


def test_a_plan_with_slices_comes_back_equal_and_no_second_axis_may_be_left_open(tmp_path):
    mixed = dataclasses.replace(plan(), configurations={"2d": slices()})
    mixed.save(tmp_path / "plans.json")
    assert Plan.load(tmp_path / "plans.json") == mixed
    with pytest.raises(UserError, match="invalid plan: configurations/2d/spacing"):
        dataclasses.replace(plan(), configurations={"2d": slices(spacing=(1.0, None, None))}).save(tmp_path / "plans.json")


def test_a_plan_comes_back_equal_from_its_file(tmp_path):
    plan().save(tmp_path / "plans.json")
    assert Plan.load(tmp_path / "plans.json") == plan()


def test_a_saved_plan_is_plain_json_that_fits_the_schema(tmp_path):
    plan().save(tmp_path / "plans.json")
    content = json.loads((tmp_path / "plans.json").read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(content, SCHEMA)
    assert content == plan().as_dict()


def test_every_field_of_the_classes_is_in_the_schema_and_required():
    levels = [(Plan, SCHEMA)]
    one = SCHEMA["properties"]["configurations"]["additionalProperties"]
    levels += [(ConfigPlan, one), (NetworkPlan, one["properties"]["networks"]["additionalProperties"])]
    levels += [(Normalization, one["properties"]["normalization"]["additionalProperties"])]
    for cls, schema in levels:
        names = {field.name for field in dataclasses.fields(cls)}
        assert names == set(schema["properties"]) == set(schema["required"])


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().channels = 2


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_schema_version_is_refused_with_the_command_that_plans_again(version):
    with pytest.raises(UserError, match=f"plan schema version {version}, this version reads 1") as caught:
        Plan.from_dict({**plan().as_dict(), "schema_version": version})
    assert "nnssl_plan_experiment" in caught.value.fix


@pytest.mark.parametrize("content", [None, [], "text", 3, {}])
def test_what_is_no_plan_at_all_is_refused(content):
    with pytest.raises(UserError, match="plan schema version None"):
        Plan.from_dict(content)


CONFIG = ("configurations", "3d_fullres")
BAD = [
    (("dataset_name",), ""),
    (("plans_name",), 3),
    (("planner",), None),
    (("channels",), 0),
    (("channels",), 1.5),
    (("gpu_memory_target_gb",), 0),
    (("gpu_memory_target_gb",), "8"),
    (("fingerprint_sha256",), "abc"),
    (("fingerprint_sha256",), "G" * 64),
    (("decisions",), "text"),
    (("decisions", 0), 1),
    (("configurations",), {}),
    ((*CONFIG, "data_identifier"), ""),
    ((*CONFIG, "spacing"), [1.0, 1.0]),
    ((*CONFIG, "spacing", 0), 0),
    ((*CONFIG, "spacing", 1), -1.0),
    ((*CONFIG, "patch_size"), [32, 32]),
    ((*CONFIG, "patch_size", 2), 0),
    ((*CONFIG, "patch_size", 2), 32.5),
    ((*CONFIG, "median_shape"), None),
    ((*CONFIG, "normalization"), {}),
    ((*CONFIG, "normalization", "CT", "std"), 0),
    ((*CONFIG, "normalization", "CT", "scheme"), ""),
    ((*CONFIG, "normalization", "CT", "mean"), None),
    ((*CONFIG, "resampling"), []),
    ((*CONFIG, "networks"), {}),
    ((*CONFIG, "networks", "resenc", "size"), ""),
    ((*CONFIG, "networks", "resenc", "class_name"), 1),
    ((*CONFIG, "networks", "resenc", "kwargs"), []),
    ((*CONFIG, "networks", "resenc", "imports"), "norm_op"),
    ((*CONFIG, "networks", "resenc", "batch_size"), 0),
    ((*CONFIG, "networks", "resenc", "memory_gb"), 0),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else repr(value)[:12])
def test_a_bad_field_is_refused_and_named(path, value):
    content = plan().as_dict()
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError, match="invalid plan: ") as caught:
        Plan.from_dict(content, "plans.json")
    assert caught.value.what.startswith("invalid plan: " + "/".join(map(str, path)))
    assert caught.value.where == "plans.json"
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("path", [(), CONFIG, (*CONFIG, "networks", "resenc"), (*CONFIG, "normalization", "CT")], ids=lambda path: "/".join(path) or "top")
def test_a_missing_and_a_surplus_field_are_refused(path):
    for change in ("missing", "surplus"):
        content = copy.deepcopy(plan().as_dict())
        place = content
        for key in path:
            place = place[key]
        if change == "surplus":
            place["surplus"] = 1
        else:
            del place[next(key for key in place if key != "schema_version")]
        with pytest.raises(UserError, match="invalid plan"):
            Plan.from_dict(content)


def test_an_invalid_plan_is_not_saved(tmp_path):
    wrong = dataclasses.replace(plan(), channels=0)
    with pytest.raises(UserError, match="channels"):
        wrong.save(tmp_path / "plans.json")
    assert not (tmp_path / "plans.json").exists()


def test_a_file_that_is_no_plan_names_the_file(tmp_path):
    write_json(tmp_path / "plans.json", {"schema_version": 1})
    with pytest.raises(UserError) as caught:
        Plan.load(tmp_path / "plans.json")
    assert caught.value.where == str(tmp_path / "plans.json")


def test_unknown_configurations_and_families_get_the_closest_name():
    with pytest.raises(UserError, match="unknown configuration '3d_fulres'") as caught:
        plan().configuration("3d_fulres")
    assert caught.value.fix == "did you mean '3d_fullres'?"
    with pytest.raises(UserError, match="unknown backbone family 'resnec'") as caught:
        plan().configuration("3d_fullres").network("resnec")
    assert caught.value.fix == "did you mean 'resenc'?"


def test_a_plan_of_the_first_schema_version_still_loads_unchanged():
    file = Path(__file__).with_name("plan_v1.json")
    assert Plan.load(file).as_dict() == json.loads(file.read_text())
