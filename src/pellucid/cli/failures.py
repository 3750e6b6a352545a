"""How a failed command ends: three parts on stderr (what, why, next), an `error` event with `--json`, an exit code."""

from __future__ import annotations

import difflib
import json
import os
import sys
from dataclasses import dataclass
from typing import TextIO

from pellucid.errors import PellucidError
from pellucid.events import Event
from pellucid.messages import say


@dataclass
class Failure(Event):
    """The command failed: what happened, why, what to do next."""

    kind = "error"
    what: str
    why: str
    next: str
    exit_code: int


def report(error: BaseException, as_json: bool) -> int:
    """Show `error` and return the exit code that belongs to it."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `pellucid ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if os.environ.get("PELLUCID_DEBUG") and not isinstance(error, KeyboardInterrupt):
        import traceback

        traceback.print_exception(error)
    failure = told(error)
    if as_json:
        print(json.dumps(failure.as_dict(), ensure_ascii=False), flush=True)
    print(three_parts(failure, coloured(sys.stderr)), file=sys.stderr, flush=True)
    return failure.exit_code


def told(error: BaseException) -> Failure:
    """Any exception as the record that people and programs get."""
    if isinstance(error, PellucidError):
        return Failure(error.what, error.why, error.next, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure(say("error.interrupted"), "", "", 130)
    first_line = (str(error).strip() or "-").split("\n")[0]
    return Failure(say("error.unexpected", name=type(error).__name__, text=first_line), "", say("error.debug"), 1)


def three_parts(failure: Failure, colour: bool) -> str:
    red, dim, off = ("\x1b[1;31m", "\x1b[2m", "\x1b[0m") if colour else ("", "", "")
    lines = [f"{red}{say('error.error')}:{off} {failure.what}"]
    for key, text in (("error.why", failure.why), ("error.next", failure.next)):
        if text:
            lines.append(f"  {dim}{say(key)}:{off} {text}")
    return "\n".join(lines)


def did_you_mean(word: str, choices: list[str]) -> str:
    """A sentence naming the closest of `choices`, or the empty string."""
    close = difflib.get_close_matches(word, choices, n=1)
    return say("error.nearest", word=close[0]) if close else ""


def is_terminal(stream: TextIO) -> bool:
    """A terminal that understands cursor movement."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """Colour is welcome: a terminal, and NO_COLOR (https://no-color.org) is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
