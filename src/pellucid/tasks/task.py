"""What a task is: problems without end, a demonstration for each, and a grader that cannot be talked round.

    problem    = task.sample(rng, "train")              a question with its answer, from one side of the split
    completion = task.demonstrate(problem, rng)         "<think>\\n...\\n</think>\\n\\nANSWER", always graded correct
    scores     = task.grade(problem, completion)        {"format": 1.0, "correct": 1.0, "progress": 1.0}

The split is disjoint by construction: every problem has a `key` (for instance its sorted numbers, so that a
permutation or another target has the same key), and a hash of the key says on which side it lies.  Nobody keeps a
list, and the side is the same for all seeds, dials, machines and Python versions.

A task may say with `weights` which of its components are rewards and how much each counts; the others are measured
and shown, and never trained on.  Where the model talks with an environment (tools), the task is a `Dialogue`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

from pellucid.errors import BadInput, nearest

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1
WEIGHTS = {"correct": 1.0, "format": 0.2, "progress": 0.3}  # of tasks that say nothing else
MAX_DRAWS = 20_000  # a side that 20,000 draws do not reach is empty for these dials

# Text that means something to the chat template.  None of it may stand inside a thought: whoever scans the raw text
# for a tool call or for the end of the turn would find it there.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
           "<|im_start|>", "<|im_end|>", "<|endoftext|>")

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One question.  `grade` needs nothing beside it, so a problem can be stored and graded later."""

    task: str
    """Name of the task that made it."""
    prompt: str
    """The user's message."""
    answer: Any
    """What the grader compares with; its form is the task's own."""
    key: str
    """What decides the split; problems with equal keys are always on the same side."""
    tools: tuple[str, ...] = ()
    """Names of the tools the model may call (schemas: `pellucid.tasks.TOOLS`)."""


class Task(Protocol):
    """The interface of all tasks and of their mixture."""

    name: str
    dials: Any  # a frozen dataclass

    def sample(self, rng: random.Random, split: Split) -> Problem:
        """A problem of that side of the split; equal random states give equal problems."""
        ...

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The assistant's whole completion, thought and answer; always graded correct."""
        ...

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        """Named components in [0, 1]: `format`, `correct` (implies format), `progress` (1 only when correct).

        A task may add components of its own, which its module describes."""
        ...


class Dialogue(Task, Protocol):
    """A task whose model talks with an environment: assistant's turn, reply, assistant's turn, ... until no reply.

    Nothing is kept between calls: the environment's state follows from the problem and the turns so far, so episodes
    can be replayed, run side by side in any order, and graded later.  `grade` of one completion judges the first turn.
    """

    schemas: list[dict[str, Any]]
    """What the chat template is told of the tools."""
    max_turns: int
    """The assistant's most turns in an episode."""

    def reply(self, problem: Problem, turns: Sequence[str]) -> str | None:
        """The content of the `tool` message that answers the last of the assistant's turns; None: it was the last."""
        ...

    def grade_turns(self, problem: Problem, turns: Sequence[str]) -> dict[str, float]:
        """The components of a whole episode, from the assistant's turns alone (replies are computed, never believed)."""
        ...

    def dialogue(self, problem: Problem, rng: random.Random) -> list[dict[str, str]]:
        """A demonstration as messages: user, assistant, tool, assistant ..., always graded correct."""
        ...


def dialogue_of(task: Task, problem: Problem) -> Dialogue | None:
    """The task as a `Dialogue` if its problem is answered in several turns, else None; looks into a mixture."""
    inner = task.of(problem) if hasattr(task, "of") else task
    return cast(Dialogue, inner) if hasattr(inner, "reply") else None


def reward_weights(task: Task) -> dict[str, float]:
    """Component -> weight, of the components that the task is trained on."""
    return dict(getattr(task, "weights", WEIGHTS))


class Parsed(NamedTuple):
    thought: str
    answer: str


def parse_completion(text: str) -> Parsed | None:
    """Thought and answer of a completion, or None unless it is exactly one `<think>...</think>`, then an answer.

    Only ASCII spaces and newlines may surround the parts.  The thought must not be blank and holds no markers.
    """
    text = text.strip(" \n")
    if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    thought, _, answer = text.removeprefix("<think>").partition("</think>")
    thought, answer = thought.strip(" \n"), answer.strip(" \n")
    if not thought or not answer or any(marker in thought for marker in MARKERS):
        return None
    return Parsed(thought, answer)


def parse_answer(text: str) -> Parsed | None:
    """Like `parse_completion`, for tasks that can do without a thought: it may be blank, or missing with its tags."""
    text = text.strip(" \n")
    if not text.startswith("<think>"):
        return None if not text or any(marker in text for marker in MARKERS) else Parsed("", text)
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    thought, _, answer = text.removeprefix("<think>").partition("</think>")
    thought, answer = thought.strip(" \n"), answer.strip(" \n")
    if not answer or any(marker in part for marker in MARKERS for part in (thought, answer)):
        return None
    return Parsed(thought, answer)


def completion(thought: str, answer: str) -> str:
    """The one form in which every demonstration is written."""
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def scores(well_formed: bool, correct: bool, credit: float) -> dict[str, float]:
    """The named components.  `credit` in [0, 1] is partial credit; it counts only in a well-structured completion.

    Partial credit stops at 0.9, so that nothing but a correct answer is worth the most.
    """
    assert 0.0 <= credit <= 1.0 and (well_formed or not correct)
    return {"format": float(well_formed), "correct": float(correct), "progress": 1.0 if correct else 0.9 * credit}


def matching(given: list[str], wanted: list[str]) -> float:
    """Share of places that agree; missing and surplus places count against it."""
    return sum(g == w for g, w in zip(given, wanted)) / max(len(given), len(wanted), 1)


def lines_of(thought: str, most: int = 100) -> list[str]:
    """The thought's lines (at most `most`, so that grading a runaway thought takes bounded time)."""
    return [line.strip(" ") for line in thought.split("\n", most)[:most]]


def is_heldout(task: str, key: str) -> bool:
    """Whether problems with this key are held out: a stable hash of task and key falls in the first tenth."""
    digest = hashlib.blake2b(f"{task}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64


def draw_in_split(rng: random.Random, split: Split, task: str,
                  draw: Callable[[random.Random], T], key: Callable[[T], str]) -> T:
    """Draw until the key lies on the wanted side of the split."""
    if split not in ("train", "heldout"):
        raise BadInput(f"unknown split {split!r}", "a problem is either for training or held out",
                       "use split='train' or split='heldout'")
    for _ in range(MAX_DRAWS):
        drawn = draw(rng)
        if is_heldout(task, key(drawn)) == (split == "heldout"):
            return drawn
    raise BadInput(f"no {split} problem of {task} exists for these dials",
                   f"none of {MAX_DRAWS:,} draws lies on that side of the split", "widen the dials")


def check_whole(dials: Any, name: str, low: int, high: int) -> None:
    """BadInput unless the dial is a whole number in low..high."""
    value = getattr(dials, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{type(dials).__name__}.{name}={value!r} is out of range", f"it must be a whole number "
                       f"from {low} to {high}", f"choose {name} in {low}..{high}")


def check_symbols(dials: Any, name: str, least: int) -> None:
    """BadInput unless the dial is a text of at least `least` different letters and digits of ASCII."""
    value = getattr(dials, name)
    fine = isinstance(value, str) and value.isascii() and value.isalnum() and len(set(value)) == len(value) >= least
    if not fine:
        raise BadInput(f"{type(dials).__name__}.{name}={value!r} is not usable",
                       f"it must be at least {least} different letters or digits", f"for instance {name}='abcdefgh'")


def check_operations(dials: Any, allowed: str) -> None:
    """BadInput unless `dials.operations` is a non-empty choice from `allowed` without repeats."""
    chosen = dials.operations
    if not isinstance(chosen, str) or not chosen or len(set(chosen)) != len(chosen) or set(chosen) - set(allowed):
        raise BadInput(f"{type(dials).__name__}.operations={chosen!r} is not usable",
                       f"it names each operation once, from {allowed!r}", f"for instance operations={allowed!r}")


def build_dials(kind: type[T], given: dict[str, Any]) -> T:
    """`kind(**given)`; an unknown dial is BadInput that names the nearest one."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise BadInput(f"unknown dial {name!r}{nearest(name, known)}", f"{kind.__name__} has {', '.join(known)}",
                           "use one of these")
    return kind(**given)
