"""What holds for every task: demonstrations, split, seeds, dials, graders that never raise and never take long."""

import dataclasses
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import BadInput
from pellucid.tasks import (
    DIALS,
    TASKS,
    Mixture,
    dialogue_of,
    facts,
    is_heldout,
    make,
    parse_answer,
    parse_completion,
    reward_weights,
)
from pellucid.tasks.task import MARKERS

PERFECT = {"format": 1.0, "correct": 1.0, "progress": 1.0}
OTHER_DIALS = {
    "countdown": [{"count": 2}, {"count": 4, "max_tries": 8}, {"max_number": 9, "operations": "+-"}, {"max_tries": 1},
                  {"max_value": 999, "max_number": 50}, {"explain": True}],
    "arithmetic": [{"min_digits": 1, "max_digits": 12}, {"operations": "+"}, {"min_digits": 30, "max_digits": 30},
                   {"explain": True}],
    "sorting": [{"min_count": 3, "max_count": 3}, {"min_count": 20, "max_count": 50, "max_number": 999},
                {"explain": True}],
    "calculator": [{"operations": "/"}, {"operations": "+-*/", "min_number": 1, "max_number": 9999},
                   {"stories": False}, {"explain": True}],
    "copying": [{"kind": "copy"}, {"kind": "reverse"}, {"min_length": 1, "max_length": 100}, {"symbols": "01"},
                {"explain": True}],
    "chain": [{"modulus": 3}, {"modulus": 1000, "max_steps": 60}, {"operations": "*"}, {"explain": True}],
    "brackets": [{"kinds": "[{"}, {"closed": 0}, {"min_open": 30, "max_open": 30, "closed": 40}, {"explain": True}],
    "json": [{"max_items": 1}, {"min_fields": 12, "max_fields": 12, "max_items": 9}, {"min_fields": 1}, {"explain": True}],
    "lookup": [{"min_calls": 1, "max_calls": 1}, {"max_calls": 6, "spare_calls": 0}, {"explain": True}],
    "toolrl": [{"tools": "xyz"}, {"digits": 5}, {"explain": True}],
    "brevity": [{"least": 0, "most": 0}, {"most": 1000, "max_digits": 12}, {"operations": "-"}, {"explain": True}],
    "hackable": [{"min_number": 1, "max_number": 9}, {"max_number": 10**6}, {"explain": True}],
    "bandit": [{"arms": "xy", "pulls": 8}, {"seed": 7, "contexts": 100, "pulls": 1}, {"explain": True}],
}
OTHER_DIALS["arithmetic"] += [{"scratchpad": False}, {"scratchpad": False, "explain": True}]
BARE = {"copying", "toolrl", "hackable", "bandit"}    # their demonstrations are the answer alone
MUST_THINK = sorted(set(TASKS) - BARE - {"brevity"})
MAY_THINK = ["copying", "hackable", "bandit", "brevity"]


def perfect(graded):
    return {name: graded[name] for name in PERFECT} == PERFECT


def answer_in(text):
    return text.split("</think>\n\n")[-1]


def problems(task, n, seed=0, split="train"):
    rng = random.Random(seed)
    return [task.sample(rng, split) for _ in range(n)]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_always_graded_correct(name, split):
    task, rng = make(name), random.Random(1)
    for problem in problems(task, 2000, split=split):
        text = task.demonstrate(problem, rng)
        assert perfect(task.grade(problem, text)), (problem, text)
        assert text == text.strip() and (text.startswith("<think>\n") and "\n</think>\n\n" in text) != (name in BARE)
        assert is_heldout(name, problem.key) == (split == "heldout")
        assert problem.prompt.isascii() and problem.task == name


@pytest.mark.parametrize("name, dials", [(n, d) for n, many in OTHER_DIALS.items() for d in many])
def test_every_dial_is_reachable_and_its_demonstrations_correct(name, dials):
    task, rng = make(name, **dials), random.Random(2)
    assert {**dataclasses.asdict(task.dials), **dials} == dataclasses.asdict(task.dials)
    for problem in problems(task, 60):
        assert perfect(task.grade(problem, task.demonstrate(problem, rng)))


def test_dials_change_what_they_say():
    assert {len(p.answer[0]) for p in problems(make("countdown", count=4), 20)} == {4}
    assert max(max(p.answer[0]) for p in problems(make("countdown", max_number=5, max_value=99), 200)) == 5
    assert all("*" not in make("countdown", operations="+-").demonstrate(p, random.Random(0))
               for p in problems(make("countdown", operations="+-"), 200))
    one = make("countdown", max_tries=1)
    assert all(one.demonstrate(p, random.Random(0)).count("\n") == 4 for p in problems(one, 100))
    most = make("countdown", max_tries=6)
    shown = {most.demonstrate(p, random.Random(i)).count("\n") - 3 for i, p in enumerate(problems(most, 300))}
    assert shown == set(range(1, 7))
    long = make("arithmetic", min_digits=2, max_digits=5, operations="+")
    lengths = {len(str(p.answer[2])) for p in problems(long, 200)}
    assert lengths == {2, 3, 4, 5}
    assert {p.answer[1] for p in problems(make("calculator", operations="/"), 50)} == {"/"}
    assert {len(p.answer) for p in problems(make("sorting"), 200)} == {4, 5, 6}
    assert {p.prompt[:4] for p in problems(make("copying", kind="copy"), 50)} == {"Copy"}
    assert {len(p.answer[1]) for p in problems(make("chain", min_steps=4, max_steps=9), 200)} == set(range(4, 10))
    assert {len(p.answer) for p in problems(make("json"), 200)} == {2, 3, 4}
    assert {len(p.answer[0]) for p in problems(make("lookup", min_calls=1, max_calls=3), 200)} == {1, 2, 3}
    assert not any("<think>" in make("arithmetic", scratchpad=False).demonstrate(p, random.Random(0))
                   for p in problems(make("arithmetic"), 20))
    assert {p.answer[4] for p in problems(make("brevity", least=0, most=0), 20)} == {0}
    for name in TASKS:
        assert all(len(e.prompt) > 20 + len(p.prompt) and e.answer == p.answer
                   for e, p in zip(problems(make(name, explain=True), 20), problems(make(name), 20)))


@pytest.mark.parametrize("name, dials", [
    ("countdown", {"count": 1}), ("countdown", {"count": 5}), ("countdown", {"count": True}),
    ("countdown", {"count": 2.0}),
    ("countdown", {"max_number": 0}), ("countdown", {"max_value": 10}), ("countdown", {"operations": "+/"}),
    ("countdown", {"operations": ""}), ("countdown", {"operations": "++"}), ("countdown", {"max_tries": 0}),
    ("countdown", {"operations": None}), ("countdown", {"number": 3}),
    ("arithmetic", {"min_digits": 0}), ("arithmetic", {"min_digits": 4}), ("arithmetic", {"max_digits": 31}),
    ("arithmetic", {"operations": "*"}), ("sorting", {"min_count": 2}), ("sorting", {"max_count": 3}),
    ("sorting", {"max_number": 5}), ("calculator", {"min_number": 0}), ("calculator", {"max_number": 2}),
    ("calculator", {"operations": "^"}), ("nothing", {}), ("countdwn", {}),
    ("copying", {"kind": "sort"}), ("copying", {"symbols": "a"}), ("copying", {"symbols": "aab"}),
    ("copying", {"symbols": "a b"}), ("copying", {"symbols": None}), ("copying", {"min_length": 0}),
    ("copying", {"symbols": "é1"}), ("chain", {"min_steps": 2}), ("chain", {"modulus": 2}), ("chain", {"operations": "/"}),
    ("brackets", {"kinds": "("}), ("brackets", {"kinds": "(("}), ("brackets", {"kinds": "(<"}), ("brackets", {"min_open": 1}),
    ("brackets", {"closed": -1}), ("json", {"min_fields": 0}), ("json", {"max_fields": 99}), ("json", {"max_items": 0}),
    ("lookup", {"min_calls": 0}), ("lookup", {"max_calls": 7}), ("lookup", {"spare_calls": -1}), ("toolrl", {"tools": "a"}),
    ("toolrl", {"digits": 0}), ("brevity", {"least": 50, "most": 20}), ("brevity", {"operations": "*"}),
    ("hackable", {"max_number": 10}), ("bandit", {"pulls": 9}), ("bandit", {"arms": "aa"}), ("bandit", {"contexts": 1}),
    ("arithmetic", {"scratchpads": True}),
])
def test_impossible_dials_are_refused(name, dials):
    with pytest.raises(BadInput) as error:
        make(name, **dials)
    assert error.value.what and error.value.next


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(BadInput, match="did you mean 'countdown'"):
        make("countdwn")
    with pytest.raises(BadInput, match="did you mean 'max_tries'"):
        make("countdown", max_trie=3)


def test_an_empty_side_of_the_split_is_said_and_not_waited_for():
    with pytest.raises(BadInput, match="no heldout problem"):
        make("countdown", count=2, max_number=2).sample(random.Random(0), "heldout")
    only_one_set = next(n for n in range(2, 50) if is_heldout("countdown", f"{n},{n}"))
    equal = random.Random(0)
    equal.randint = lambda low, high: only_one_set    # two equal numbers have no positive difference
    with pytest.raises(BadInput, match="has a solution"):
        make("countdown", count=2, max_number=50, operations="-").sample(equal, "heldout")
    with pytest.raises(BadInput, match="unknown split"):
        make("sorting").sample(random.Random(0), "test")


@pytest.mark.parametrize("name", TASKS)
def test_equal_seeds_give_equal_problems(name):
    task = make(name)
    assert problems(task, 50, seed=7) == problems(make(name), 50, seed=7)
    assert problems(task, 50, seed=7) != problems(task, 50, seed=8)
    problem = problems(task, 1)[0]
    assert task.demonstrate(problem, random.Random(3)) == task.demonstrate(problem, random.Random(3))


def test_problems_and_split_do_not_depend_on_the_process():
    """Neither string hashing nor set order may decide anything."""
    code = ("import random; from pellucid.tasks import *; r = random.Random(5); "
            "both = ('train', 'heldout'); "
            "print([(p := make(n).sample(r, s), make(n).demonstrate(p, r)) for n in TASKS for s in both], "
            "facts(r))")
    outputs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True,
                              text=True, check=True).stdout for seed in ("1", "2")}
    assert len(outputs) == 1 and len(outputs.pop()) > 500


def test_tasks_need_no_torch():
    code = "import sys, pellucid.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", [
    "", "42", "<think>", "<think></think>", "<think>a</think>", "<think>\n \n</think>\n\n42", "<think>a</think>\n\n ",
    "<think>a\n\n42", "a</think>\n\n42", "42 <think>a</think>", "x<think>a</think>42",
    "<think>a</think>42<think>b</think>",
    "<think>a</think>42</think>", "<think><think>a</think>42", "<think>a<think>b</think></think>42",
    "<THINK>a</THINK>42",
    "<think >a</think>42", "</think>a<think>42", "<think>a</think>42<think>", "<think>a <tool_call> b</think>42", "<think>a<|im_end|></think>42",
    "\u3000<think>a</think>42", "\x00<think>a</think>42", "＜think＞a＜/think＞42",
])
def test_what_is_not_one_thought_and_an_answer(text):
    assert parse_completion(text) is None
    for name in MUST_THINK:
        assert make(name).grade(problems(make(name), 1)[0], text) == {"format": 0.0, "correct": 0.0, "progress": 0.0}


def test_what_is_one_thought_and_an_answer():
    assert parse_completion("<think>\na\nb\n</think>\n\n42") == ("a\nb", "42")
    assert parse_completion(" \n<think>a</think>42\n") == ("a", "42")


def test_a_missing_or_blank_thought_is_an_answer_where_it_may_be():
    assert parse_answer("42") == ("", "42") == parse_answer("<think>\n\n</think>\n\n42\n")
    assert parse_answer("<think>a\nb</think> 42") == ("a\nb", "42")


@pytest.mark.parametrize("text", ["", " \n", "<think>", "<think>42", "42</think>", "<think></think>", "<think>a</think>\n",
                                  "42<|im_end|>", "<think>a<tool_call></think>42", "x<think>a</think>42",
                                  "<think>a</think>42<think>b</think>", "<think><think>a</think>42", "42 <tool_call>"])
def test_what_is_no_answer_with_or_without_a_thought(text):
    assert parse_answer(text) is None


EVERYWHERE = [
    lambda text, answer: f"{answer}\n{text}",                                       # answer first
    lambda text, answer: text.replace(f"\n\n{answer}", f"\n{answer}\n</think>"),    # only inside the thought
    lambda text, answer: text.replace("</think>\n\n" + answer, f"{answer}\n</think>"),
    lambda text, answer: f"{text}\n{answer}",                                       # twice
    lambda text, answer: f"{text}.",                                                # more after it
    lambda text, answer: f"{text} is the answer",
    lambda text, answer: f"{text}\n\n{text}",
    lambda text, answer: f"{text}<|im_end|>",
    lambda text, answer: f"{text}\x00",
    lambda text, answer: f"{text}\u200b",
    lambda text, answer: text.replace("</think>\n\n", "</think>\n\nThe answer is "),
    lambda text, answer: text.replace("</think>\n\n", "</think>\n\n="),
    lambda text, answer: text.replace("</think>\n\n", "</think>\n\n<answer>") + "</answer>",
    lambda text, answer: text.replace("</think>", ""),
    lambda text, answer: text.replace("<think>", "<think>\n<think>"),
    lambda text, answer: "<think>\nhm\n</think>\n" + text,
    lambda text, answer: text + "\n<think>\nhm\n</think>",
    lambda text, answer: "".join(text.rsplit(answer, 1)),                           # no answer
    lambda text, answer: text.replace(answer, f"\\boxed{{{answer}}}"),
    lambda text, answer: text.replace(answer, f"`{answer}`"),
    lambda text, answer: text.replace(answer, f"{answer} or {answer}"),
]
DIGITS = [
    lambda text, answer: text.translate({ord("0") + i: ord("０") + i for i in range(10)}),   # full-width digits
    lambda text, answer: text.translate({ord("0") + i: 0x660 + i for i in range(10)}),       # Arabic-Indic digits
]
LETTERS = [
    lambda text, answer: text.replace(answer, answer.translate({ord("a") + i: ord("ａ") + i for i in range(26)})),
    lambda text, answer: text.replace(answer, answer.translate({ord("a"): 0x430, ord("e"): 0x435, ord("c"): 0x441})),
]
NO_THOUGHT = [
    lambda text, answer: answer,
    lambda text, answer: f"<think>\n</think>\n\n{answer}",
]
NO_DIGITS, NO_LETTERS = {"brackets", "json", "lookup", "copying", "bandit"}, {"countdown", "arithmetic", "sorting", "chain",
                                                                              "brackets", "brevity", "hackable"}


def cheated(name, change):
    """The graded cheats, each with what it came from, and how many changed nothing."""
    task, rng = make(name), random.Random(4)
    same = 0
    for problem in problems(task, 40):
        text = task.demonstrate(problem, rng)
        text = f"<think>\nhm\n</think>\n\n{text}" if name in BARE else text
        assert task.grade(problem, text)["correct"] == 1
        cheat = change(text, answer_in(text))
        if cheat == text:
            same += 1
            continue
        graded = task.grade(problem, cheat)
        assert graded["format"] == 0 and graded["correct"] == 0 and graded["progress"] < 0.95, cheat
    return same


@pytest.mark.parametrize("name", [*MUST_THINK, *MAY_THINK])
def test_cheats_with_the_place_of_the_answer(name):
    assert [cheated(name, change) for change in EVERYWHERE] == [0] * len(EVERYWHERE)


@pytest.mark.parametrize("name", MUST_THINK)
def test_cheats_without_a_thought(name):
    assert [cheated(name, change) for change in NO_THOUGHT] == [0, 0]


@pytest.mark.parametrize("name", [*MUST_THINK, *MAY_THINK])
def test_cheats_with_characters_that_look_alike(name):
    if name != "json":  # its values are free, and its grammar is ASCII whatever they hold
        assert name in NO_DIGITS or max(cheated(name, change) for change in DIGITS) == 0
        assert name in NO_LETTERS or max(cheated(name, change) for change in LETTERS) < 40


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("between", ["", " ", ", ", ","])
def test_the_answer_twice_in_a_row_is_never_correct(name, between):
    """In some grammars two answers run together are one other answer (1 4 0 6 1 4 0 6): well-formed, and wrong."""
    task, rng = make(name), random.Random(4)
    for problem in problems(task, 50):
        text = task.demonstrate(problem, rng)
        assert task.grade(problem, text + between + answer_in(text))["correct"] == 0


@pytest.mark.parametrize("name", TASKS)
def test_another_problems_answer_is_not_correct(name):
    task, rng = make(name), random.Random(5)
    for problem, other in zip(problems(task, 300), problems(task, 300, seed=1)):
        theirs = task.demonstrate(other, rng)
        graded = task.grade(problem, theirs)
        assert graded["format"] == 1
        if graded["correct"]:  # some problems share their answer: sums, remainders, the first key to look up
            assert problem.key == other.key or answer_in(theirs) == answer_in(task.demonstrate(problem, rng))
        assert graded["progress"] <= 0.9 or graded["correct"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("text", [
    "x" * 10**6, "<think>" * 10**5, "<think>\n" + "1+1=2\n" * 10**5 + "</think>\n\n1", "<think>a</think>" + "1" * 10**6,
    "<think>a</think>" + "1," * 10**5 + "1", "<think>a</think>" + "1 " * 10**5 + "1",
    "<think>" + "1-1=0," * 10**5 + "</think>1",
    "<think>a</think>" + "(" * 10**6, "<think>a</think>" + "-" * 10**6, "<think>" + " " * 10**6 + "</think>1",
    "<think>a</think><tool_call>" + "[" * 10**6, "<think>a</think><tool_call>\n" + "[" * 200 + "\n</tool_call>",
    "<think>a</think><tool_call>" * 10**4, "<think>a</think>9**9**9**9", "\n" * 10**6,
    "<think>" + "\n" * 10**6 + "a</think>1", "<think>" + "9" * 10**5 + "=9</think>1",
], ids=lambda text: text[:24].strip())
def test_a_huge_completion_takes_bounded_time(name, text):
    task = make(name)
    problem = problems(task, 1)[0]
    start = time.process_time()
    assert task.grade(problem, text)["correct"] == 0
    assert time.process_time() - start < 0.25


pieces = st.sampled_from([*MARKERS, "\n", "\n\n", " ", ",", "+", "-", "*", "(", ")", "=", "<", "{", "}", '"', ":",
                          "yes", "no",
                          "0", "1", "7", "12", "99", "calculator", "name", "arguments", "expression", "１", "\ud800",
                          "\x00"])
fuzz = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=40).map("".join),
                 st.lists(pieces, max_size=30).map(lambda parts: "<think>\na\n</think>\n\n" + "".join(parts)),
                 st.lists(pieces, max_size=30).map(lambda parts: "<think>\n" + "".join(parts) + "\n</think>\n\n12"))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 50), fuzz)
def test_graders_never_raise_and_keep_their_bounds(name, seed, text):
    task = make(name)
    graded = task.grade(problems(task, 1, seed=seed)[0], text)
    assert set(graded) - {"length", "proxy", "payoff", "correctness"} == {"format", "correct", "progress"}
    assert all(type(v) is float and (0 <= v <= 1 or (n == "correctness" and v in (-3, -1))) for n, v in graded.items())
    assert graded["correct"] <= graded["format"] and graded["format"] in (0, 1) and graded["correct"] in (0, 1)
    assert (graded["progress"] == 1) == (graded["correct"] == 1)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 50), st.data())
def test_one_changed_character_is_graded_without_surprise(name, seed, data):
    """Near the truth: a changed character keeps every bound, and a changed answer is hardly ever still right."""
    task = make(name)
    problem = problems(task, 1, seed=seed)[0]
    text = task.demonstrate(problem, random.Random(seed))
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from(list("0123456789+-*()<>, \n{}\"a"))) + text[at + 1:]
    graded = task.grade(problem, changed)
    assert graded["correct"] <= graded["format"] and (graded["progress"] == 1) == (graded["correct"] == 1)


def test_what_is_rewarded():
    assert reward_weights(make("sorting")) == {"correct": 1.0, "format": 0.2, "progress": 0.3}
    assert reward_weights(make("hackable")) == {"proxy": 1.0}    # the true measure is shown, not rewarded
    for name in TASKS:
        task, rng = make(name), random.Random(0)
        problem = task.sample(rng, "train")
        assert set(reward_weights(task)) <= set(task.grade(problem, task.demonstrate(problem, rng)))
    assert reward_weights(Mixture([(make("sorting"), 1), (make("countdown"), 2)])) == reward_weights(make("sorting"))
    with pytest.raises(BadInput, match="reward different things"):
        reward_weights(Mixture([(make("sorting"), 1), (make("hackable"), 2)]))


def test_which_problems_are_dialogues():
    lookup, sorting = make("lookup"), make("sorting")
    mixture = Mixture([(lookup, 1), (sorting, 1)])
    assert dialogue_of(lookup, problems(lookup, 1)[0]) is lookup is dialogue_of(mixture, problems(lookup, 1)[0])
    assert dialogue_of(sorting, problems(sorting, 1)[0]) is None is dialogue_of(mixture, problems(sorting, 1)[0])


def test_the_mixture_dispatches():
    mixture = Mixture([(make("countdown"), 3), (make("sorting"), 1), (make("calculator"), 0)])
    rng = random.Random(0)
    drawn = [mixture.sample(rng, "heldout") for _ in range(2000)]
    share = sum(p.task == "countdown" for p in drawn) / len(drawn)
    assert abs(share - 0.75) < 0.04 and {p.task for p in drawn} == {"countdown", "sorting"}
    assert all(mixture.grade(p, mixture.demonstrate(p, rng)) == PERFECT for p in drawn)
    assert all(is_heldout(p.task, p.key) for p in drawn)
    assert mixture.dials.weights == (("countdown", 0.75), ("sorting", 0.25), ("calculator", 0.0))
    with pytest.raises(BadInput, match="no task 'arithmetic'"):
        mixture.grade(problems(make("arithmetic"), 1)[0], "")


@pytest.mark.parametrize("parts", [[], [("sorting", 0)], [("sorting", -1)], [("sorting", float("nan"))],
                                   [("sorting", 1), ("sorting", 1)], [("sorting", float("inf"))]])
def test_impossible_mixtures_are_refused(parts):
    with pytest.raises(BadInput):
        Mixture([(make(name), weight) for name, weight in parts])


def test_every_task_has_its_dials_documented():
    assert set(DIALS) == set(TASKS)
    for name, kind in DIALS.items():
        assert dataclasses.fields(kind) and kind.__dataclass_params__.frozen and isinstance(make(name).dials, kind)


def test_facts_are_true_short_and_keep_out_of_the_held_out_problems():
    rng, seen = random.Random(0), set()
    for _ in range(800):
        text = facts(rng)
        assert text.isascii() and text.endswith("\n") and len(text) < 300
        seen.update(text.splitlines())
    for line in seen:
        if "=" in line:
            left, right = line.split("=")
            assert eval(left, {"__builtins__": {}}) == int(right) >= 0, line    # our own text, in a test
        elif "<" in line:
            numbers = [int(n) for n in line.replace("<", ",").split(",")]
            assert min(numbers) == numbers[0] and len(set(numbers)) == len(numbers)
            assert len(numbers) < 3 or not is_heldout("sorting", ",".join(map(str, sorted(numbers)[-3:])))
        else:
            words, symbols = line.split(": ")
            left, word, right = words.split(" ")
            sign = {"plus": "+", "minus": "-", "times": "*"}[word]
            assert symbols == left + sign + right
            pair = (int(left), int(right)) if sign == "-" else sorted((int(left), int(right)))
            assert not is_heldout("calculator", f"{sign} {pair[0]},{pair[1]}")
    kinds = {"=": 0, "<": 0, ":": 0}
    for line in seen:
        kinds[next(k for k in kinds if k in line)] += 1
    assert min(kinds.values()) > 500
