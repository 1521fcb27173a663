import os

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.registry import all_classes, find_class
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.backbones.resenc import ResEncBackbone

PACKAGE = "nnssl_ext.nn.backbones"
PLUGIN = """
from nnssl_ext.nn.backbones.base import Backbone

class {name}(Backbone):
    family = "mine"

class _Hidden(Backbone):
    pass
"""


def plugin(folder, name="MyBackbone", file="mine.py"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(PLUGIN.format(name=name))
    return folder


def test_built_in_classes_are_found_by_name():
    assert find_class("ResEncBackbone", Backbone, PACKAGE) is ResEncBackbone


def test_the_base_itself_and_imported_classes_are_not_listed():
    assert set(all_classes(Backbone, PACKAGE)) == {"ResEncBackbone", "ResEncSlicesBackbone", "PrimusBackbone", "PrimusV2Backbone", "SegFormer3DBackbone"}


def test_a_misspelt_name_gets_the_closest_one():
    with pytest.raises(UserError, match="unknown Backbone 'ResEncBakbone'") as caught:
        find_class("ResEncBakbone", Backbone, PACKAGE)
    assert caught.value.fix == "did you mean 'ResEncBackbone'?"


def test_a_plug_in_is_found_by_name_in_a_folder_below_the_listed_one(tmp_path, monkeypatch):
    plugin(tmp_path / "deep" / "er")
    monkeypatch.setenv("nnssl_extPath", str(tmp_path))
    found = find_class("MyBackbone", Backbone, PACKAGE)
    assert issubclass(found, Backbone)
    assert found is find_class("MyBackbone", Backbone, PACKAGE)


def test_several_plug_in_folders_are_searched_and_empty_entries_ignored(tmp_path, monkeypatch):
    plugin(tmp_path / "a", "First")
    plugin(tmp_path / "b", "Second")
    monkeypatch.setenv("nnssl_extPath", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    assert {"First", "Second"} <= set(all_classes(Backbone, PACKAGE))


def test_names_that_begin_with_an_underscore_stay_private(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_extPath", str(plugin(tmp_path)))
    assert "_Hidden" not in all_classes(Backbone, PACKAGE)


def test_a_built_in_wins_over_a_plug_in_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_extPath", str(plugin(tmp_path, "ResEncBackbone")))
    assert find_class("ResEncBackbone", Backbone, PACKAGE) is ResEncBackbone


def test_without_the_variable_the_plug_in_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_extPath", str(plugin(tmp_path, "Temporary")))
    assert find_class("Temporary", Backbone, PACKAGE)
    monkeypatch.delenv("nnssl_extPath")
    with pytest.raises(UserError):
        find_class("Temporary", Backbone, PACKAGE)


def test_a_plug_in_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import no_such_module_at_all")
    monkeypatch.setenv("nnssl_extPath", str(tmp_path))
    for _ in range(2):  # the second time too
        with pytest.raises(UserError, match="ModuleNotFoundError") as caught:
            all_classes(Backbone, PACKAGE)
        assert caught.value.where == str(tmp_path / "broken.py")


def test_a_plug_in_folder_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_extPath", str(tmp_path / "none"))
    with pytest.raises(UserError, match="does not exist") as caught:
        all_classes(Backbone, PACKAGE)
    assert caught.value.where == str(tmp_path / "none")
