"""What happens when a loss or a gradient is not finite: the step is skipped and captured, a run that can't recover ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import DiskError, UserError
from nnssl_ext.nn import distributed
from nnssl_ext.trainers.checkpoint import save_checkpoint
from nnssl_ext.trainers.update import Outcome

CAPTURES = 3  # of a run; each is as large as a checkpoint


class NonFiniteGuard:
    """Counts skipped steps.

    Args:
        folder: where captured steps are written, as nonfinite_step_N.pth; None (ranks other than 0) captures nothing.
        limit: so many skipped steps in a row end the run.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.in_a_row, self.total = 0, 0

    def seen(self, step: int, outcome: Outcome, state: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> None:
        """After every step.

        Args:
            step: its number.
            outcome: what became of it.
            state: content of a checkpoint of the moment; weights and position are those before the step.
            say: shows a line to the user.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        if outcome.applied:
            self.in_a_row = 0
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        loss = outcome.values["total"]
        what = f"loss ({loss:g}) or gradient norm ({outcome.norm:g}) is not finite at step {step}"
        captured = ""
        if self.total <= CAPTURES:
            content = state()  # on all ranks: they put a sharded model together
            if self.folder is not None:
                file = self.folder / f"nonfinite_step_{step:07d}.pth"
                try:
                    save_checkpoint(file, content | {"ranks": distributed.ranks(), "losses": outcome.values, "norm": outcome.norm, "loss_scale": outcome.scale})
                    captured = f"; the state before it is in {file}, --replay {step} finds where that begins"
                except DiskError as error:  # the run doesn't need it
                    captured = f"; the state before it is lost: {error.what}"
        say(f"step skipped: {what}{captured}")
        if self.in_a_row >= self.limit:
            fix = "lower the learning rate (-o lr=...), or continue an earlier checkpoint with --c"
            raise UserError(f"{self.in_a_row} steps in a row were not finite; the last: {what}", self.folder or "", fix)

    def state(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load(self, state: dict[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]
