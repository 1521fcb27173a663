"""Work beside the training that may take a small share of the time only."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """``if pace.due(): with pace: work()``: work is due again when it took no more than `share` of the time that passed.

    Args:
        share: of the wall time, 0 to 1.
        pause: seconds that pass at least between two turns.
        clock: seconds.
    """

    def __init__(self, share: float = 0.02, pause: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.share, self.pause, self.clock = share, pause, clock
        self.began = self.next = clock()

    def due(self) -> bool:
        return self.clock() >= self.next

    def __enter__(self) -> Pace:
        self.began = self.clock()
        return self

    def __exit__(self, *_: object) -> None:
        now = self.clock()
        self.next = now + max(self.pause, (now - self.began) / self.share)
