"""Rule-based rewards: against trl's own where it has them, and by hand."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from pellucid.align.checkers import (
    CHECKERS,
    exact,
    json_valid,
    matches,
    math,
    overlong,
    part_of,
    repetition,
    think,
    within,
)
from pellucid.errors import BadInput


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("longest, margin", [(100, 20), (100, 100), (7, 3)])
def test_soft_overlong_is_trls(longest, margin):
    ids = [[1] * n for n in range(0, 140)]
    assert overlong(longest, margin)(completion_ids=ids) == pytest.approx(get_soft_overlong_punishment(longest, margin)(completion_ids=ids))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5), st.integers(1, 4))
def test_repetition_is_trls(ids, ngram):
    assert repetition(ngram)(completion_ids=ids) == pytest.approx(get_repetition_penalty_reward(ngram)(completion_ids=ids))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", " ", "<", "think>"]), max_size=6).map("".join))
def test_think_is_trls(text):
    assert think()(completions=chat(text)) == think_format_reward(completions=chat(text))


@pytest.mark.parametrize("text, whole, thought, answer", [
    ("<think>\na\n</think>\n\nb", "<think>\na\n</think>\n\nb", "a", "b"), ("b", "b", "", "b"), ("a</think>b", "a</think>b", "a", "b"),
    ("<think>a", "<think>a", "", "<think>a"), ("<think>a</think>b</think>c", "<think>a</think>b</think>c", "a</think>b", "c"), ("", "", "", "")])
def test_parts(text, whole, thought, answer):
    for content in (text, chat(text)[0]):
        assert (part_of(content, "whole"), part_of(content, "thought"), part_of(content, "answer")) == (whole, thought, answer)


def test_matches():
    check = matches(r"<think>.+</think>\s*\d+")
    assert check(completions=["<think>a\nb</think> 42", "<think>a</think> 42!", "42", "x<think>a</think>4"]) == [1, 0, 0, 0]
    assert matches(r"\d+", part="answer")(completions=["<think>9x</think> 42 ", "<think>4</think> x"]) == [1, 0]
    with pytest.raises(BadInput, match="no regular expression"):
        matches("(")


def test_a_pattern_that_backtracks_is_given_up():
    start = time.monotonic()
    assert matches(r"(a+)+b", seconds=0.05)(completions=["a" * 4000, "aab"]) == [0, 1]
    assert time.monotonic() - start < 1


def test_exact():
    assert exact()(completions=["<think>x</think>\n 4  2 ", "4 2.", "42"], answer=["4 2", "4 2", 42]) == [1, 0, 1]
    assert exact(case=False)(completions=["YES", "no"], answer=["yes", None]) == [1, None]
    assert exact("gold", part="whole")(completions=["a</think>b"], gold=["b"]) == [0]


def test_math():
    solutions = [r"\boxed{\frac{1}{2}}", "so 3+4=7\n#### 7", "12", None, "", "x^2-1"]
    right = [r"<think>1/3? no: \boxed{9}</think> It is \boxed{0.5}", "The answer is 7.", "#### 12", "1", "2", r"\boxed{(x-1)(x+1)}"]
    assert math()(completions=chat(*right), answer=solutions) == [1, 1, 1, None, None, 1]
    wrong = [r"<think>\boxed{0.5}</think> dunno", "The answer is 7 or 8", r"\boxed{12} \boxed{13}", "1", "2", r"\boxed{x^2+1}"]
    assert math()(completions=chat(*wrong), answer=solutions) == [0, 0, 0, None, None, 0]


def test_json():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    texts = ['{"a": 1}', '<think>{}</think>{"a": 1}', '{"a": "1"}', "{}", '{"a": 1} x', "```json\n{}\n```", '{"a": NaN}', '{"a": 1, "a": 1}', "[" * 10**5, ""]
    assert json_valid()(completions=texts) == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert json_valid(schema)(completions=texts) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0] == json_valid(json.dumps(schema))(completions=texts)
    assert json_valid(column="form")(completions=['{"a": 1}', '{"a": "1"}', "{}"], form=[schema, json.dumps(schema), None]) == [1, 0, None]
    with pytest.raises(BadInput, match="did you mean 'type'"):
        json_valid({"typ": "object"})


def test_within():
    ids = [[1] * n for n in (0, 10, 15, 20, 30)]
    assert within(10)(completions=[""] * 5, completion_ids=ids) == [1, 1, 0.5, 0, 0]
    assert within(4, part="thought")(completions=["<think>abcdef</think>x", "a very long answer"]) == [0.5, 1]
    assert within(4)(completions=["a"]) == [None]


@pytest.mark.parametrize("make", [lambda: overlong(10, 0), lambda: overlong(10, 11), lambda: within(0), lambda: repetition(0), lambda: repetition(2, 1.0)])
def test_impossible_settings(make):
    with pytest.raises(BadInput):
        make()


@pytest.mark.parametrize("name", CHECKERS)
def test_checkers_never_raise_on_what_a_model_may_write(name):
    make = {"matches": lambda: matches(".*a"), "overlong": lambda: overlong(8, 4), "within": lambda: within(5)}.get(name, CHECKERS[name])
    texts = ["", " ", "\x00", "\ud800", "<think>", "</think>" * 5, "{" * 5000, "\\boxed{" * 500, "１", "a" * 10**5, "-" * 10**4, "\n" * 10**4]
    columns = {"completions": texts, "completion_ids": [[1, 2]] * len(texts), "answer": texts}
    check = make()
    import inspect
    taken = {k: v for k, v in columns.items() if k in inspect.signature(check).parameters}
    start = time.process_time()
    values = check(**taken)
    assert len(values) == len(texts) and all(v is None or -1 <= v <= 1 for v in values) and time.process_time() - start < 2
