"""The parser of answers: any cut of the text gives what the whole text gives, and that is what a reader would say."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.server.parser import AnswerParser, Piece, parse_answer, parse_call, unfinished

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+2"}}\n</tool_call>'
ARGUMENTS = '{"expression": "1+2"}'


def merged(pieces: list[Piece]) -> list[tuple[str, str, str]]:
    """Neighbours of the same kind joined."""
    out: list[tuple[str, str, str]] = []
    for p in pieces:
        assert p.part == "whole"
        if out and out[-1][0] == p.kind != "tool_call":
            out[-1] = (p.kind, out[-1][1] + p.text, "")
        else:
            out.append((p.kind, p.text, p.name))
    return out


@pytest.mark.parametrize(("text", "reasoning", "content", "calls"), [
    ("Hello", "", "Hello", 0),
    ("  Hello ", "", "  Hello ", 0),
    ("", "", "", 0),
    ("<think>\nwhy not\n</think>\n\nHello\n", "why not", "Hello\n", 0),
    ("\n<think>a</think>b", "a", "b", 0),
    ("<think>\n\n</think>\n\nHello", "", "Hello", 0),
    ("<think>never closed <tool_call>", "never closed <tool_call>", "", 0),
    ("<think>a</think>b</think>c<think>d", "a", "b</think>c<think>d", 0),
    ("so <think>late</think>", "", "so <think>late</think>", 0),
    (CALL, "", "", 1),
    (f"<think>\nadd\n</think>\n\n{CALL}", "add", "", 1),
    (f"Let me see. \n\n{CALL}\n{CALL}", "", "Let me see.", 2),
    (f"{CALL} and then", "", "and then", 1),
    ("x <tool_call>{broken}</tool_call> y", "", "x <tool_call>{broken}</tool_call> y", 0),
    ("x <tool_call>{\"name\": \"f\"", "", "x <tool_call>{\"name\": \"f\"", 0),
    ("a <tool_ca", "", "a <tool_ca", 0),
    ("<thi", "", "<thi", 0),
    ("1 < 2 <t 3", "", "1 < 2 <t 3", 0),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", 1),
])
def test_by_hand(text: str, reasoning: str, content: str, calls: int):
    found = parse_answer(text)
    assert found[:2] == (reasoning, content) and len(found[2]) == calls
    assert all(p.name in ("calculator", "f") and isinstance(json.loads(p.text), dict) for p in found[2])


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, " ", "\n", "a", "bc", "<", "stop", "st",
                                  "END", "é", "😀", '{"name": "f", "arguments": {}}', "</", ">"]), max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=PARTS, cuts=st.lists(st.integers(0, 200), max_size=20), thinking=st.booleans(), tools=st.booleans(),
       stops=st.lists(st.sampled_from(["stop", "END", "\n", "a", "bcst"]), max_size=2))
def test_any_cut_gives_the_same(text: str, cuts: list[int], thinking: bool, tools: bool, stops: list[str]):
    whole = AnswerParser(thinking, tools, stops)
    expected = whole.feed(text) + whole.finish()
    parser = AnswerParser(thinking, tools, stops)
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [p for a, b in itertools.pairwise(edges) for p in parser.feed(text[a:b])] + parser.finish()
    assert merged(pieces) == merged(expected) and parser.stopped == whole.stopped
    content = "".join(p.text for p in pieces if p.kind == "content")
    assert not any(s in content for s in stops)


@settings(max_examples=200, deadline=None)
@given(text=PARTS)
def test_nothing_is_lost_or_invented(text: str):
    """All that is not white space comes out once, tags and calls aside."""
    reasoning, content, calls = parse_answer(text)
    given_out = reasoning + content + "".join(c.name + c.text for c in calls)
    strip = str.maketrans("", "", " \n")
    left = text.translate(strip)
    for c in given_out.translate(strip):
        assert c in left
    if "<" not in text:
        assert content == text


def test_text_comes_out_at_once_and_tags_are_held_back():
    parser = AnswerParser()
    assert parser.feed("Hel") == [Piece("content", "Hel")]
    assert parser.feed("lo <") == [Piece("content", "lo")]
    assert parser.feed("tool") == []
    assert parser.feed("s>") == [Piece("content", " <tools>")]
    assert parser.feed(f" {CALL[:30]}") == []
    assert parser.feed(CALL[30:]) == [Piece("tool_call", ARGUMENTS, "calculator")]
    assert parser.finish() == []


def test_a_prompt_that_opens_the_thought():
    assert parse_answer("\nsum\n</think>\n\n3", thinking=True)[:2] == ("sum", "3")
    assert parse_answer("no end", thinking=True)[:2] == ("no end", "")


def test_without_tools_a_call_is_text():
    assert parse_answer(f"a {CALL}", tools=False) == ("", f"a {CALL}", [])


def test_stop_texts_end_the_content_only():
    parser = AnswerParser(stops=["END", "\n\n"])
    assert parser.feed("<think>END\n\n</think>one E") == [Piece("reasoning", "END"), Piece("content", "one ")]
    assert parser.feed("N") == [] and not parser.stopped
    assert parser.feed("D two") == [] and parser.stopped
    assert parser.feed("three") == [] and parser.finish() == []


@pytest.mark.parametrize("body", ['{"name": "f", "name": "g", "arguments": {}}', '{"name": "f", "arguments": {}, "arguments": {}}', "[]", "1", "{}", '{"name": ""}', '{"name": 3}', '{"name": "f", "arguments": []}', "nul",
                                  '{"name": "f", "arguments": "no json"}', '{"name": "f", "more": 1}', "[" * 100_000])
def test_what_is_no_call(body: str):
    assert parse_call(body) is None


def test_call_in_any_script():
    assert parse_call('{"name": "查", "arguments": {"城": "北京"}}') == Piece("tool_call", '{"城": "北京"}', "查")
    assert parse_call('{"name": "f"}') == Piece("tool_call", "{}", "f")


@pytest.mark.parametrize(("text", "length"), [("ab<", 1), ("<tool_call", 10), ("<tool_call>", 0), ("", 0), ("<<", 1), ("<tool<", 1)])
def test_unfinished(text: str, length: int):
    assert unfinished(text, ["<tool_call>"]) == length
