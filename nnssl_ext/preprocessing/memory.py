"""How much memory is free, and who may take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

_GROUPS = Path("/sys/fs/cgroup")


class MemoryGuard:
    """Keeps count of the memory that the items in work take.

    Args:
        budget: bytes they may take together; one item is always let in, whatever its size.
        memory: bytes that an item takes at most.
    """

    def __init__(self, budget: int, memory: Callable[[Any], int]) -> None:
        self.budget, self._memory = budget, memory
        self._held: dict[int, int] = {}
        self._next = (-1, 0)  # the item that waits, and its memory

    def admits(self, index: int, item: Any) -> bool:
        """Let item number `index` in if there is room for it."""
        if self._next[0] != index:
            self._next = index, self._memory(item)
        if self._held and sum(self._held.values()) + self._next[1] > self.budget:
            return False
        self._held[index] = self._next[1]
        return True

    def release(self, index: int) -> None:
        self._held.pop(index, None)


def available_memory() -> int:
    """Bytes that this process and its children may still take: what is free on the machine and in the control groups of a container or a job."""
    return max(0, min([int(psutil.virtual_memory().available), *_free_in_groups()]))


def _free_in_groups(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What is free in each control group with a limit that this process belongs to (versions 1 and 2)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (groups, ("memory.max", "memory.current")) if not controllers else (groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        folder = root / place.lstrip("/")
        while folder == root or root in folder.parents:
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                statistics = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + int(statistics.get("inactive_file", 0))  # cached files give way
            except (OSError, ValueError):  # no such file, or "max"
                pass
            folder = folder.parent
