"""Dialogues in a rollout: the model's turns are sampled, what the environment answers is read, all of it token by token.

    prompt | turn, sampled | reply, given | turn, sampled | ...        mask: True over the turns, False over the replies

Token in, token out: a reply is written by the chat template once, from the end of the assistant's turn to where its next
one begins, and its ids are appended to what the model itself has written. The history is never rendered or tokenised again
(a model may write a word in other tokens than the tokenizer would, and a template may drop thoughts of earlier turns), so
what is trained on is what was sampled, and every log-probability belongs to its token.

The environment is a task of `tasks.Dialogue`: it is asked for a reply after each turn, from the problem and the turns so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from pellucid import events
from pellucid.align.reward_calls import call
from pellucid.engine import Sample
from pellucid.errors import BadInput
from pellucid.tasks import Dialogue, Problem, Task, dialogue_of, where_it_failed
from pellucid.tokenizers import Tokenizer

Messages = list[dict[str, Any]]
SAID = {"role": "assistant", "content": "."}  # stands for a turn where only what follows it is of interest
SECONDS = 60.0  # for a reply


class Replies:
    """What the environments answer to the samples of one batch; call it when a sample's turn has ended.

    problems: sample -> its problem, by identity. A reply that raises or takes too long is told to the model as an error, as
    it would be told by a real tool; it is counted (`failed`) and the first one is noted.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task, problems: Sequence[tuple[Sample, Problem]]):
        self.tokenizer = tokenizer
        self.problem_of = {id(s): p for s, p in problems}
        self.dialogue_of = {id(s): dialogue_of(task, p) for s, p in problems}
        self.given: dict[int, list[Messages]] = {}
        self.failed = 0
        self.ids = lru_cache(maxsize=4096)(self._ids)

    @property
    def needed(self) -> bool:
        return any(self.dialogue_of.values())

    def __call__(self, sample: Sample) -> list[int] | None:
        """The ids of the reply, None where the episode is over."""
        dialogue, problem = self.dialogue_of[id(sample)], self.problem_of[id(sample)]
        if dialogue is None:
            return None
        turns = turns_of(sample, self.tokenizer)
        if len(turns) >= dialogue.max_turns:
            return None
        answer = self._asked(dialogue, problem, turns)
        if answer is None:
            return None
        messages = as_messages(answer)
        ids = self.ids(tuple((m["role"], m["content"]) for m in messages))
        self.given.setdefault(id(sample), []).append(messages)
        return ids

    def _asked(self, dialogue: Dialogue, problem: Problem, turns: list[str]) -> Any:
        outcome = call(lambda: dialogue.reply(problem, turns), SECONDS)
        if outcome.error is None:
            return outcome.value
        if not isinstance(outcome.error, Exception) and not outcome.timed_out:
            raise outcome.error
        self.failed += 1
        what = f"no answer in {SECONDS:g} seconds" if outcome.timed_out else f"{type(outcome.error).__name__}: {outcome.error}"
        if self.failed == 1:
            where = what if outcome.timed_out else where_it_failed(outcome.error)
            events.note(f"the task {problem.task!r} failed to reply, and the model was told of an error: {where}", "warning")
        return f"error: {what}"[:200]

    def _ids(self, reply: tuple[tuple[str, str], ...]) -> list[int]:
        return reply_ids(self.tokenizer, [{"role": role, "content": content} for role, content in reply])

    def messages(self, sample: Sample) -> Messages:
        """The episode behind its prompt, as messages: what the model said and what it was told."""
        told: Messages = []
        replies = self.given.get(id(sample), [])
        for number, turn in enumerate(turns_of(sample, self.tokenizer)):
            told.append({"role": "assistant", "content": turn})
            told += replies[number] if number < len(replies) else []
        return told


def as_messages(answer: Any) -> Messages:
    """A reply as messages: a text is a tool's; a message or a list of them stands for itself (a user's next question)."""
    if isinstance(answer, str):
        return [{"role": "tool", "content": answer}]
    messages = [answer] if isinstance(answer, dict) else answer
    if not isinstance(messages, (list, tuple)) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") in ("tool", "user") for m in messages):
        raise BadInput(f"a task replied {str(answer)[:80]!r}", "a reply is a text, or messages of the roles tool and user",
                       "mend the task's method reply")
    return list(messages)


def reply_ids(tokenizer: Tokenizer, reply: Messages) -> list[int]:
    """Ids from behind the assistant's end of turn, over the reply, to where its next turn begins.

    Errors: BadInput where the chat template cannot show such messages.
    """
    try:
        ids, mask = tokenizer.encode_chat([{"role": "user", "content": "."}, SAID, *reply], add_generation_prompt=True)
    except BadInput as error:
        raise BadInput(f"the chat template cannot show a {reply[0]['role']}'s reply", error.why or error.what,
                       "use a checkpoint whose template knows tools, or a task of a single turn") from error
    if not any(mask):
        raise BadInput("the chat template does not show what the assistant said", next="use another checkpoint")
    return ids[max(i for i, said in enumerate(mask) if said) + 1 :]


def spans(sample: Sample) -> Iterator[tuple[bool, int, int]]:
    """(sampled, start, end) of the stretches of a sample's tokens, in order."""
    start = 0
    for sampled, part in groupby(sample.mask or [True] * len(sample.tokens)):
        end = start + len(list(part))
        yield sampled, start, end
        start = end


def turns_of(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """What the model said in each turn, without the token that ended it."""
    ends = set(tokenizer.eos_ids)
    turns = []
    for sampled, start, end in spans(sample):
        if sampled:
            turns.append(tokenizer.decode(sample.tokens[start : end - (sample.tokens[end - 1] in ends)]))
    return turns
