"""Records of a data set -> tokenised pairs, labelled answers, and solutions in steps.

A text prompt and a text completion are encoded apart, and the tokenizer's end is put behind the completion. Messages go
through the chat template; of the completion, what the assistant did not write (a tool's answer) is not trained.
Longer ones than `longest` lose their end (trl's `keep_start`); those whose prompt alone fills it are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pellucid import events
from pellucid.align.answers import Answer
from pellucid.align.offline import Labelled, Pair
from pellucid.align.reward_model import Steps
from pellucid.data.formats import Content, PreferenceRecord, StepwiseRecord, UnpairedRecord
from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: Content, tools: Any = None) -> list[int]:
    """The ids up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(prompt, tools, add_generation_prompt=True)[0]


def encode_answer(tokenizer: Tokenizer, prompt: Content, completion: Content, tools: Any = None) -> Answer:
    """A prompt and its completion, both texts or both lists of messages."""
    head = encode_prompt(tokenizer, prompt, tools)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Answer(head, [*tokenizer.encode(completion), *tokenizer.eos_ids[:1]])
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadInput("prompt and completion are of two kinds", "one is a text, the other a list of messages",
                       "give both as texts, or both as messages")
    ids, mask = tokenizer.encode_chat([*prompt, *completion], tools)
    if ids[: len(head)] != head or not any(mask[len(head) :]):
        raise BadInput("the conversation does not begin with its prompt", "the chat template writes earlier turns otherwise",
                       "use a template that keeps what it wrote (thinking included)")
    end = max(i for i, written in enumerate(mask) if written) + 1  # what the template writes behind is not the assistant's
    tokens, written = ids[len(head) : end], mask[len(head) : end]
    return Answer(head, tokens, None if all(written) else written)


def fitted(answer: Answer, longest: int) -> Answer | None:
    """The answer within `longest` tokens, its end cut off if need be; None where no trained token is left."""
    room = longest - len(answer.prompt)
    if room >= len(answer.tokens):
        return answer if answer.trained else None
    mask = None if answer.mask is None else answer.mask[: max(room, 0)]
    cut = Answer(answer.prompt, answer.tokens[: max(room, 0)], mask)
    return cut if cut.trained else None


def encode_pairs(tokenizer: Tokenizer, records: Iterable[PreferenceRecord], longest: int) -> list[Pair]:
    """Preference records; a column `margin` says by how much the chosen answer is better."""
    found, left = [], 0
    for record in records:
        sides = [fitted(encode_answer(tokenizer, record.prompt, side, record.tools), longest)
                 for side in (record.chosen, record.rejected)]
        if sides[0] is None or sides[1] is None or sides[0] == sides[1]:
            left += 1  # cut to nothing, or to the same
            continue
        found.append(Pair(sides[0], sides[1], _margin(record.extra.get("margin"))))
    return _told(found, left, longest)


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInput(f'"margin" holds {str(value)[:60]!r}', "it is a number, how much better the chosen answer is",
                       "mend it, rename the column, or give null where it is not known")
    return float(value)


def encode_labelled(tokenizer: Tokenizer, records: Iterable[UnpairedRecord], longest: int) -> list[Labelled]:
    found, left = [], 0
    for record in records:
        answer = fitted(encode_answer(tokenizer, record.prompt, record.completion, record.tools), longest)
        if answer is None:
            left += 1
        else:
            found.append(Labelled(answer, record.label))
    return _told(found, left, longest)


def encode_steps(tokenizer: Tokenizer, records: Iterable[StepwiseRecord], longest: int, separator: str = "\n") -> list[Steps]:
    """Solutions in steps: the separator stands behind each step, and its last token carries the step's score."""
    found, left = [], 0
    for record in records:
        prompt = encode_prompt(tokenizer, record.prompt, record.tools)
        tokens, ends = laid_out(tokenizer, record.completions, separator)
        kept = [e for e in ends if len(prompt) + e < longest]
        if not kept or not prompt:
            left += 1
            continue
        labels = [float(y) for y in record.labels[: len(kept)]]
        found.append(Steps(Answer(prompt, tokens[: kept[-1] + 1]), kept, labels))
    return _told(found, left, longest)


def laid_out(tokenizer: Tokenizer, steps: Iterable[str], separator: str) -> tuple[list[int], list[int]]:
    """The tokens of a solution, each step and what stands behind it encoded apart (as trl's PRM trainer did), and where each step ends."""
    behind = tokenizer.encode(separator)
    tokens: list[int] = []
    ends: list[int] = []
    for step in steps:
        tokens += [*tokenizer.encode(step), *behind]
        ends.append(len(tokens) - 1)
    return tokens, ends


def _told(found: list[Any], left: int, longest: int) -> list[Any]:
    if not found:
        raise BadInput("there is no example to train on", f"{left} records are longer than {longest} tokens, or empty",
                       "use a longer limit, or check the data")
    if left:
        events.note(f"{left} of {left + len(found)} records do not fit into {longest} tokens and are left out", "warning")
    return found


