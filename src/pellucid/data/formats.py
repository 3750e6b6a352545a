"""Datasets for alignment in the formats that people have: which one it is, and its rows as typed records.

    prompt-only           {"prompt"}                                  ->  PromptRecord
    prompt-completion     {"prompt", "completion"}                    ->  CompletionRecord
    preference            {"prompt", "chosen", "rejected"}, or the prompt inside both   ->  PreferenceRecord
    unpaired-preference   {"prompt", "completion", "label"}           ->  UnpairedRecord
    stepwise              {"prompt", "completions", "labels"}         ->  StepwiseRecord
    language-modeling     {"text"} or {"messages"}                    ->  TextRecord, ChatRecord

These are the names of trl's documentation.  A prompt, completion, chosen or rejected is a text or, in a conversational
dataset, a list of messages, with "tools" beside them where there are any.  ShareGPT's {"from", "value"} turns are read
as messages, and verl's parquet ({"data_source", "prompt", "reward_model": {"ground_truth"}}) as prompt-only.  All other
columns are kept in `extra`: reward functions get them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

from pellucid.data.chats import Message, from_sharegpt, messages_in, tools_in
from pellucid.errors import BadInput, nearest

Content = str | list[Message]
Kind = Literal["prompt-only", "prompt-completion", "preference", "unpaired-preference", "stepwise", "language-modeling"]
KINDS: tuple[Kind, ...] = ("prompt-only", "prompt-completion", "preference", "unpaired-preference", "stepwise",
                           "language-modeling")
FORMS: dict[str, str] = {
    "prompt-only": '{"prompt": "2+2?"} or {"prompt": [{"role": "user", "content": "2+2?"}]}',
    "prompt-completion": '{"prompt": "2+2?", "completion": "4"}, both texts or both lists of messages',
    "preference": '{"prompt": "2+2?", "chosen": "4", "rejected": "5"}, all texts or all lists of messages',
    "unpaired-preference": '{"prompt": "2+2?", "completion": "4", "label": true}',
    "stepwise": '{"prompt": "2+2+2?", "completions": ["2+2=4.", "4+2=7."], "labels": [true, false]}',
    "language-modeling": '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records have."""

    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the conversation may use."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The other columns."""


@dataclass(frozen=True)
class PromptRecord(Record):
    prompt: Content


@dataclass(frozen=True)
class CompletionRecord(Record):
    prompt: Content
    completion: Content


@dataclass(frozen=True)
class PreferenceRecord(Record):
    prompt: Content
    chosen: Content
    rejected: Content


@dataclass(frozen=True)
class UnpairedRecord(Record):
    prompt: Content
    completion: Content
    label: bool


@dataclass(frozen=True)
class StepwiseRecord(Record):
    prompt: Content
    completions: list[str]
    labels: list[bool]


@dataclass(frozen=True)
class TextRecord(Record):
    text: str


@dataclass(frozen=True)
class ChatRecord(Record):
    messages: list[Message]


@dataclass(frozen=True)
class Format:
    """What a dataset is, and by which of its columns that was seen."""

    kind: Kind
    conversational: bool
    why: str
    implicit_prompt: bool = False
    """The prompt stands at the beginning of both `chosen` and `rejected`."""

    def __str__(self) -> str:
        return f"{self.kind}, {'conversational' if self.conversational else 'plain text'} ({self.why})"


# --- which format ---------------------------------------------------------------------------------------------------------


def recognise(row: dict[str, Any]) -> Format:
    """The format of a row (and so of its dataset).  Errors: ValueError that names the columns and the forms there are."""
    if {"conversations", "chosen", "rejected"} <= present(row):
        return Format("preference", True, "ShareGPT: conversations with chosen and rejected")
    sharegpt = [name for name, value in row.items() if name == "conversations" or _speaks(value)]
    row = from_sharegpt(row) if sharegpt else row
    kind, columns = _kind(present(row))
    talks = [name for name in columns if is_messages(row[name])]
    why = f"the columns {', '.join(columns)}" if len(columns) > 1 else f"the column {columns[0]}"
    if sharegpt:
        why = f"ShareGPT: turns in {', '.join(sharegpt)}"
    elif kind == "prompt-only" and {"data_source", "reward_model"} <= present(row):
        why = "verl: the columns data_source, prompt, reward_model"
    elif talks and talks != ["messages"]:
        why += f"; {talks[0]} is a list of messages"
    implicit = kind == "preference" and ("prompt" not in columns or is_messages(row["prompt"]) != is_messages(row["chosen"]))
    if implicit:
        why += "; the prompt is what both begin with"
    conversational = is_messages(row["chosen"]) if implicit else bool(talks) or columns == ("messages",)
    return Format(kind, conversational, why, implicit)


def present(row: dict[str, Any]) -> set[str]:
    """The columns that are not null."""
    return {name for name, value in row.items() if value is not None}


def _kind(has: set[str]) -> tuple[Kind, tuple[str, ...]]:
    """The most particular format whose columns are all there."""
    rules: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("stepwise", ("prompt", "completions", "labels")),
        ("preference", ("prompt", "chosen", "rejected")),
        ("preference", ("chosen", "rejected")),
        ("unpaired-preference", ("prompt", "completion", "label")),
        ("prompt-completion", ("prompt", "completion")),
        ("language-modeling", ("messages",)),
        ("prompt-only", ("prompt",)),
        ("language-modeling", ("text",)),
    )
    for kind, columns in rules:
        if has >= set(columns):
            return kind, columns
    known = sorted({column for _, columns in rules for column in columns} | {"conversations"})
    hints = "".join(f"; {name!r}{nearest(name, known)}" for name in sorted(has) if nearest(name, known))
    raise ValueError(f"no known format has the columns {', '.join(map(repr, sorted(has))) or 'none at all'}{hints}")


def is_messages(value: Any) -> bool:
    """Whether a column holds messages (trl's rule: a list whose first item is an object with a role)."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0])


def _speaks(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]


# --- a row as a record ----------------------------------------------------------------------------------------------------


def record_of(row: Any, form: Format) -> Record:
    """A row of a dataset of that format.  Errors: ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} instead of an object")
    row = from_sharegpt({name: value for name, value in row.items() if value is not None})
    if images := next((name for name in ("images", "image") if row.get(name)), None):
        raise ValueError(f'it has "{images}", which these models cannot see')
    take = _Columns(row, form.conversational)
    made = {"prompt-only": _prompt, "prompt-completion": _completion, "preference": _preference,
            "unpaired-preference": _unpaired, "stepwise": _stepwise, "language-modeling": _text}[form.kind](take, form)
    tools = tools_in(take.row.pop("tools", None))
    return replace(made, tools=tools, extra=take.row)


class _Columns:
    """A row whose columns are taken out one by one; what is left is `extra`."""

    def __init__(self, row: dict[str, Any], conversational: bool):
        self.row, self.conversational = dict(row), conversational

    def content(self, name: str, blank: bool = False) -> Content:
        """A text, or messages, as the whole dataset has it."""
        value = self.get(name)
        if self.conversational:
            return messages_in([value] if isinstance(value, dict) else value, name)
        if not isinstance(value, str):
            found = "a list of messages" if is_messages(value) else f"a {type(value).__name__}"
            raise ValueError(f'"{name}" is {found} instead of a text')
        if not blank and not value.strip():
            raise ValueError(f'"{name}" is blank')
        return value

    def answer(self, name: str) -> Content:
        """What an assistant said: something of it must be there to learn from."""
        content = self.content(name)
        if isinstance(content, list) and not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))
                                                 for m in content):
            raise ValueError(f'"{name}" has no assistant\'s message with content')
        return content

    def get(self, name: str) -> Any:
        if name not in self.row:
            there = ", ".join(map(repr, self.row)) or "none"
            raise ValueError(f'the column "{name}" is missing or null; there are {there}')
        return self.row.pop(name)


def _prompt(take: _Columns, form: Format) -> Record:
    prompt = take.content("prompt")
    verl = take.row.get("reward_model")
    if isinstance(verl, dict) and "ground_truth" in verl:
        take.row.setdefault("ground_truth", verl["ground_truth"])
    return PromptRecord(prompt)


def _completion(take: _Columns, form: Format) -> Record:
    return CompletionRecord(take.content("prompt"), take.answer("completion"))


def _preference(take: _Columns, form: Format) -> Record:
    if not form.implicit_prompt and "messages" in take.row and "prompt" not in take.row:
        take.row["prompt"] = take.row.pop("messages")  # ShareGPT: the conversation so far
    chosen, rejected = take.answer("chosen"), take.answer("rejected")
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same, so there is nothing to prefer')
    if not form.implicit_prompt:
        return PreferenceRecord(take.content("prompt"), chosen, rejected)
    take.row.pop("prompt", None)  # a prompt of another kind than the answers, which hold it themselves
    return PreferenceRecord(*split_prompt(chosen, rejected))


def _unpaired(take: _Columns, form: Format) -> Record:
    return UnpairedRecord(take.content("prompt"), take.answer("completion"), _truth(take.get("label"), "label"))


def _stepwise(take: _Columns, form: Format) -> Record:
    prompt, steps, labels = take.content("prompt"), take.get("completions"), take.get("labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError('"completions" is not a list of texts, one for each step')
    if not isinstance(labels, list) or len(labels) != len(steps):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise ValueError(f'there are {len(steps)} steps in "completions" but {count} "labels"')
    return StepwiseRecord(prompt, steps, [_truth(label, "labels") for label in labels])


def _text(take: _Columns, form: Format) -> Record:
    if form.conversational:
        return ChatRecord(take.content("messages"))  # type: ignore[arg-type]
    return TextRecord(take.content("text", blank=True))  # type: ignore[arg-type]


def _truth(value: Any, name: str) -> bool:
    """True or false, also written 1 or 0."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError(f'"{name}" holds {value!r} instead of true or false')


def split_prompt(chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """(prompt, chosen, rejected) of a pair that holds its prompt: what both begin with, as trl's `extract_prompt` has it.

    Neither side is left empty; a space before the first difference goes with the answers (trl looks for it at the end
    of the answer where the first characters differ, which is not followed here).
    """
    same = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if same and chosen[same] != rejected[same] and chosen[same - 1] == " ":
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


# --- one format as another ------------------------------------------------------------------------------------------------


def unpair(record: PreferenceRecord) -> Iterator[UnpairedRecord]:
    """A pair as a good and a bad answer."""
    for completion, label in ((record.chosen, True), (record.rejected, False)):
        yield UnpairedRecord(record.prompt, completion, label, tools=record.tools, extra=record.extra)


def prompt_of(record: Any) -> Iterator[PromptRecord]:
    """What is asked, without the answers; a completion stays in `extra`, where a reward may compare with it."""
    extra = dict(record.extra)
    if isinstance(record, CompletionRecord):
        extra.setdefault("completion", record.completion)
    yield PromptRecord(record.prompt, tools=record.tools, extra=extra)


def last_turn(record: ChatRecord) -> Iterator[CompletionRecord]:
    """A conversation as its last assistant's message and what stands before it."""
    at = max((i for i, m in enumerate(record.messages) if m["role"] == "assistant"), default=0)
    if not at:
        raise ValueError("no assistant's message that answers something")
    yield CompletionRecord(record.messages[:at], record.messages[at : at + 1], tools=record.tools, extra=record.extra)


def question_of(record: ChatRecord) -> Iterator[PromptRecord]:
    """A conversation as what stands before its last assistant's message, or all of it where a user has the last word."""
    if record.messages[-1]["role"] == "user":
        yield PromptRecord(record.messages, tools=record.tools, extra=record.extra)
        return
    for answered in last_turn(record):
        yield from prompt_of(answered)


def chosen_of(record: PreferenceRecord) -> Iterator[CompletionRecord]:
    """The better answer, to imitate."""
    yield CompletionRecord(record.prompt, record.chosen, tools=record.tools, extra=record.extra)


def joined(record: StepwiseRecord) -> Iterator[UnpairedRecord]:
    """All steps, one a line, as one answer, good if every step is."""
    yield UnpairedRecord(record.prompt, "\n".join(record.completions), all(record.labels), tools=record.tools, extra=record.extra)


CONVERSIONS: dict[tuple[str, str], Callable[[Any], Iterator[Any]]] = {
    ("preference", "unpaired-preference"): unpair,
    ("preference", "prompt-completion"): chosen_of,
    ("preference", "prompt-only"): prompt_of,
    ("unpaired-preference", "prompt-only"): prompt_of,
    ("prompt-completion", "prompt-only"): prompt_of,
    ("stepwise", "prompt-only"): prompt_of,
    ("stepwise", "unpaired-preference"): joined,
    ("language-modeling", "prompt-completion"): last_turn,
    ("language-modeling", "prompt-only"): question_of,
}


def convert(records: Iterable[Record], form: Format, wanted: Kind) -> Iterator[Record]:
    """Records of one format as another, where nothing has to be made up.  Errors: BadInput where it cannot be."""
    if wanted not in KINDS:
        raise BadInput(f"there is no format {wanted!r}{nearest(wanted, list(KINDS))}", next=f"one of {', '.join(KINDS)}")
    if form.kind == wanted:
        return iter(records)
    change = CONVERSIONS.get((form.kind, wanted))
    if change is None or (form.kind == "language-modeling" and not form.conversational):
        raise BadInput(f"the data is {form}, but {wanted} is needed", "one cannot be made of the other",
                       f"give rows such as {FORMS[wanted]}")
    return (new for record in records for new in change(record))
