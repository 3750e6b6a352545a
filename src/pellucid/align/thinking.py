"""How long a model thinks, decided from outside: budget forcing in both directions (s1, arXiv 2501.19393).

    shorter   when the budget is spent, the end of the thought is written for the model, and it answers
    longer    when the model ends its thought, the end is taken back and "Wait" is written instead, up to `waits` times;
              what was spent stays spent

Token in, token out: the ids that were sampled are kept as they are, and only the ids of what is written for the model are
put between.  With enough budget and no waits the result is plain decoding, id for id, also where it is sampled.
Legend: a completion is thought + end + answer; the budget counts the tokens of the thought, of its opening tag as well as
of every "Wait"; the end and the answer have a limit of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pellucid import events
from pellucid.engine import LLM, Batch, Sample, SamplingParams
from pellucid.engine.batch import check_length
from pellucid.errors import BadInput
from pellucid.tasks import Completion, Problem, Task, evaluate

OPEN, END = "<think>", "</think>"


@dataclass(frozen=True)
class Budget:
    """How much a model may think, and must."""

    thinking: int
    """Most tokens of the thought; 0: none, the thought is opened and closed for the model."""
    answer: int = 64
    """Most tokens behind the thought."""
    waits: int = 0
    """How often the end of the thought is taken back."""
    wait: str = "\nWait"
    """What is written instead."""
    closing: str = f"\n{END}\n\n"
    """What ends a thought whose budget is spent; s1 adds "Final Answer:"."""

    def __post_init__(self) -> None:
        if self.thinking < 0 or self.answer < 1 or self.waits < 0:
            raise BadInput(f"a budget of {self.thinking} tokens, {self.answer} for the answer and {self.waits} waits is not possible",
                           "the first and the last are at least 0, the answer at least 1")
        if END not in self.closing or (self.waits and not self.wait):
            raise BadInput("a thought must be ended and be gone on with by some text", f"closing={self.closing!r}, wait={self.wait!r}",
                           f"let closing hold {END}")


@dataclass
class Thought:
    """A completion under a budget."""

    tokens: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    """Which of the tokens were written for the model instead of sampled."""
    thinking_tokens: int = 0
    """Those of the thought, its opening tag and the waits included, its end not."""
    answer_at: int | None = None
    """Where the answer begins among the tokens; None: the turn ended inside the thought."""
    waited: int = 0
    """How often the end was taken back."""
    forced: bool = False
    """The budget was spent, and the thought was ended for the model."""
    finish_reason: str = ""  # "stop" | "length"
    text: str = ""

    def add(self, tokens: Sequence[int], written: bool) -> None:
        self.tokens += tokens
        self.written += [written] * len(tokens)

    def cut(self, length: int) -> None:
        del self.tokens[length:], self.written[length:]


def think(llm: LLM, prompts: Sequence[list[int]], budget: Budget, *, n: int = 1, temperature: float = 0.0,
          seed: int = 0) -> list[list[Thought]]:
    """n completions of each prompt (ids up to where the assistant writes) under the budget; sample j has the seed + j.

    Errors: BadInput where prompt, budget and answer do not fit in the context.
    """
    forcing = _Forcing(llm, budget, temperature)
    for prompt in prompts:
        check_length(len(prompt), budget.thinking + len(forcing.closing) + budget.answer, llm.context)
    groups = [[_Going(list(prompt), seed + j, Thought()) for j in range(n)] for prompt in prompts]
    forcing.run([going for group in groups for going in group])
    return [[going.thought for going in group] for group in groups]


@dataclass(eq=False)
class _Going:
    """A thought on its way, with what its sampling needs."""

    prompt: list[int]
    seed: int
    thought: Thought
    limit: int = 0  # tokens of the whole, once the thought has ended


class _Forcing:
    def __init__(self, llm: LLM, budget: Budget, temperature: float):
        self.llm, self.budget, self.tokenizer = llm, budget, llm.tokenizer
        self.params = SamplingParams(temperature=temperature)
        self.eos, self.end_id = set(self.tokenizer.eos_ids), self.tokenizer.id_of(END)
        self.wait, self.closing = self.tokenizer.encode(budget.wait), self.tokenizer.encode(budget.closing)

    def run(self, every: list[_Going]) -> None:
        b = self.budget
        if b.thinking:
            # Without waits this is plain decoding; with them it stops at each end of a thought, to take it back.
            going = every
            while going:
                self._sample(going, dict.fromkeys(going, b.thinking), step=0, stop_at_end=b.waits > 0)
                going = [g for g in going if b.waits and self._take_back(g)]
        for g in every:
            self._end_thought(g)
        # A stream that goes on does so with the draw at which it stopped: plain decoding, in two parts.
        self._sample([g for g in every if not g.thought.finish_reason], {g: g.limit for g in every}, b.thinking, stop_at_end=False)
        for g in every:
            t = g.thought
            t.finish_reason = t.finish_reason or "length"
            t.text = self.tokenizer.decode(t.tokens[:-1] if t.finish_reason == "stop" else t.tokens)

    def _sample(self, every: list[_Going], limits: dict[_Going, int], step: int, stop_at_end: bool) -> None:
        """Sample each up to so many tokens in all, in batches of neighbours in length. step: number of the first draw."""
        asked = []
        for g in every:
            if (room := limits[g] - len(g.thought.tokens)) > 0:
                params = replace(self.params, max_tokens=room, stop=(END,) if stop_at_end else ())
                asked.append((g, Sample(g.prompt + g.thought.tokens, params, g.seed)))
        asked.sort(key=lambda pair: len(pair[1].prompt))
        model = self.llm.model
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(asked), self.llm.max_batch):
                part = [sample for _, sample in asked[start : start + self.llm.max_batch]]
                batch = Batch(model, part, self.tokenizer.eos_ids, self._sees_end)
                batch.step_number = step
                for _ in batch.run():
                    pass
        finally:
            model.train(was_training)
        for g, sample in asked:
            g.thought.add(sample.tokens, written=False)
            g.thought.finish_reason = "stop" if sample.tokens[-1] in self.eos else ""

    def _sees_end(self, sample: Sample) -> bool:
        if self.end_id is not None:
            return sample.tokens[-1] == self.end_id
        return END in self.tokenizer.decode(sample.tokens[-4 * len(END) :])

    def _take_back(self, g: _Going) -> bool:
        """Write "Wait" in place of the thought's end (or of the turn's end within it), if there is room to go on."""
        t, place = g.thought, self._place(g.thought.tokens)
        at = place[0] if place else len(t.tokens) - 1
        ended = place is not None or t.finish_reason == "stop"
        if not ended or not self._thinks(g) or t.waited == self.budget.waits or at + len(self.wait) >= self.budget.thinking:
            return False
        t.cut(at)
        t.add(self.wait, written=True)
        t.waited, t.finish_reason = t.waited + 1, ""
        g.seed = (g.seed * 6364136223846793005 + t.waited) % 2**62  # other draws than those that led to the end
        return True

    def _end_thought(self, g: _Going) -> None:
        """Say where the thought ends; end it where the budget is spent; and how long the whole may become."""
        t, b, place = g.thought, self.budget, self._place(g.thought.tokens)
        if b.thinking and not self._thinks(g):
            t.answer_at, g.limit = 0, b.thinking + b.answer
            return
        if place is not None:
            t.thinking_tokens, t.answer_at = place
        elif t.finish_reason == "stop":
            t.thinking_tokens = len(t.tokens) - 1
        else:
            if not b.thinking and not self._opened(g):
                t.add(self.tokenizer.encode(OPEN), written=True)
            t.thinking_tokens, t.forced = len(t.tokens) if b.thinking else 0, True
            t.add(self.closing, written=True)
            t.answer_at = len(t.tokens)
        g.limit = (t.answer_at or 0) + b.answer
        if t.answer_at is not None and len(t.tokens) > g.limit:
            t.cut(g.limit)
            t.finish_reason = "length"

    def _place(self, tokens: list[int]) -> tuple[int, int] | None:
        """Where the end of the thought stands: its first token, and the one behind it."""
        if self.end_id is not None:
            return (at, at + 1) if (at := _index(tokens, self.end_id)) is not None else None
        if END not in (text := self.tokenizer.decode(tokens)):
            return None
        texts = [self.tokenizer.decode(tokens[:k]) for k in range(len(tokens) + 1)]
        stop = next(k for k, so_far in enumerate(texts) if END in so_far)
        return max(k for k in range(stop) if len(texts[k]) <= text.index(END)), stop

    def _opened(self, g: _Going) -> bool:
        """Whether the prompt ends inside a thought: some templates open it."""
        return self.tokenizer.decode(g.prompt[-8:]).rstrip().endswith(OPEN)

    def _thinks(self, g: _Going) -> bool:
        return self._opened(g) or self.tokenizer.decode(g.thought.tokens[:8]).lstrip().startswith(OPEN)


def _index(tokens: list[int], token: int) -> int | None:
    return tokens.index(token) if token in tokens else None


# --- accuracy against thinking --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One point of the curve."""

    budget: int
    waits: int
    thinking_tokens: float
    """Mean over completions."""
    accuracy: float
    standard_error: float
    forced: float
    """Share of thoughts that were ended for the model."""
    waited: float
    """Mean number of waits."""


def budgeted(llm: LLM, budget: Budget, seed: int = 0, record: list[Thought] | None = None) -> Callable[..., list[list[Completion]]]:
    """The `generate` that `tasks.evaluate` asks for, under a budget; thoughts are added to `record`."""

    def generate(problems: list[Problem], draws: int, temperature: float) -> list[list[Completion]]:
        prompts = [llm.chat_ids([{"role": "user", "content": p.prompt}]) for p in problems]
        groups = think(llm, prompts, budget, n=draws, temperature=temperature, seed=seed)
        if record is not None:
            record.extend(t for group in groups for t in group)
        return [[Completion(t.text, len(t.tokens), t.finish_reason == "stop") for t in group] for group in groups]

    return generate


def thinking_curve(llm: LLM, task: Task, budgets: Sequence[Budget], problems: int = 100, *, draws: int = 1,
                   temperature: float | None = None, seed: int = 0) -> list[Point]:
    """Accuracy on held-out problems (the same for all points) against the tokens that were thought, by budget."""
    points = []
    for budget in budgets:
        thoughts: list[Thought] = []
        scores = evaluate(task, budgeted(llm, budget, seed, thoughts), problems, 1, seed, draws=draws, temperature=temperature)
        tokens, forced, waited = (math.fsum(column) / len(thoughts) for column in zip(
            *((t.thinking_tokens, t.forced, t.waited) for t in thoughts)))
        points.append(Point(budget.thinking, budget.waits, tokens, scores.pass_at_1, scores.standard_error, forced, waited))
        events.emit(events.Evaluation("thinking", f"accuracy at {budget.thinking} tokens, {budget.waits} waits",
                                      scores.pass_at_1, vars(points[-1])))
    return points
