"""Look into every folder of a tree, in several processes, and remember what was found until a folder changes."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json, write_text

SAVE_EVERY_S = 60.0
_TOGETHER = 8  # folders per message to a process


def scan_tree(folder: Path, scan: Callable[[Path], Any], version: str, cache: Path | None = None, processes: int = 1) -> dict[str, Any]:
    """``scan(subfolder)`` of every folder of a tree that holds files.

    Args:
        folder: the root; hidden folders are left out, links to folders are followed.
        scan: importable function; what it returns must be fit for JSON.
        version: of `scan`; a cache of another version is not used.
        cache: JSON file with time of change and number of entries of every folder and what was found in it; written every minute, whole or not at all.
        processes: how many work.

    Returns:
        what was found, by path relative to the root ("." for the root itself), sorted.
    """
    known = _load(cache, version)
    states = {place.relative_to(folder).as_posix(): state for place, files, state in walk(folder) if files}
    found = {name: known[name] for name, state in states.items() if name in known and known[name][:2] == state}
    waiting = sorted(states.keys() - found.keys())
    saved = time.monotonic()
    for number, (name, result) in enumerate(zip(waiting, _results(scan, [folder / name for name in waiting], processes)), 1):
        found[name] = [*states[name], result]
        if time.monotonic() - saved > SAVE_EVERY_S:
            print(f"{folder.name}: looked into {number} of {len(waiting)} folders", flush=True)
            _save(cache, version, found)
            saved = time.monotonic()
    if waiting or found.keys() != known.keys():
        _save(cache, version, found)
    return {name: found[name][2] for name in sorted(found)}


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[int]]]:
    """Every folder of a tree: its path, the names of its files, its time of change and number of entries. Hidden folders are left out, links followed."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:  # a link back into the tree
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(files), [stat.st_mtime_ns, len(folders) + len(files)]


def _results(scan: Callable[[Path], Any], folders: list[Path], processes: int) -> Iterator[Any]:
    if processes <= 1 or len(folders) <= _TOGETHER:
        yield from map(scan, folders)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(scan, folders, chunksize=_TOGETHER)


def _load(cache: Path | None, version: str) -> dict[str, Any]:
    if cache is None or not cache.is_file():
        return {}
    try:
        content = read_json(cache)
    except UserError:
        return {}
    return dict(content["folders"]) if isinstance(content, dict) and content.get("version") == version else {}


def _save(cache: Path | None, version: str, found: dict[str, Any]) -> None:
    if cache is not None:
        write_text(cache, json.dumps({"version": version, "folders": found}, separators=(",", ":")) + "\n")
