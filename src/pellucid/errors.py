"""The errors that people see: what happened, why, and what to do next.

Raise `BadInput` when the person can mend it by changing what they typed or gave (exit code 2),
`PellucidError` when work failed for another reason (exit code 1). Invariants of our own stay `assert`.
"""

from __future__ import annotations


class PellucidError(Exception):
    """A failure told in three parts.

    what: what happened, in one sentence.  why: the cause, where known.
    next: the command or change that helps.  Exit code 1 on the command line.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", next: str = ""):
        super().__init__(what)
        self.what, self.why, self.next = what, why, next

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.next:
            lines.append(f"  next: {self.next}")
        return "\n".join(lines)


class BadInput(PellucidError, ValueError):
    """Input that is refused before work begins.  Exit code 2 on the command line."""

    exit_code = 2


class Interrupted(PellucidError, KeyboardInterrupt):
    """Stopped by the person; what was done is saved.  Exit code 130 on the command line."""

    exit_code = 130


def nearest(word: str, choices: list[str]) -> str:
    """`, did you mean 'x'?` for the closest of `choices`, or the empty string."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
