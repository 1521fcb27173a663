"""Find a class by name among the built-ins and the user's plug-in folders."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from nnssl_ext.core.errors import UserError, did_you_mean

PLUGIN_VARIABLE = "nnssl_extPath"
T = TypeVar("T")


def find_class(name: str, base: type[T], package: str, with_base: bool = False) -> type[T]:
    """The subclass of `base` called `name` (`base` itself counts `with_base`).

    Looked for in the modules of `package` (dotted name) and then in every ``*.py`` below the folders that the
    environment variable ``nnssl_extPath`` lists (separated as in PATH).

    Raises:
        UserError: no such class; names the closest one.
    """
    known = all_classes(base, package) | ({base.__name__: base} if with_base else {})
    if name not in known:
        raise UserError(f"unknown {base.__name__} '{name}'", f"package {package} and ${PLUGIN_VARIABLE}", did_you_mean(name, known))
    return known[name]


def all_classes(base: type[T], package: str) -> dict[str, type[T]]:
    """Every concrete subclass of `base` by name; built-ins win over plug-ins of the same name."""
    found: dict[str, type[T]] = {}
    for module in _modules(package):
        for name, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, base) and member is not base and member.__module__ == module.__name__ and not name.startswith("_"):
                found.setdefault(name, member)
    return found


def _modules(package: str) -> Iterator[ModuleType]:
    parent = importlib.import_module(package)
    for info in pkgutil.iter_modules(parent.__path__, parent.__name__ + "."):
        if not info.ispkg:
            yield importlib.import_module(info.name)
    for folder in filter(None, os.environ.get(PLUGIN_VARIABLE, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            raise UserError(f"a folder of ${PLUGIN_VARIABLE} does not exist", folder, "correct the environment variable")
        for file in sorted(Path(folder).rglob("*.py")):
            yield _load(file.resolve())


def _load(file: Path) -> ModuleType:
    name = "nnssl_ext_plugin_" + "_".join(file.with_suffix("").parts[1:])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"a plug-in could not be imported: {type(error).__name__}: {error}", file, f"mend the file or take its folder out of ${PLUGIN_VARIABLE}"
        ) from error
    return module
