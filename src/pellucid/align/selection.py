"""Several completions of a prompt, one answer: more computation at inference in place of more training.

    best-of-n           the completion with the highest score, by a reward model or a verifier
    self-consistency    the answer that most completions end in (arXiv 2203.11171)
    weighted voting     each completion votes for its answer with its score, as of a process reward model (arXiv 2305.20050)

    choices = choose(llm, prompts, 16, rewards=RewardSet([Reward("rm", model_reward(rm))]))               best-of-n
    choices = choose(llm, prompts, 16, vote=True)                                                         self-consistency
    choices = choose(llm, prompts, 16, vote=True, rewards=RewardSet([Reward("prm", process_reward(prm))]))   weighted

Answers are compared as mathematics unless told otherwise.  `accuracy_by_n` says from one set of samples what each method
would reach with fewer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pellucid.align.checkers import part_of
from pellucid.align.components import total_reward
from pellucid.align.math_answers import final_answer, same_answer
from pellucid.align.rewards import Batch, Content, RewardSet, text_of
from pellucid.engine import LLM, Completion, SamplingParams
from pellucid.errors import BadInput
from pellucid.tasks import pass_at_k

Parse = Callable[[str], str | None]
Same = Callable[[str, str], bool]
Combine = Literal["min", "product", "mean", "last"]
COMBINE: dict[str, Callable[[list[float]], float]] = {
    "min": min, "product": math.prod, "mean": lambda s: math.fsum(s) / len(s), "last": lambda s: s[-1]}


@dataclass(frozen=True)
class Ballot:
    """One answer with what spoke for it."""

    answer: str
    weight: float
    members: tuple[int, ...]
    """The completions that gave it, in order."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for a prompt."""

    index: int
    """Of the chosen completion; of a vote: the one with the highest score among those of the winning answer."""
    completion: Completion
    completions: list[Completion]
    scores: list[float]
    """Of each completion; NaN: none."""
    ballots: list[Ballot]
    """The answers by weight, the winner first; empty without a vote."""

    @property
    def answer(self) -> str | None:
        return self.ballots[0].answer if self.ballots else None


def answer_of(text: str) -> str | None:
    """The final answer behind the thought, as mathematics; see `math_answers.final_answer`."""
    return final_answer(part_of(text, "answer"))


def choose(llm: LLM, prompts: Sequence[list[int]], n: int, *, rewards: RewardSet | None = None, vote: bool = False,
           params: SamplingParams | None = None, parse: Parse = answer_of, same: Same = same_answer,
           shown: Sequence[Content] | None = None, columns: Mapping[str, Sequence[Any]] | None = None) -> list[Choice]:
    """Sample n completions of each prompt (ids) and choose one; see the module for the methods.

    params: how to sample; by default at temperature 1 with 256 tokens.  parse, same: the answer in a text, and when two
    are equal.  shown, columns: prompts as the rewards get them, and more columns for them, one value a prompt.
    Errors: BadInput where nothing is there to choose by, or sampling is greedy.
    """
    params = params or SamplingParams(temperature=1.0)
    if rewards is None and not vote:
        raise BadInput("there is nothing to choose by", "neither rewards nor a vote", "give rewards=, or vote=True")
    if n < 1 or (n > 1 and params.temperature == 0):
        raise BadInput(f"{n} completions at temperature {params.temperature:g} are not {n} different ones",
                       next="use n >= 1 and a temperature above 0")
    outputs = llm.generate(list(prompts), [replace(params, n=n)] * len(prompts))
    groups = [output.outputs for output in outputs]
    scores = [[math.nan] * n for _ in groups]
    if rewards is not None:
        totals = _totals(rewards, llm, prompts, groups, shown, columns or {})
        scores = [totals[i * n : (i + 1) * n] for i in range(len(groups))]
    return [pick(group, s, vote, parse, same) for group, s in zip(groups, scores)]


def pick(completions: list[Completion], scores: list[float], vote: bool, parse: Parse = answer_of, same: Same = same_answer) -> Choice:
    """The choice among the completions of one prompt."""
    ballots: list[Ballot] = []
    among = range(len(completions))
    if vote:
        scored = not all(map(math.isnan, scores))
        weights = [0.0 if math.isnan(s) else s for s in scores] if scored else None
        ballots = count_votes([parse(c.text) for c in completions], weights, same)
        among = ballots[0].members if ballots else among  # type: ignore[assignment]
    index = best(scores, among)
    return Choice(index, completions[index], completions, scores, ballots)


def best(scores: Sequence[float], among: Sequence[int] | range | None = None) -> int:
    """The index of the highest score; of equal ones, and where there is none, the first."""
    places = list(range(len(scores)) if among is None else among)
    return max(places, key=lambda i: (-math.inf if math.isnan(scores[i]) else scores[i], -i))


def count_votes(answers: Sequence[str | None], weights: Sequence[float] | None = None, same: Same = same_answer) -> list[Ballot]:
    """The different answers by total weight (number, without weights), the highest first; ties: the earlier answer.

    None casts no vote.  Errors: BadInput for a negative weight, which could not be summed up as support.
    """
    cast = [1.0] * len(answers) if weights is None else list(weights)
    if any(w < 0 for w in cast):
        raise BadInput(f"a vote weighs {min(cast):g}", "a weight is support for an answer, and cannot be negative",
                       "use probabilities: the scores of a process reward model, or a sigmoid of a reward model's")
    members: dict[int, list[int]] = {}
    for i, first in enumerate(_firsts(answers, same)):
        if first is not None:
            members.setdefault(first, []).append(i)
    ballots = [Ballot(answers[first] or "", math.fsum(cast[i] for i in m), tuple(m)) for first, m in members.items()]
    return sorted(ballots, key=lambda b: -b.weight)  # stable: equal weights keep the order of appearance


def _firsts(answers: Sequence[str | None], same: Same) -> list[int | None]:
    """For each answer the place of the first one that is the same."""
    firsts: list[int | None] = []
    seen: dict[str, int] = {}  # texts met so far, and the first answer that they are the same as
    for i, answer in enumerate(answers):
        if answer is not None and answer not in seen:
            seen[answer] = next((first for text, first in seen.items() if same(text, answer)), i)
        firsts.append(None if answer is None else seen[answer])
    return firsts


class ProcessReward:
    """A process reward model as a reward function: one number of the scores of a completion's steps.

    model: anything with `.score_steps(prompts, steps) -> list of lists of numbers`, where steps[i] are the steps of the
    i-th completion, such as `reward_scoring.StepJudge` (what `align prm` trained); prompts are texts, or as they are where the
    model says `reads_messages`.  Steps are the non-blank parts between separators, of the thought where there is one.
    combine: "min" (Math-Shepherd, arXiv 2312.08935; the default), "product" (arXiv 2305.20050), "mean", or "last" (arXiv 2408.03314).
    """

    def __init__(self, model: Any, combine: Combine | None = None, separator: str = "\n"):
        if (combine is not None and combine not in COMBINE) or not callable(getattr(model, "score_steps", None)):
            raise BadInput(f"a {type(model).__name__} with combine={combine!r} scores no steps",
                           f"it needs a method score_steps(prompts, steps), and combine is one of {', '.join(COMBINE)}")
        self.model, self.combine, self.separator = model, combine, separator

    def __call__(self, prompts: list[Content], completions: list[Content]) -> list[float | None]:
        return [COMBINE[self.combine or "min"](s) if s else None for s in self.by_step(prompts, completions)]

    def by_step(self, prompts: Sequence[Content], completions: Sequence[Content]) -> list[list[float]]:
        """The scores of each completion's steps; empty where there is none."""
        asked = list(prompts) if getattr(self.model, "reads_messages", False) else [text_of(p) for p in prompts]
        scores = self.model.score_steps(asked, [steps_of(text_of(c), self.separator) for c in completions])
        return [[float(x) for x in s] for s in scores]


process_reward = ProcessReward  # as a reward is made of it: Reward("prm", process_reward(prm))


def steps_of(text: str, separator: str = "\n") -> list[str]:
    """The steps of a completion."""
    body = part_of(text, "thought") or part_of(text, "answer")
    return [step.strip() for step in body.split(separator) if step.strip()]


# --- what fewer samples would reach -----------------------------------------------------------------------------------------


def best_of_k(correct: Sequence[bool], scores: Sequence[float], k: int) -> float:
    """The chance that the best scored of k completions drawn from these N is correct, without bias.

    Sorted by score, the i-th worst (from 1) is the best of C(i - 1, k - 1) of the C(N, k) subsets.
    """
    if not 1 <= k <= len(correct):
        raise BadInput(f"best of {k} cannot be told from {len(correct)} completions", next="use 1 <= k <= completions")
    order = sorted(range(len(correct)), key=lambda i: (scores[i], -i))
    return math.fsum(math.comb(rank, k - 1) * correct[i] for rank, i in enumerate(order)) / math.comb(len(correct), k)


def vote_of_k(correct: Sequence[bool], answers: Sequence[str | None], k: int, weights: Sequence[float] | None = None,
              same: Same = same_answer, draws: int = 200, seed: int = 0) -> float:
    """The chance that the vote of k completions drawn from these N is correct: over all subsets where there are at most
    `draws`, else over so many random ones."""
    n = len(correct)
    if not 1 <= k <= n:
        raise BadInput(f"a vote of {k} cannot be told from {n} completions", next="use 1 <= k <= completions")
    rng = random.Random(seed)
    every = math.comb(n, k) <= draws
    subsets = list(itertools.combinations(range(n), k)) if every else [sorted(rng.sample(range(n), k)) for _ in range(draws)]
    firsts, cast, wins = _firsts(answers, same), [1.0] * n if weights is None else weights, 0
    for subset in subsets:
        votes: dict[int, float] = {}
        for i in subset:
            if (first := firsts[i]) is not None:
                votes[first] = votes.get(first, 0.0) + cast[i]
        wins += bool(votes) and correct[max(votes, key=votes.__getitem__)]  # of equal ones the one that appeared first
    return wins / len(subsets)


def accuracy_by_n(choices: Sequence[Choice], correct: Sequence[Sequence[bool]], ks: Sequence[int], parse: Parse = answer_of,
                  same: Same = same_answer) -> dict[str, list[float]]:
    """Mean accuracy of each method for each k, from the same samples: pass@k (an oracle), majority, and where there are
    scores best-of-k and weighted votes."""
    table: dict[str, list[list[float]]] = {}
    for choice, right in zip(choices, correct):
        answers = [parse(c.text) for c in choice.completions]
        rows = {"pass@k": [pass_at_k(len(right), sum(right), k) for k in ks], "majority": [vote_of_k(right, answers, k, None, same) for k in ks]}
        if not any(map(math.isnan, choice.scores)):
            rows["best-of-k"] = [best_of_k(right, choice.scores, k) for k in ks]
            if min(choice.scores) >= 0:
                rows["weighted"] = [vote_of_k(right, answers, k, choice.scores, same) for k in ks]
        for name, row in rows.items():
            table.setdefault(name, []).append(row)
    return {name: [math.fsum(column) / len(rows) for column in zip(*rows)] for name, rows in table.items()}


def _totals(rewards: RewardSet, llm: LLM, prompts: Sequence[list[int]], groups: list[list[Completion]],
            shown: Sequence[Content] | None, columns: Mapping[str, Sequence[Any]]) -> list[float]:
    """The weighted reward of every completion; NaN where all components are missing."""
    every = [(i, c) for i, group in enumerate(groups) for c in group]
    seen: Sequence[Content] = shown if shown is not None else [llm.tokenizer.decode(p) for p in prompts]
    batch = Batch(
        [seen[i] for i, _ in every], [[{"role": "assistant", "content": c.text}] if isinstance(seen[i], list) else c.text for i, c in every],
        {**{name: [values[i] for i, _ in every] for name, values in columns.items()},
         "finished": [c.finish_reason == "stop" for _, c in every]},
        [c.token_ids for _, c in every], [list(prompts[i]) for i, _ in every])
    scores = rewards.score(batch)
    numbers: list[float] = total_reward(scores.matrix(len(groups[0])), scores.weights).flatten().tolist()
    return numbers
