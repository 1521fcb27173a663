"""What a run shows on the terminal: a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 60.0  # between two lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """ "1:02:03", or "2 days 1:02:03"."""
    days, rest = divmod(int(max(0.0, seconds) + 0.5), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} day{'s' * (days > 1)} {text}" if days else text


class Eta:
    """Speed and time that is left, from the steps of this process alone.

    Args:
        total: steps of the whole run.
        done: those of former processes.
    """

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.first, self.clock, self.began = total, done, clock, clock()

    def steps_per_second(self, step: int) -> float:
        return (step - self.first) / max(self.clock() - self.began, 1e-9)

    def left(self, step: int) -> str:
        """Time until the end, as text; "?" before the first step."""
        return duration((self.total - step) / self.steps_per_second(step)) if step > self.first else "?"


class Bar:
    """A progress bar with time left on a terminal; elsewhere a line after the first step and then every minute.

    Args:
        total: steps of the whole run.
        done: steps of former processes, from which this one continues.
        quiet: shows nothing.
    """

    def __init__(self, total: int, done: int, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.quiet, self.clock, self.eta = console or Console(), quiet, clock, Eta(total, done, clock)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self.plain = not self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, disable=quiet or self.plain, transient=True)
        self.task = self.progress.add_task("training", total=total, completed=done)
        self.said = -PLAIN_EVERY_S + clock()

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, step: int, loss: float) -> None:
        """After step number `step` (counted from 1)."""
        self.progress.update(self.task, completed=step, description=f"loss {loss:.4f}")
        if self.plain and not self.quiet and self.clock() - self.said >= PLAIN_EVERY_S:
            self.say(f"step {step}/{self.eta.total}  loss {loss:.4f}  {self.eta.steps_per_second(step):.3g} steps/s  ETA {self.eta.left(step)}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.said = self.clock()
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
