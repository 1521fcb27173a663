"""Dataset IDs and the three folders: nnssl_raw, nnssl_preprocessed, nnssl_results."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnssl_ext.core.errors import UserError, did_you_mean

RAW, PREPROCESSED, RESULTS = "nnssl_raw", "nnssl_preprocessed", "nnssl_results"
_DATASET = re.compile(r"Dataset(\d{3,})_(.+)")


def root(variable: str) -> Path:
    """The folder that the environment variable `variable` names (read when needed, never at import).

    Raises:
        UserError: the variable is not set.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise UserError(f"the environment variable {variable} is not set", "", f"export {variable}=/path/to/{variable}")
    return Path(value)


def datasets(folder: Path) -> dict[int, list[str]]:
    """All `DatasetXXX_NAME` folders below `folder`, by ID."""
    found: dict[int, list[str]] = {}
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            match = _DATASET.fullmatch(entry.name)
            if match and entry.is_dir():
                found.setdefault(int(match[1]), []).append(entry.name)
    return found


def dataset_name(identifier: int | str, roots: tuple[str, ...] = (RAW, PREPROCESSED, RESULTS)) -> str:
    """`DatasetXXX_NAME` for an ID ("801", 801) or a full name.

    Args:
        identifier: dataset ID or folder name.
        roots: environment variables whose folders are searched, in this order; the first must be set.

    Raises:
        UserError: unknown or ambiguous ID.
    """
    names: dict[int, set[str]] = {}
    for variable in roots:
        folder = root(variable) if variable == roots[0] else Path(os.environ.get(variable, "") or os.devnull)
        for number, found in datasets(folder).items():
            names.setdefault(number, set()).update(found)
    everything = {name for group in names.values() for name in group}
    if isinstance(identifier, str) and not identifier.isdigit():
        if identifier in everything:
            return identifier
        raise UserError(f"unknown dataset '{identifier}'", root(roots[0]), did_you_mean(identifier, everything))
    number = int(identifier)
    candidates = sorted(names.get(number, ()))
    if not candidates:
        have = ", ".join(str(n) for n in sorted(names)) or "none"
        raise UserError(f"unknown dataset ID {number}", root(roots[0]), f"known IDs: {have}; a dataset is a folder Dataset{number:03d}_NAME")
    if len(candidates) > 1:
        raise UserError(f"dataset ID {number} names several datasets: {', '.join(candidates)}", root(roots[0]), "rename or remove all but one")
    return candidates[0]


def raw_folder(name: str) -> Path:
    return root(RAW) / name


def preprocessed_folder(name: str) -> Path:
    return root(PREPROCESSED) / name


def results_folder(name: str) -> Path:
    return root(RESULTS) / name


def index_cache(name: str) -> Path:
    """The file that remembers what the folders of a DICOM or HDF5 tree hold."""
    return preprocessed_folder(name) / "index_cache.json"
