"""Which characters of a rendered conversation came from people, and which the assistant wrote.

**No forged tokens.** A message that holds the text `<|im_end|>` must not end a turn. Before rendering, every
character of foreign text that could begin or end a control token gets an invisible mark before it; after
rendering, a control token is recognised only where no mark lies inside it. So neither a whole token in one
message nor one split over two neighbouring fields can be forged, whatever the template does with the text.
Control tokens are the special ones, and other added tokens that the template writes (`<think>`, `<tool_call>`).
Foreign is everything in messages and tools, except that the assistant's own content may hold the latter:
its thoughts are written as `<think>` ... `</think>`.

A template that looks for control text inside foreign text (Qwen3 takes a user message that starts with
`<tool_response>` for a tool's answer) does not find it here: the safe reading.

**The mask.** The spans of `{% generation %}` where the template has it; else found by rendering the
conversation again with each assistant message replaced by a probe, and comparing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.errors import BadInput
from pellucid.tokenizers.chat import BROKEN, CLOSE, OPEN

Span = tuple[int, int]
PROBE = "\ufdd3"
_MARKS = re.compile(f"[{BROKEN}{OPEN}{CLOSE}]")


@dataclass(frozen=True)
class Rendered:
    """text: what the model reads.  broken: positions whose character was marked.  spans: the assistant's."""

    text: str
    broken: frozenset[int]
    spans: list[Span]


class Guard:
    """Marks foreign text, given the control tokens: special ones, and words that the template writes."""

    def __init__(self, special: Iterable[str], words: Iterable[str]):
        special, words = list(special), list(words)
        edges = {end for token in special + words for end in (token[0], token[-1])}
        self._edges = re.compile("[" + "".join(map(re.escape, sorted(edges))) + "]" if edges else "(?!)")
        self._special = either(special)

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        own = message["role"] == "assistant"
        return {key: _map_strings(value, self._own) if own and key == "content" else self.foreign(value)
                for key, value in message.items()}

    def foreign(self, value: Any) -> Any:
        """Every edge marked, in keys too: tool schemas are written out with their keys."""
        return _map_strings(value, lambda text: self._edges.sub(rf"{BROKEN}\g<0>", text))

    def _own(self, text: str) -> str:
        """The assistant's content: only whole special tokens are broken."""
        return self._special.sub(lambda m: m.group()[0] + BROKEN + m.group()[1:], text)


def either(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of `tokens`, the longest where several begin; never matches when there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        # Marks that are already in the text would forge the assistant's spans.
        return change(_MARKS.sub("", value).replace(PROBE, ""))
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_strings(item, change) for item in value)
    return value


def unmark(marked: str) -> Rendered:
    """Take the marks out and keep their places."""
    parts, length, at = [], 0, 0
    broken, spans, opened = set(), [], []
    for mark in _MARKS.finditer(marked):
        parts.append(marked[at:mark.start()])
        length, at = length + mark.start() - at, mark.end()
        if mark.group() == BROKEN:
            broken.add(length)
        elif mark.group() == OPEN:
            opened.append(length)
        else:
            spans.append((opened.pop(), length))
    parts.append(marked[at:])
    return Rendered("".join(parts), frozenset(broken), spans)


def spans_by_comparison(render: Callable[[Sequence[Mapping[str, Any]], bool], Any], messages: Sequence[Mapping[str, Any]], special: Sequence[str],
                        ends: Sequence[str]) -> list[Span]:
    """The assistant's spans in a template without `{% generation %}`.

    render(messages, add_generation_prompt) -> text.  special: texts of special tokens; ends: those that end a turn.
    For each assistant message: the text that differs when the message is another one, begun earlier where the
    generation prompt ends, and ended after the special token that follows.
    """
    full = render(messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        other, follows = _with_probe(render, messages, i, ends)
        start, end = _difference(full, other)
        prompt = _generation_prompt(render, messages[:i])
        header = full.rfind(prompt, 0, start + len(prompt)) if prompt else -1
        start = header + len(prompt) if header >= 0 and header + len(prompt) <= start else start
        spans.append((start, _end_of_turn(full, end, special, follows)))
    return spans


def _with_probe(render: Callable[[Sequence[Mapping[str, Any]], bool], Any], messages: Sequence[Mapping[str, Any]], i: int,
                ends: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The text with message i replaced, and the tokens to search for behind it (empty: only what follows at once)."""
    try:
        return render([*messages[:i], {"role": "assistant", "content": PROBE}, *messages[i + 1:]], False), ()
    except BadInput:
        # Some templates insist on a call before a tool's answer: keep the calls, change their words.
        calls = [{**call, "function": {"name": PROBE, "arguments": {PROBE: PROBE}}}
                 for call in messages[i].get("tool_calls", [])]
        probe = {"role": "assistant", "content": PROBE, "tool_calls": calls}
        return render([*messages[:i], probe, *messages[i + 1:]], False), tuple(ends)


def _difference(a: str, b: str) -> Span:
    """Where `a` differs from `b`: behind the common prefix, before the common suffix."""
    shorter = min(len(a), len(b))
    start = next((k for k in range(shorter) if a[k] != b[k]), shorter)
    same = next((k for k in range(shorter - start) if a[-1 - k] != b[-1 - k]), shorter - start)
    return start, len(a) - same


def _generation_prompt(render: Callable[[Sequence[Mapping[str, Any]], bool], Any], before: Sequence[Mapping[str, Any]]) -> str:
    if not before:
        return ""
    without, with_prompt = render(before, False), render(before, True)
    return with_prompt[len(without):] if with_prompt.startswith(without) else ""


def _end_of_turn(text: str, end: int, special: Sequence[str], follows: tuple[str, ...]) -> int:
    if follows:
        found = either(follows).search(text, end)
    else:
        # A suffix shared by two different special tokens (<|eot_id|>, <|eom_id|>) may have moved `end` into one.
        inside = next((m for m in either(special).finditer(text) if m.start() < end < m.end()), None)
        found = inside or re.compile(rf"\s*(?:{either(special).pattern})").match(text, end)
    return found.end() if found else end


def segments(rendered: Rendered, spans: list[Span], tokens: re.Pattern[str]) -> Iterator[tuple[int, int, str]]:
    """(start, end, token): the text cut at added tokens, and at the edges of the spans; "" for plain text.

    tokens: matches any added token.
    """
    text = rendered.text
    edges = sorted({edge for span in spans for edge in span})
    at = 0
    for start, end in [*_unforged(rendered, tokens), (len(text), len(text))]:
        for cut in [*(edge for edge in edges if at < edge < start), start]:
            if cut > at:
                yield at, cut, ""
            at = cut
        if end > start:
            yield start, end, text[start:end]
        at = end


def _unforged(rendered: Rendered, tokens: re.Pattern[str]) -> Iterator[Span]:
    """The added tokens that no marked character is part of."""
    match = tokens.search(rendered.text)
    while match:
        whole = rendered.broken.isdisjoint(range(*match.span()))
        if whole:
            yield match.span()
        match = tokens.search(rendered.text, match.end() if whole else match.start() + 1)
