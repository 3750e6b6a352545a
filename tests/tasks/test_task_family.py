"""The synthetic tasks: hand-made cheats, answers checked by other means, splits by enumeration."""

import itertools
import json
import random
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.tasks import Problem, is_heldout, make
from pellucid.tasks.brackets import closing, stacks
from pellucid.tasks.chain import key_of as chain_key
from pellucid.tasks.chain import worked


def problems(task, n, seed=0, split="train"):
    rng = random.Random(seed)
    return [task.sample(rng, split) for _ in range(n)]


def grade(problem, answer, thought="hm", **dials):
    text = answer if thought is None else f"<think>\n{thought}\n</think>\n\n{answer}"
    return make(problem.task, **dials).grade(problem, text)


# Each task's problem as it is in itself, whatever its wording: what must never stand on both sides.
CORE = {
    "copying": lambda p: min(p.answer, p.answer[::-1]),
    "chain": lambda p: p.answer[1:],
    "brackets": lambda p: reduced(p.answer),
    "json": lambda p: frozenset(p.answer),
    "lookup": lambda p: (p.answer[0][0], *(k.split(".")[1] for k in p.answer[0])),
    "toolrl": lambda p: frozenset(p.answer[1:]),
    "brevity": lambda p: frozenset((p.answer[0], p.answer[2])),
    "hackable": lambda p: frozenset(p.answer),
    "bandit": lambda p: p.answer,
}


def reduced(text):
    """Delete closed pairs until none is left: not our stack."""
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
        text = shorter
    return text


@pytest.mark.parametrize("name", CORE)
def test_the_sides_share_no_problem_and_a_tenth_is_held_out(name):
    task = make(name)
    sides = {split: {CORE[name](p) for p in problems(task, 4000, split=split)} for split in ("train", "heldout")}
    assert not sides["train"] & sides["heldout"]
    assert len(sides["heldout"]) > (30 if name == "lookup" else 50), len(sides["heldout"])
    keys = {p.key for split in sides for p in problems(task, 3000, seed=1, split=split)}
    assert all(type(key) is str and key for key in keys)


# copying ------------------------------------------------------------------------------------------------------------

def test_copying_splits_every_sequence_with_its_reverse():
    task, rng = make("copying", min_length=3, max_length=3, symbols="abcd"), random.Random(0)
    seen = {split: {p.prompt.split(" ", 1)[1] for p in (task.sample(rng, split) for _ in range(4000))}
            for split in ("train", "heldout")}
    every = {" ".join(letters) + "." for letters in itertools.product("abcd", repeat=3)}
    assert seen["train"] | seen["heldout"] == every and not seen["train"] & seen["heldout"]
    for side in seen.values():
        assert {s[:-1][::-1] + "." for s in side} == side


@pytest.mark.parametrize("answer, correct, form", [
    ("k d w", 1, 1), ("w d k", 0, 1), ("k d", 0, 1), ("k d w w", 0, 1), ("kdw", 0, 0), ("k,d,w", 0, 0), ("k  d w", 0, 0),
    ("K d w", 0, 1), ("k d w.", 0, 0), ("Copy k d w", 0, 0), ("k d w\nk d w", 0, 0), ("'k d w'", 0, 0), ("k\td w", 0, 0),
    ("k d \u0461", 0, 0), ("k d w \u200b", 0, 0)])
@pytest.mark.parametrize("thought", [None, "hm"])
def test_copying_cheats(answer, correct, form, thought):
    graded = grade(Problem("copying", "Copy k d w.", "k d w", "k d w"), answer, thought)
    assert (graded["correct"], graded["format"]) == (correct, form)


def test_copying_answers_are_the_prompt_forwards_or_backwards():
    for p in problems(make("copying"), 300):
        shown = p.prompt[:-1].split(" ")
        assert p.answer.split(" ") == (shown[1:] if shown[0] == "Copy" else shown[:0:-1])
    half = sum(p.prompt.startswith("Copy") for p in problems(make("copying"), 2000)) / 2000
    assert abs(half - 0.5) < 0.05


# chain --------------------------------------------------------------------------------------------------------------

CHAIN = Problem("chain", "Modulo 10: 7 +5 *3 -8.", (7, ("+5", "*3", "-8"), 10), "+5 *3 -8")


def test_chain_lines_are_true_and_end_in_the_answer():
    task, rng = make("chain", modulus=13, max_steps=12), random.Random(0)
    for p in problems(task, 500):
        start, steps, modulus = p.answer
        value = start
        for step, line in zip(steps, task.demonstrate(p, rng).split("\n")[1:]):
            left, right = line.split("=")
            assert left == f"{value}{step}"
            value = eval(left, {"__builtins__": {}}) % modulus    # our own text, in a test
            assert right == str(value)
        assert task.demonstrate(p, rng).endswith(f"\n\n{value}")
        assert p.prompt == f"Modulo 13: {start} {' '.join(steps)}."


def test_chain_no_training_chain_contains_a_held_out_one():
    task, rng = make("chain", modulus=4, operations="+-", max_steps=8), random.Random(0)
    held = {task.sample(rng, "heldout").answer[1] for _ in range(3000)}
    short = {steps for steps in held if len(steps) <= 4}
    assert len(short) > 50
    for _ in range(3000):
        steps = task.sample(rng, "train").answer[1]
        parts = {steps[i:j] for i in range(len(steps)) for j in range(i + 3, len(steps) + 1)}
        assert not parts & held
        assert not any(is_heldout("chain", " ".join(steps[i : i + 3])) for i in range(len(steps) - 2))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["+1", "*2", "-3", "+4", "*5"]), min_size=3, max_size=12))
def test_chain_is_held_out_if_and_only_if_a_window_is(steps):
    windows = [" ".join(steps[i : i + 3]) for i in range(len(steps) - 2)]
    assert is_heldout("chain", chain_key(steps)) == any(is_heldout("chain", window) for window in windows)


def test_chain_long_training_chains_exist():
    assert {len(p.answer[1]) for p in problems(make("chain", min_steps=60, max_steps=60), 20)} == {60}


@pytest.mark.parametrize("answer, correct, form", [
    ("8", 1, 1), ("18", 0, 1), ("08", 0, 0), ("-2", 0, 0), ("28", 0, 1), ("8.0", 0, 0), ("8\n", 1, 1), ("=8", 0, 0),
    ("6*3=8", 0, 0), ("8 or 9", 0, 0), ("0 1 2 3 4 5 6 7 8 9", 0, 0), ("eight", 0, 0), ("８", 0, 0), ("7+5*3-8", 0, 0)])
def test_chain_cheats(answer, correct, form):
    graded = grade(CHAIN, answer)
    assert (graded["correct"], graded["format"]) == (correct, form) and (graded["progress"] == 1) == bool(correct)


def test_chain_partial_credit_is_for_lines_only():
    lines = worked(*CHAIN.answer)
    assert lines == ["7+5=2", "2*3=6", "6-8=8"]
    assert grade(CHAIN, "9", "\n".join(lines))["progress"] == pytest.approx(0.9)
    assert grade(CHAIN, "9", "\n".join(lines[:2]))["progress"] == pytest.approx(0.6)
    assert grade(CHAIN, "9", "\n".join(lines * 2))["progress"] == pytest.approx(0.45)
    assert grade(CHAIN, "9")["progress"] == 0


# brackets -----------------------------------------------------------------------------------------------------------

BRACKETS = Problem("brackets", "Close ([]{(", "([]{(", ")})")


def test_brackets_answers_balance_the_prompt():
    for p in problems(make("brackets"), 500):
        text = p.prompt.removeprefix("Close ")
        assert reduced(text + closing(text)) == "" and text == p.answer and p.key == closing(text)
        assert 3 <= len(reduced(text)) <= 6 and max(map(len, stacks(text))) <= 6
    depths = {len(p.answer) for p in problems(make("brackets"), 500)}
    assert depths > {3, 5, 7, 9}


@pytest.mark.parametrize("answer, correct, form", [
    (")})", 1, 1), ("))}", 0, 1), (")}", 0, 1), (")}))", 0, 1), (")})()", 0, 0), ("([]{()})", 0, 0), (") } )", 0, 0),
    (")})\n)})", 0, 0), ("）})", 0, 0), (")})]" * 60, 0, 0), ("", 0, 0), ("'" + ")})" + "'", 0, 0)])
def test_brackets_cheats(answer, correct, form):
    graded = grade(BRACKETS, answer)
    assert (graded["correct"], graded["format"]) == (correct, form)


# json ---------------------------------------------------------------------------------------------------------------

FIELDS = (("name", "text"), ("age", "number"), ("open", "flag"), ("tags", "2 texts"))
JSON = Problem("json", "Write JSON: name text, age number, open flag, tags 2 texts.", FIELDS, "-")
GOOD = '{"name": "a", "age": 1, "open": true, "tags": ["b", ""]}'


def schema_of(fields):
    """The same demands as a JSON Schema, for another validator."""
    kinds = {"text": {"type": "string"}, "number": {"type": "integer"}, "flag": {"type": "boolean"}}
    def of(kind):
        if kind in kinds:
            return kinds[kind]
        count, items = kind.split(" ")
        return {"type": "array", "items": kinds[items[:-1]], "minItems": int(count), "maxItems": int(count)}
    return {"type": "object", "properties": {k: of(t) for k, t in fields}, "required": [k for k, _ in fields],
            "additionalProperties": False}


@pytest.mark.parametrize("answer, correct, form", [
    (GOOD, 1, 1), (GOOD.replace(" ", ""), 1, 1), (GOOD.replace(", ", ",\n"), 1, 1),
    ('{"tags": ["b", "c"], "open": false, "age": -3, "name": "\\u00e9"}', 1, 1),
    (GOOD.replace("true", "True"), 0, 0), (GOOD.replace("true", '"true"'), 0, 1), (GOOD.replace("1", "1.0"), 0, 1),
    (GOOD.replace("1", "true"), 0, 1), (GOOD.replace("1", '"1"'), 0, 1), (GOOD.replace("1", "NaN"), 0, 0),
    (GOOD.replace("1", "01"), 0, 0), (GOOD.replace("1", "1e2"), 0, 1), (GOOD.replace("1", "null"), 0, 1),
    (GOOD.replace("1", "9" * 5000), 0, 0), (GOOD.replace("1", "Infinity"), 0, 0), (GOOD.replace("true", "1"), 0, 1),
    (GOOD.replace('"b", ""', '"b"'), 0, 1), (GOOD.replace('"b", ""', '"b", "c", "d"'), 0, 1),
    (GOOD.replace('"b", ""', '"b", 1'), 0, 1), (GOOD.replace('["b", ""]', '"b"'), 0, 1), (GOOD.replace("tags", "Tags"), 0, 1),
    (GOOD[:-1] + ', "more": 1}', 0, 1), (GOOD[:-1] + ', "name": "b"}', 0, 0), (GOOD[:-1] + ",}", 0, 0), (f"[{GOOD}]", 0, 0),
    (GOOD * 2, 0, 0), (f"```json\n{GOOD}\n```", 0, 0), (GOOD.replace('"', "'"), 0, 0), (GOOD + " // done", 0, 0),
    (GOOD[1:], 0, 0), ("{}", 0, 1), ("null", 0, 0), ('"' + GOOD.replace('"', '\\"') + '"', 0, 0), ("{" * 1500, 0, 0),
    (GOOD.replace('"a"', '"a\nb"'), 0, 0), (GOOD.replace('"a"', '"é"'), 0, 0), (GOOD.replace("1", "１"), 0, 0),
    ("\u00a0" + GOOD, 0, 0), (GOOD.replace('"a"', '"' + "a" * 3000 + '"'), 0, 0)])
def test_json_cheats(answer, correct, form):
    graded = grade(JSON, answer)
    assert (graded["correct"], graded["format"]) == (correct, form)


def test_json_partial_credit_is_the_share_of_right_members():
    assert grade(JSON, '{"name": "a", "age": 1}')["progress"] == pytest.approx(0.45)
    assert grade(JSON, '{"name": "a", "age": 1, "x": 1, "y": 1, "z": 1, "w": 1, "v": 1, "u": 1}')["progress"] == pytest.approx(0.225)


values = st.recursive(st.one_of(st.text("ab\"\\", max_size=3), st.integers(-5, 5), st.booleans(), st.none(),
                                st.floats(-2, 2).map(lambda x: round(x, 1))),
                      lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["name", "age", "open", "tags", "size"]), values, max_size=5), st.integers(0, 9))
def test_json_agrees_with_jsonschema(members, seed):
    for p in (JSON, *problems(make("json"), 3, seed)):
        for value in (members, json.loads(make("json").demonstrate(p, random.Random(seed)).split("\n\n")[1]) | members):
            # A whole number written 1.0 is an integer to JSON Schema; here the form is what counts.
            wanted = jsonschema.Draft202012Validator(schema_of(p.answer)).is_valid(value) and not re.search(
                r"\d\.0\b", json.dumps({k: value.get(k) for k, _ in p.answer}))
            assert grade(p, json.dumps(value))["correct"] == wanted


# toolrl -------------------------------------------------------------------------------------------------------------

TOOL = Problem("toolrl", "a47,03=", ("a", "47", "03"), "03,47")


@pytest.mark.parametrize("text, form, correctness", [
    ("<a>[a(47,03)]", 1, 3), ("[a(47,03)]", 0, 3), ("<why?>[a(47,03)]", 1, 3), ("<b>[a(47,03)]\n", 1, 3), ("<a>[a(47,04)]", 1, 1),
    ("[b(47,30)]", 0, -1), ("<a>[b(03,47)]", 1, -3), ("<>[a(47,03)]", 0, -3), ("<a>", 0, -3), ("", 0, -3), ("a47,03=", 0, -3),
    ("<a>[a(47,03)][a(47,03)]", 0, -3), ("<a>[a(47,03)]!", 0, -3), ("<a><a>[a(47,03)]", 0, -3), ("[a(47,03)]<a>", 0, -3),
    ("<[a(47,03)]>", 0, -3), ("<a>[a(47,3)]", 1, 1), ("<a>[a( 47,03)]", 0, -3), ("<a>[a(４７,03)]", 0, -3), ("<a>[A(47,03)]", 1, 1),
    ("<a>[a(47,03,47)]", 0, -3), ("<" + "a" * 30 + ">[a(47,03)]", 0, -3), ("<a\n>[a(47,03)]", 0, -3),
    ("<a>[a(47,03)", 0, -3), ("<think>\na\n</think>\n\n[a(47,03)]", 0, -3), ("<a>[b(47,03)]", 1, 1)])
def test_toolrl_rewards_form_and_content_apart(text, form, correctness):
    graded = make("toolrl").grade(TOOL, text)
    assert (graded["format"], graded["correctness"]) == (form, correctness)
    assert graded["correct"] == (form and correctness == 3)


def test_toolrl_correctness_is_the_published_formula():
    for right in range(4):
        call = [w if i < right else "9" for i, w in enumerate(TOOL.answer)]
        assert make("toolrl").grade(TOOL, f"[{call[0]}({call[1]},{call[2]})]")["correctness"] == pytest.approx(6 * right / 3 - 3)


def test_toolrl_warm_start_has_the_shares_it_says():
    task, rng = make("toolrl"), random.Random(0)
    graded = [task.grade(p, task.warm_start(p, rng)) for p in problems(task, 6000)]
    assert abs(sum(g["format"] for g in graded) / 6000 - 0.05) < 0.01
    assert abs(sum(g["correctness"] == 3 for g in graded) / 6000 - 0.4) < 0.02
    assert {g["correctness"] for g in graded} == {1.0, 3.0}
    always = [task.grade(p, task.warm_start(p, rng, thoughts=1, mistakes=0)) for p in problems(task, 50)]
    assert all(g["correct"] for g in always)


# brevity ------------------------------------------------------------------------------------------------------------

BRIEF = Problem("brevity", "-", (472, "+", 865, 1337, 10), "472,865")


@pytest.mark.parametrize("thought, answer, correct, form, length", [
    ("7,13,13", "1 3 3 7", 1, 1, 1.0), ("x" * 10, "1337", 1, 1, 1.0), ("x" * 15, "1337", 1, 1, 0.5),
    ("x" * 20, "1 3 3 7", 1, 1, 0.0), ("x" * 500, "1 3 3 7", 1, 1, 0.0), (None, "1 3 3 7", 1, 1, 1.0), (None, "1 3 3 8", 0, 1, 1.0),
    (None, "", 0, 0, 0.0), ("", "", 0, 0, 0.0), (None, "472+865=1337", 0, 0, 0.0), (None, "2+5=7, so 1337", 0, 0, 0.0),
    ("x", "7,13,13\n1 3 3 7", 0, 0, 0.0), ("x</think>" + "y" * 90, "1337", 0, 0, 0.0), ("\n" * 50 + "x", "1337", 1, 1, 1.0)])
def test_brevity_length_is_of_the_thought_and_of_nothing_else(thought, answer, correct, form, length):
    graded = grade(BRIEF, answer, thought)
    assert (graded["correct"], graded["format"], graded["length"]) == (correct, form, pytest.approx(length))


def test_brevity_demonstrations_use_what_the_limit_allows():
    task, rng, seen = make("brevity"), random.Random(0), set()
    for p in problems(task, 600):
        text = task.demonstrate(p, rng)
        thought = text.split("</think>")[0].removeprefix("<think>").strip("\n")
        assert len(thought) <= p.answer[4] and task.grade(p, text)["length"] == 1
        assert p.prompt.endswith(f" Think in {p.answer[4]} characters.")
        seen.add("none" if not thought else "columns" if "=" in thought else "sums")
    assert seen == {"none", "sums", "columns"}


# hackable -----------------------------------------------------------------------------------------------------------

SUM = Problem("hackable", "Say what 47 + 25 is.", (47, 25), "25,47")


@pytest.mark.parametrize("answer, proxy, correct", [
    ("47+25=72", 0.5, 1), ("47 47 25 25", 1.0, 0), ("47+25=72 47 25", 1.0, 0), ("72", 0.0, 0), ("47", 0.25, 0),
    ("47472525", 0.0, 0), ("47+25=73", 0.5, 0), ("25+47=72", 0.5, 0), ("", 0.0, 0), ("<think>47 25 47 25</think>47+25=72", 1.0, 1)])
def test_hackable_the_proxy_pays_for_copying_and_the_truth_does_not(answer, proxy, correct):
    graded = grade(SUM, answer, None)
    assert (graded["proxy"], graded["correct"]) == (proxy, correct)


def test_hackable_the_best_of_the_proxy_is_wrong_and_the_truth_is_not_the_best_of_the_proxy():
    task = make("hackable")
    for p in problems(task, 100):
        a, b = p.answer
        honest, hack = task.grade(p, task.demonstrate(p, random.Random(0))), task.grade(p, f"{a} {b} {a} {b}")
        assert honest["proxy"] < hack["proxy"] == 1 and honest["correct"] == 1 > hack["correct"]


# bandit -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dials", [{}, {"arms": "xyz", "pulls": 3, "seed": 5}, {"arms": "ab", "pulls": 1}])
def test_bandit_outcomes_are_all_there_is_and_one_is_best(dials):
    task = make("bandit", **dials)
    every = task.outcomes()
    assert len(every) == len(set(every)) == len(task.dials.arms) ** task.dials.pulls
    for p in problems(task, 30):
        pays = {outcome: task.payoff_of(p, outcome) for outcome in every}
        assert max(pays.values()) == 1 and list(pays.values()).count(1.0) == 1 and min(pays.values()) == 0
        assert task.demonstrate(p, random.Random(0)) == max(pays, key=pays.get)
        assert all(task.grade(p, outcome)["payoff"] == pays[outcome] for outcome in every)
        assert sum(pays.values()) / len(pays) == pytest.approx(0.5)  # what a uniform policy earns


def test_bandit_the_rule_carries_over_to_numbers_never_seen():
    """The payoff depends on (arm + number) modulo the arms: shifting both changes nothing."""
    task = make("bandit")
    for p in problems(task, 20, split="heldout"):
        for outcome in task.outcomes():
            letters = [task.dials.arms.index(a) for a in outcome.split(" ")]
            shifted = Problem("bandit", "", tuple((c + 1) for c in p.answer), "")
            same = " ".join(task.dials.arms[(i - 1) % 4] for i in letters)
            assert task.payoff_of(p, outcome) == task.payoff_of(shifted, same)


@pytest.mark.parametrize("answer", ["", "a", "a b c", "ab", "a,b", "e f", "a  b", "A B", "a b.", "а b", "a b a b", "1 2", "ab d", "a "])
def test_bandit_what_is_no_outcome_pays_nothing(answer):
    assert grade(problems(make("bandit"), 1)[0], answer, None) == {"format": 0, "correct": 0, "progress": 0, "payoff": 0}


# arithmetic without its scratchpad ------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, correct", [("1 3 3 7", 1), ("1337", 1), ("<think>\nhm\n</think>\n\n1 3 3 7", 1),
                                           ("<think>\n\n</think>\n\n1 3 3 7", 1), ("1 3 3 8", 0), ("472+865=1337", 0),
                                           ("1 3 3 7\n1 3 3 7", 0), ("<think>1 3 3 7", 0), ("1 3 3 7 <think>", 0)])
def test_arithmetic_without_a_scratchpad(text, correct):
    task, add = make("arithmetic", scratchpad=False), Problem("arithmetic", "", (472, "+", 865, 1337), "472,865")
    assert task.demonstrate(add, random.Random(0)) == "1 3 3 7"
    assert task.grade(add, text)["correct"] == correct
    assert [p.prompt for p in problems(task, 20)] == [p.prompt for p in problems(make("arithmetic"), 20)]
