"""How a text is cut: every token on its own colour, its id below it or beside it."""

from __future__ import annotations

from collections.abc import Iterable

COLOURS = (153, 223, 157, 218, 229, 189)
"""Six light backgrounds of the 256-colour palette; neighbours differ, text on them is black."""


def show_tokens(tokens: Iterable[tuple[bytes, int]], colour: bool = True) -> str:
    """One line of coloured tokens and one line of ids per line of text; without colour, `token·id` between bars.

    tokens: (bytes, id) in order.  Newlines show as ⏎ and end the line; spaces as ␣ where they stand at an edge of
    a token; bytes that are no whole character as <e4>.
    """
    lines: list[list[tuple[str, int]]] = [[]]
    for token, number in tokens:
        lines[-1].append((visible(token), number))
        if token.endswith(b"\n"):
            lines.append([])
    return "\n".join(_line(line, colour) for line in lines if line)


def visible(token: bytes) -> str:
    """A token as one can see it.

    >>> visible(b" the"), visible("你".encode()[:2]), visible(b"\\n\\n")
    ('␣the', '<e4><bd>', '⏎⏎')
    """
    text = token.decode("utf-8", errors="surrogateescape")
    shown = "".join(f"<{ord(c) - 0xDC00:02x}>" if "\udc80" <= c <= "\udcff" else _visible_character(c) for c in text)
    inner = shown.strip(" ")
    left = len(shown) - len(shown.lstrip(" "))
    return "␣" * left + inner + "␣" * (len(shown) - len(inner) - left)


def _visible_character(c: str) -> str:
    if c == "\n":
        return "⏎"
    return c if c == " " or c.isprintable() else f"<U+{ord(c):04X}>"


def _line(tokens: list[tuple[str, int]], colour: bool) -> str:
    if not colour:
        return "|".join(f"{text}·{number}" for text, number in tokens)
    cells = [f"\x1b[48;5;{COLOURS[i % len(COLOURS)]}m\x1b[30m{text}\x1b[0m\x1b[2m{number}\x1b[0m"
             for i, (text, number) in enumerate(tokens)]
    return " ".join(cells)
