"""Stopping from outside: SIGTERM, SIGUSR1 and SIGUSR2 (a scheduler that preempts a job, or whose time limit is near) end a run with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The run was asked to stop and has written checkpoint_latest; `exit_code` is 128 + the signal's number (143, 138 or 140)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; continue with --c")
        self.exit_code = 128 + number


class StopSignals:
    """While it is entered, the signals are only noted; the loop looks at `received` after every step.

    A second signal of the same kind acts as it would without us, for those who can't wait.
    """

    def __init__(self) -> None:
        self.received = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._former[number])
