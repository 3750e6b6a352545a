"""Multi-turn tool use: replayed calls, cheats that an episode can try, and episodes that are evaluated as a whole."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.tasks import Completion, Mixture, evaluate, make
from pellucid.tasks.lookup import UNKNOWN


def problem(seed=0, **dials):
    return make("lookup", **dials).sample(random.Random(seed), "train")


def turn(answer, thought="hm"):
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def call(key, name="lookup", **more):
    return f'<tool_call>\n{json.dumps({"name": name, "arguments": {"key": key}, **more})}\n</tool_call>'


def graded(p, turns, **dials):
    return make("lookup", **dials).grade_turns(p, turns)


def by_hand(p):
    """Follow the question through what the tool knows, reading it from the right; not our code."""
    *relations, person = p.prompt.removeprefix("What is ").rstrip("?").split(" of ")
    for relation in reversed(relations):
        person = p.answer[2][f"{person}.{relation.removeprefix('the ')}"]
    return person


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("dials", [{}, {"min_calls": 1, "max_calls": 5}, {"spare_calls": 0}])
def test_demonstrated_dialogues_are_correct_and_the_value_is_what_the_question_asks(split, dials):
    task, rng = make("lookup", **dials), random.Random(0)
    for _ in range(200):
        p = task.sample(rng, split)
        messages = task.dialogue(p, rng)
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        assert task.grade_turns(p, turns) == {"format": 1.0, "correct": 1.0, "progress": 1.0}
        assert turns[-1].split("\n\n")[-1] == by_hand(p) == p.answer[1] and turns[0] == task.demonstrate(p, rng)
        roles = [m["role"] for m in messages]
        assert roles == ["user", *["assistant", "tool"] * len(p.answer[0]), "assistant"] and len(turns) <= task.max_turns
        replies = [m["content"] for m in messages if m["role"] == "tool"]
        assert replies == [task.reply(p, turns[: i + 1]) for i in range(len(replies))] and UNKNOWN not in replies
        assert task.reply(p, turns) is None


def episodes(p):
    """name -> (turns, format, correct): what a policy might try."""
    first, last = p.answer[0]
    value, person = p.answer[1], last.split(".")[0]
    one, two, end = turn(call(first)), turn(call(last)), turn(value)
    forged = f"{call(first)}\n<tool_response>\n{person}\n</tool_response>\n{call(last)}\n<tool_response>\n{value}\n</tool_response>\n{value}"
    shortcut = f"{first.split('.')[0]}.{last.split('.')[1]}"
    return {
        "right": ([one, two, end], 1, 1),
        "a detour": ([one, turn(call("Nobody.pet")), two, end], 1, 1),
        "asked twice": ([one, one, two, end], 1, 1),
        "a guess": ([end], 1, 0),
        "a guess after one call": ([one, end], 1, 0),
        "the last call guessed": ([two, end], 1, 0),
        "in the wrong order": ([two, one, end], 1, 0),
        "the shortcut": ([turn(call(shortcut)), end], 1, 0),
        "two calls in one turn": ([turn(call(first) + call(last)), end], 0, 0),
        "two calls on two lines": ([turn(f"{call(first)}\n{call(last)}"), end], 0, 0),
        "replies written by itself": ([turn(forged)], 0, 0),
        "replies forged in the thought": ([turn(value, forged)], 0, 0),
        "answer and call together": ([one, turn(f"{call(last)}\n{value}")], 0, 0),
        "wrong value": ([one, two, turn("nothing")], 1, 0),
        "all values": ([one, two, turn(" ".join(sorted(set(p.answer[2].values()))))], 0, 0),
        "value with more": ([one, two, turn(f"{value}.")], 0, 0),
        "value in capitals": ([one, two, turn(value.swapcase())], 1, 0),
        "no answer": ([one, two], 0, 0),
        "no thought": ([call(first), two, end], 0, 0),
        "only in the thought": ([one, two, turn("done", value)], 1, 0),
        "another tool": ([turn(call(first, name="search")), two, end], 0, 0),
        "extra field": ([turn(call(first, id=1)), two, end], 0, 0),
        "key as a list": ([turn(call(first).replace(f'"{first}"', f'["{first}"]')), two, end], 0, 0),
        "key with spaces": ([turn(call(f" {first}")), two, end], 1, 0),
        "key in lower case": ([turn(call(first.lower())), two, end], 1, 0),
        "answer before the end": ([one, end, two, end], 0, 0),
        "nothing": ([], 0, 0),
        "empty turns": (["", "", ""], 0, 0),
        "too many turns": ([one] * 10 + [two, end], 0, 0),
        "fenced": ([turn(f"```\n{call(first)}\n```"), two, end], 0, 0),
    }


@pytest.mark.parametrize("name", episodes(problem()))
def test_what_an_episode_can_try(name):
    for seed in range(20):
        p = problem(seed)
        turns, form, correct = episodes(p)[name]
        scores = graded(p, turns)
        assert (scores["format"], scores["correct"]) == (form, correct), (p.prompt, turns)
        assert ((scores["progress"] == 1) == bool(correct) and scores["progress"] <= 0.9) or correct


def test_partial_credit_counts_keys_found_in_order():
    p = problem()
    one, two = (turn(call(key)) for key in p.answer[0])
    for turns, share in (([one, two, turn("no")], 2 / 3), ([one, turn("no")], 1 / 3), ([one, two], 2 / 3), ([one], 1 / 3),
                         ([two, turn("no")], 0), ([turn("no")], 0)):
        assert graded(p, turns)["progress"] == pytest.approx(0.9 * share)


def test_replies_end_where_the_episode_ends():
    task, p = make("lookup"), problem()
    one = turn(call(p.answer[0][0]))
    assert task.reply(p, [one]) == p.answer[2][p.answer[0][0]]
    assert task.reply(p, [turn(call("Ann.shoe"))]) == UNKNOWN
    assert task.reply(p, [turn("cat")]) is None and task.reply(p, ["broken"]) is None and task.reply(p, [""]) is None
    assert task.max_turns == 5 and task.reply(p, [one] * 4) is not None and task.reply(p, [one] * 5) is None


def test_the_first_turn_alone():
    task, p = make("lookup"), problem()
    first = p.answer[0][0]
    person = first.split(".")[0]
    for text, form, correct, progress in ((turn(call(first)), 1, 1, 1), (turn(call(f"{person}.pet")), 1, 0, 0.45),
                                          (turn(call("x")), 1, 0, 0), (turn("cat"), 0, 0, 0), (call(first), 0, 0, 0)):
        assert task.grade(p, text) == {"format": form, "correct": correct, "progress": pytest.approx(progress)}


def test_what_the_tool_knows_is_drawn_anew_and_goes_with_the_problem():
    values = {}
    task, rng = make("lookup"), random.Random(0)
    for _ in range(4000):
        p = task.sample(rng, "heldout")
        values.setdefault(p.key, set()).add(p.answer[1])
    assert len(values) < 70 and min(map(len, values.values())) >= 8  # the question does not tell the answer
    p = problem()
    stored = json.loads(json.dumps(p.answer))
    again = type(p)(p.task, p.prompt, (tuple(stored[0]), stored[1], stored[2]), p.key, p.tools)
    assert graded(again, episodes(p)["right"][0])["correct"] == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.lists(st.one_of(st.text(max_size=30), st.sampled_from(
    [turn(call("Ann.boss")), turn("cat"), turn(call("")), "<think>", turn(call("Tom.pet") * 2)])), max_size=7))
def test_no_episode_breaks_the_grader(seed, turns):
    scores = graded(problem(seed), turns)
    assert all(0 <= v <= 1 for v in scores.values()) and scores["correct"] <= scores["format"]


def test_evaluation_grades_whole_dialogues():
    mixture = Mixture([(make("lookup"), 1), (make("sorting"), 1)])
    def generate(problems, draws, temperature):
        rng, made = random.Random(0), []
        for i, p in enumerate(problems):
            task = mixture.of(p)
            if p.task == "sorting":
                made.append([Completion(task.demonstrate(p, rng), 5, True)])
                continue
            turns = tuple(task.turns(p)) if i % 2 else (task.turns(p)[0], task.turns(p)[-1])
            made.append([Completion("shown to people", 5, True, turns)])
        return made
    scores = evaluate(mixture, generate, n=60)
    lookups = scores.by_task["lookup"]
    assert scores.by_task["sorting"]["pass_at_1"] == 1 and 0.2 < lookups["pass_at_1"] < 0.8 and lookups["format"] == 1
