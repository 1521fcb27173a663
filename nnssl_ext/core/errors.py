"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: what happened, where, and how to mend it.

    Command-line programs print it in at most three lines and end with exit code 2.

    Args:
        what: one sentence, what is wrong.
        where: file, folder, case or option it concerns.
        fix: one sentence, how to mend it.
    """

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(what, self.where, fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ImageError(UserError):
    """A file that can't be used as an image.

    Args:
        kind: the defect as one word, such as "truncated"; see `KINDS` in `nnssl_ext.io.readers`.
        what, where, fix: as for `UserError`.
    """

    def __init__(self, kind: str, what: str, where: object = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.kind = kind
        self.args = (kind, what, self.where, fix)  # what pickling hands to the constructor


class DiskError(UserError):
    """The disk is full, read-only or failing: going on with other cases makes no sense."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name, or lists all of them (at most 12)."""
    known = sorted(known)
    folded = {k.lower(): k for k in known}
    close = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)]
    if close:
        return f"did you mean '{close[0]}'?"
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {listed}" if known else "none is known"
