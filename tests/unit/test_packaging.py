"""What pyproject.toml declares agrees with the code."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from documentation.generate import parser_of

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'(?m)^(nnssl_\w+) = "([\w.]+):main"$', TEXT))


PACKAGES = {"sklearn": "scikit_learn", "PIL": "pillow", "yaml": "pyyaml"}  # modules of another name than their package's


def declared():
    """Dependencies, and those of the extras for users."""
    blocks = [re.search(r"(?ms)^dependencies = \[(.*?)^\]", TEXT)[1], *re.findall(r"(?m)^(?:dask|hdf5|tracking) = \[(.*)\]$", TEXT)]
    return {re.split(r"[<>=]", name)[0].lower().replace("-", "_") for block in blocks for name in re.findall(r'"(.+?)"', block)}


def imported():
    found = {}
    for file in (ROOT / "nnssl_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                found.setdefault(name.partition(".")[0], file.name)
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name != "nnssl_ext"}


def test_every_imported_package_is_a_declared_dependency():
    missing = {name: file for name, file in imported().items() if PACKAGES.get(name, name).lower() not in declared()}
    assert not missing


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_script_has_a_main_and_a_parser_of_its_name(script):
    module = importlib.import_module(SCRIPTS[script])
    assert parser_of(module.main).prog == script


def test_every_file_with_a_main_is_a_console_script():
    files = {f"nnssl_ext.cli.{file.stem}" for file in (ROOT / "nnssl_ext" / "cli").glob("*.py") if "def main(" in file.read_text(encoding="utf-8")}
    assert files <= set(SCRIPTS.values())


def test_only_the_package_is_packaged():
    assert {name.partition(".")[0] for name in find_packages(str(ROOT), include=["nnssl_ext*"])} == {"nnssl_ext"}


def test_every_init_file_but_the_root_is_empty():
    assert [str(file) for file in (ROOT / "nnssl_ext").glob("*/**/__init__.py") if file.read_text().strip()] == []


def test_the_lock_file_names_public_hosts_only():
    hosts = set(re.findall(r'"(?:https?|file)://([^/"]*)', (ROOT / "uv.lock").read_text(encoding="utf-8")))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}
