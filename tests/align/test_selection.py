"""Best-of-n and votes against counting by hand and full enumeration, and on samples of a model."""

import itertools
import math
import random
from collections import Counter

import pytest
from biased_policy import llm
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import tokenizer

from pellucid.align.rewards import Batch, Reward, RewardSet
from pellucid.align.selection import (
    accuracy_by_n,
    answer_of,
    best,
    best_of_k,
    choose,
    count_votes,
    pick,
    process_reward,
    steps_of,
    vote_of_k,
)
from pellucid.engine import Completion, SamplingParams
from pellucid.errors import BadInput

TOK = tokenizer()
equal = lambda a, b: a == b


def prompts(n=3):
    return [TOK.encode_chat([{"role": "user", "content": str(i)}], add_generation_prompt=True)[0] for i in range(n)]


def completions(*texts):
    return [Completion(i, t, [1] * len(t), None, "stop") for i, t in enumerate(texts)]


# --- counting -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=9))
def test_a_majority_is_what_counting_gives(answers):
    ballots = count_votes(answers, same=equal)
    counted = Counter(a for a in answers if a is not None)
    assert {b.answer: b.weight for b in ballots} == counted
    assert [b.weight for b in ballots] == sorted(counted.values(), reverse=True)
    for b in ballots:
        assert [answers[i] for i in b.members] == [b.answer] * len(b.members)
    if ballots:  # of equal ones the one that was said first
        assert ballots[0].answer == next(a for a in answers if a is not None and counted[a] == ballots[0].weight)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=8))
def test_a_weighted_vote_sums_weights(pairs):
    answers, weights = [a for a, _ in pairs], [w / 4 for _, w in pairs]
    ballots = count_votes(answers, weights, same=equal)
    assert {b.answer: b.weight for b in ballots} == {a: sum(w for x, w in zip(answers, weights) if x == a) for a in set(answers)}
    assert ballots[0].weight == max(b.weight for b in ballots)


def test_equal_answers_in_other_writings_vote_together():
    ballots = count_votes([r"\frac{1}{2}", "0.5", "2", "1/2", None, "x+1", "1+x"])
    assert [(b.answer, b.weight, b.members) for b in ballots] == [(r"\frac{1}{2}", 3, (0, 1, 3)), ("x+1", 2, (5, 6)), ("2", 1, (2,))]
    with pytest.raises(BadInput, match="-1"):
        count_votes(["a", "b"], [1.0, -1.0])
    assert count_votes([None, None]) == [] == count_votes([])


def test_best_takes_the_first_of_equals_and_passes_over_nan():
    assert best([1.0, 3.0, 3.0]) == 1 and best([math.nan, 0.0, math.nan]) == 1 and best([math.nan] * 3) == 0
    assert best([9.0, 1.0, 2.0], [1, 2]) == 2


def test_pick():
    made = completions("so 4", "so 5", "it is 4.0", "none", "so 5")
    assert pick(made, [math.nan] * 5, vote=True).answer == "4" and pick(made, [math.nan] * 5, vote=True).index == 0
    weighted = pick(made, [0.1, 0.9, 0.2, 1.0, 0.3], vote=True)
    assert (weighted.answer, weighted.index, weighted.ballots[0].weight) == ("5", 1, pytest.approx(1.2))
    assert pick(made, [0.1, 0.9, 0.2, 1.0, 0.3], vote=False).index == 3 and pick(made, [0.1] * 5, vote=False).ballots == []
    assert pick(made, [0.6, 0.5, math.nan, 1.0, math.nan], vote=True).answer == "4"  # NaN: no support
    assert pick(completions("none", "no"), [math.nan] * 2, vote=True).index == 0


def test_answers_are_read_behind_the_thought():
    assert answer_of("<think>it is 7</think>The answer is 8.") == "8" and answer_of("<think>7</think>no number") is None


# --- estimates from one set of samples ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_all_subsets(pairs, data):
    correct, scores = [c for c, _ in pairs], [float(s) for _, s in pairs]
    k = data.draw(st.integers(1, len(pairs)))
    wins = [correct[max(subset, key=lambda i: (scores[i], -i))] for subset in itertools.combinations(range(len(pairs)), k)]
    assert best_of_k(correct, scores, k) == pytest.approx(sum(wins) / len(wins))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=7), st.data())
def test_vote_of_k_is_the_mean_over_all_subsets(answers, data):
    correct = [a == "1" for a in answers]
    k = data.draw(st.integers(1, len(answers)))
    weights = data.draw(st.none() | st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=len(answers), max_size=len(answers)))
    wins = []
    for subset in itertools.combinations(range(len(answers)), k):
        ballots = count_votes([answers[i] for i in subset], None if weights is None else [weights[i] for i in subset])
        wins.append(bool(ballots) and ballots[0].answer == "1")
    assert vote_of_k(correct, answers, k, weights) == pytest.approx(sum(wins) / len(wins))


def test_vote_of_k_by_random_subsets_is_near_the_whole():
    rng = random.Random(0)
    answers = [rng.choice("1122233") for _ in range(16)]
    correct = [a == "2" for a in answers]
    exact = vote_of_k(correct, answers, 5, draws=10**4)
    assert abs(vote_of_k(correct, answers, 5, draws=1500) - exact) < 0.04 and vote_of_k(correct, answers, 5) == vote_of_k(correct, answers, 5)


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_k(k):
    with pytest.raises(BadInput):
        best_of_k([True] * 3, [1.0] * 3, k)
    with pytest.raises(BadInput):
        vote_of_k([True] * 3, ["1"] * 3, k)


def test_the_table_of_methods():
    made = [pick(completions("1", "2", "1", "3"), [0.1, 0.9, 0.2, 0.3], vote=True), pick(completions("1", "2", "2", "3"), [0.9, 0.1, 0.2, 0.3], vote=True)]
    right = [[c.text == "1" for c in choice.completions] for choice in made]
    table = accuracy_by_n(made, right, [1, 4])
    assert table["pass@k"] == [pytest.approx((0.5 + 0.25) / 2), 1] and table["best-of-k"] == [pytest.approx(0.375), 0.5]
    assert table["majority"] == [pytest.approx(0.375), 0.5] and table["weighted"] == [pytest.approx(0.375), 0.5]
    unscored = [pick(choice.completions, [math.nan] * 4, vote=True) for choice in made]
    assert set(accuracy_by_n(unscored, right, [1])) == {"pass@k", "majority"}
    assert "weighted" not in accuracy_by_n([pick(completions("1"), [-1.0], vote=False)], [[True]], [1])


# --- process rewards --------------------------------------------------------------------------------------------------------


class Steps:
    def __init__(self):
        self.asked = []

    def score_steps(self, prompts, steps):
        self.asked += list(zip(prompts, steps))
        return [[len(s) / 10 for s in some] for some in steps]


@pytest.mark.parametrize("combine, value", [("min", 0.1), ("product", 0.1 * 0.3 * 0.2), ("mean", 0.2), ("last", 0.2)])
def test_the_scores_of_steps_become_one(combine, value):
    model = Steps()
    rewards = RewardSet([Reward("prm", process_reward(model, combine))])
    scores = rewards.score(Batch(["q", "r"], ["<think>\na\n\nbcd\nef\n</think>\n\n9", ""]))
    assert scores.components["prm"][0] == pytest.approx(value) and scores.components["prm"][1].isnan() and scores.failed == {"prm": 0}
    assert model.asked == [("q", ["a", "bcd", "ef"]), ("r", [])]


def test_steps():
    assert steps_of("a\nb") == ["a", "b"] and steps_of("<think>a\n\n b</think>c\nd") == ["a", "b"] and steps_of("a;b ; ", ";") == ["a", "b"]
    with pytest.raises(BadInput, match="score_steps"):
        process_reward(object())
    with pytest.raises(BadInput, match="'max'"):
        process_reward(Steps(), "max")


# --- with a model -------------------------------------------------------------------------------------------------------------

PARAMS = SamplingParams(max_tokens=8, temperature=1.0, seed=5)
number = lambda text: str(sum(map(ord, text)) % 3)


def test_best_of_n_is_the_best_of_what_the_engine_samples():
    got = []

    def longest(prompts, completions, completion_ids, prompt_ids, gold, finished):
        got.append((prompts, gold, prompt_ids, finished))
        return [float(len(c) + g) for c, g in zip(completions, gold)]

    choices = choose(llm(), prompts(), 6, rewards=RewardSet([Reward("longest", longest, 2.0)]), params=PARAMS, columns={"gold": [10, 20, 30]})
    for i, (choice, prompt) in enumerate(zip(choices, prompts())):
        (request,) = llm().generate([prompt], SamplingParams(max_tokens=8, temperature=1.0, seed=5, n=6))
        texts = [c.text for c in request.outputs]
        assert [c.text for c in choice.completions] == texts and choice.ballots == [] and choice.answer is None
        assert choice.scores == [2 * (len(t) + 10 * (i + 1)) for t in texts]
        assert choice.completion.text == max(texts, key=len) and choice.index == texts.index(choice.completion.text)
    (shown, gold, ids, finished), = got
    assert gold == [10] * 6 + [20] * 6 + [30] * 6 and ids[0] == prompts()[0] and shown[0] == TOK.decode(prompts()[0])
    assert finished == [c.finish_reason == "stop" for choice in choices for c in choice.completions]


def test_self_consistency_and_weighted_voting():
    for choice in choose(llm(), prompts(), 9, vote=True, params=PARAMS, parse=number, same=equal):
        counted = Counter(number(c.text) for c in choice.completions)
        assert choice.ballots[0].weight == max(counted.values()) and counted[choice.answer] == max(counted.values())
        assert choice.index == min(choice.ballots[0].members)
    weight = lambda completions: [len(c) / 50 for c in completions]
    for choice in choose(llm(), prompts(), 9, vote=True, params=PARAMS, parse=number, same=equal, rewards=RewardSet([Reward("w", weight)])):
        sums = Counter()
        for c in choice.completions:
            sums[number(c.text)] += len(c.text) / 50
        assert choice.ballots[0].weight == pytest.approx(max(sums.values())) == pytest.approx(sums[choice.answer])
        assert number(choice.completion.text) == choice.answer and choice.index == best(choice.scores, choice.ballots[0].members)


def test_rewards_that_fail_choose_the_first_and_conversations_stay_conversations():
    seen = []

    def broken(prompts, completions):
        seen.append((prompts[0], completions[0]))
        raise RuntimeError("no")

    shown = [[{"role": "user", "content": str(i)}] for i in range(3)]
    choices = choose(llm(), prompts(), 3, rewards=RewardSet([Reward("broken", broken)]), params=PARAMS, shown=shown)
    assert [c.index for c in choices] == [0, 0, 0] and all(map(math.isnan, choices[0].scores))
    assert seen[0] == (shown[0], [{"role": "assistant", "content": choices[0].completions[0].text}])


@pytest.mark.parametrize("how, message", [({}, "nothing to choose by"), ({"vote": True, "params": SamplingParams()}, "temperature 0"), ({"vote": True, "n": 0}, "0 completions")])
def test_what_cannot_choose_is_refused(how, message):
    with pytest.raises(BadInput, match=message):
        choose(llm(), prompts(), how.pop("n", 4), **how)
