"""What a piece of work costs: time and memory."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil
import torch

COSTS = ("seconds", "cpu_seconds", "memory_gb")
_EVERY_S = 0.01
_GB = 1e9


class Cost:
    """Measures the block that it is the context of.

    `figures` are "seconds", "cpu_seconds" of all threads of this process, and "memory_gb": on a card the most that it held for this process, else the
    most that this process had in memory altogether, looked at a hundred times a second.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._card = torch.device(device).type == "cuda"
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._most = 0

    def __enter__(self) -> Cost:
        if self._card:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watch.start()
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._card:
            torch.cuda.synchronize()
        self._ended = time.perf_counter(), time.process_time()
        if self._card:
            self._most = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._watch.join()

    def figures(self) -> dict[str, float]:
        """Of the finished block, by `COSTS`."""
        seconds, cpu_seconds = (end - begin for begin, end in zip(self._began, self._ended))
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory_gb": self._most / _GB}

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            self._most = max(self._most, process.memory_info().rss)
            if self._done.wait(_EVERY_S):
                return
