"""Evaluation against enumeration and against generators whose scores are known."""

import itertools
import json
import random

import pytest

from pellucid.errors import BadInput
from pellucid.tasks import Completion, Mixture, evaluate, finished_only, is_heldout, make, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_draw(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(BadInput):
        pass_at_k(n, c, k)


WRONG = "<think>\nhm\n</think>\n\n0"


def demonstrating(task, correct_of, tokens=10, finished=True):
    """A generator that is right on the first correct_of(i) draws of problem i and well-formed but wrong on the rest."""
    def generate(problems, draws, temperature):
        rng = random.Random(0)
        return [[Completion(task.demonstrate(p, rng) if j < correct_of(i) else WRONG, tokens, finished)
                 for j in range(draws)] for i, p in enumerate(problems)]
    return generate


def test_known_scores():
    task = make("sorting")
    scores = evaluate(task, demonstrating(task, lambda i: 2 if i % 2 else 0), n=40, k=3, draws=4, seed=1)
    assert scores.pass_at_1 == pytest.approx(0.25) and scores.pass_at_k == pytest.approx(0.5)
    assert (scores.format, scores.mean_length, scores.truncated) == (1, 10, 0)
    assert (scores.n, scores.k, scores.draws, scores.temperature) == (40, 3, 4, 1.0)
    assert scores.reasoning == pytest.approx(0.25) and 0.25 < scores.progress < 1
    # per-problem rates are 0 and 0.5 in equal number: standard deviation (n - 1) is 0.25 * sqrt(40 / 39)
    assert scores.standard_error == pytest.approx(0.25 * (40 / 39) ** 0.5 / 40**0.5)


def test_broken_form_is_told_apart_from_wrong_reasoning():
    task = make("arithmetic")
    def generate(problems, draws, temperature):
        rng = random.Random(0)
        return [[Completion(task.demonstrate(p, rng) if i % 4 == 0 else "<think>\n1+1", 64, i % 4 == 0)]
                for i, p in enumerate(problems)]
    scores = evaluate(task, generate, n=40)
    assert (scores.pass_at_1, scores.format, scores.reasoning, scores.truncated) == (0.25, 0.25, 1.0, 0.75)
    silent = evaluate(task, lambda p, d, t: [[Completion("", 0, True)] for _ in p], n=5)
    assert silent.reasoning is None and silent.pass_at_1 == 0


def test_greedy_and_sampled_are_not_mixed_up():
    task, seen = make("countdown"), []
    def generate(problems, draws, temperature):
        seen.append((draws, temperature))
        return demonstrating(task, lambda i: draws)(problems, draws, temperature)
    evaluate(task, generate, n=3)
    evaluate(task, generate, n=3, k=4)
    evaluate(task, generate, n=3, k=1, draws=2, temperature=0.7)
    evaluate(task, generate, n=3, k=1, draws=2)
    assert seen == [(1, 0.0), (4, 1.0), (2, 0.7), (2, 1.0)]
    with pytest.raises(BadInput, match="all the same"):
        evaluate(task, generate, n=3, k=4, temperature=0.0)


def test_problems_are_held_out_distinct_and_equal_for_equal_seeds():
    task, seen = make("countdown"), []
    def generate(problems, draws, temperature):
        seen.append(problems)
        return demonstrating(task, lambda i: 1)(problems, draws, temperature)
    for seed in (1, 1, 2):
        evaluate(task, generate, n=100, seed=seed)
    assert seen[0] == seen[1] != seen[2]
    assert len({p.prompt for p in seen[0]}) == 100 and all(is_heldout("countdown", p.key) for p in seen[0])
    evaluate(task, generate, n=20, split="train")
    assert not any(is_heldout("countdown", p.key) for p in seen[-1])


def test_a_mixture_is_scored_by_task_and_as_a_whole():
    mixture = Mixture([(make("sorting"), 1), (make("calculator"), 1)])
    def generate(problems, draws, temperature):
        rng = random.Random(0)
        return [[Completion(mixture.demonstrate(p, rng) if p.task == "sorting" else "no", 7, True)] for p in problems]
    scores = evaluate(mixture, generate, n=60, keep=3)
    assert set(scores.by_task) == {"sorting", "calculator"}
    assert scores.by_task["sorting"]["pass_at_1"] == 1 and scores.by_task["calculator"]["pass_at_1"] == 0
    assert scores.by_task["calculator"]["format"] == 0 and scores.by_task["calculator"]["reasoning"] is None
    assert sum(t["n"] for t in scores.by_task.values()) == 60
    assert scores.pass_at_1 == scores.by_task["sorting"]["n"] / 60
    assert len(scores.samples) == 3 and json.loads(json.dumps(scores.record()))["n"] == 60


@pytest.mark.parametrize("n, k, draws", [(0, 1, None), (5, 0, None), (5, 3, 2), (-1, 1, 1)])
def test_impossible_requests_are_refused(n, k, draws):
    with pytest.raises(BadInput):
        evaluate(make("sorting"), lambda *a: [], n=n, k=k, draws=draws)


def test_a_generator_that_returns_too_little_is_an_error():
    with pytest.raises(ValueError, match="wanted 4 groups of 1"):
        evaluate(make("sorting"), lambda problems, draws, temperature: [], n=4)


def test_more_problems_than_exist_is_said():
    with pytest.raises(BadInput, match="different heldout problems found"):
        evaluate(make("sorting", min_count=3, max_count=3, max_number=5), lambda *a: [], n=500)


def test_an_answer_that_was_cut_off_has_no_form_and_is_not_right():
    """However well what there is of it would be graded: it might have gone on."""
    whole = {"format": 1.0, "correct": 1.0, "progress": 1.0}
    assert finished_only(whole, True) == whole
    assert finished_only(whole, False) == {"format": 0.0, "correct": 0.0, "progress": 0.9}
    task = make("sorting")
    scores = evaluate(task, demonstrating(task, lambda i: 1, finished=False), 5)
    assert (scores.pass_at_1, scores.format, scores.progress, scores.truncated) == (0.0, 0.0, pytest.approx(0.9), 1.0)
