"""Every family's format of thoughts and calls: what a reader would say, and the same however the stream is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answer_parser import merged

from pellucid.server.calls import Piece
from pellucid.server.formats import FORMATS, format_of
from pellucid.server.parser import AnswerParser, parse_answer
from pellucid.server.tape import DEEPEST, Tape
from pellucid.server.text_calls import typed

SCHEMAS = {"f": {"type": "object", "properties": {
    "a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": ["array", "null"]}, "d": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "e": {"type": "boolean"}}}, "g.h": {"type": "object", "properties": {}}}
DS = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
FENCED = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
BARE = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
DSML = "<｜DSML｜{0}>\n<｜DSML｜invoke name=\"f\">\n{1}</｜DSML｜invoke>\n</｜DSML｜{0}>"
PARAMETER = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>\n'
CODER = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"

F1 = ("f", {"a": 1})
CASES = [  # format, text, reasoning, content, calls
    ("hermes", '<tool_call>{"name": "f", "arguments": {"b": "say </tool_call> \\"so\\""}}</tool_call>', "", "", [("f", {"b": 'say </tool_call> "so"'})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', "", '<tool_call>{"name": "f", "arguments": {"a": 1}', []),
    ("qwen3-coder", "<think>\nx\n</think>\n\n" + CODER.format("<parameter=a>\n1\n</parameter>\n<parameter=b>\n 7\n\n</parameter>\n"), "x", "",
     [("f", {"a": 1, "b": " 7\n"})]),
    ("qwen3-coder", CODER.format("<parameter=b>\n</tool_call> </parameter> x\n</parameter>\n"), "", "", [("f", {"b": "</tool_call> </parameter> x"})]),
    ("qwen3-coder", CODER.format("<parameter=c>\n[1, {}]\n</parameter>\n<parameter=d>\nnull\n</parameter>\n<parameter=e>\ntrue\n</parameter>\n<parameter=z>\n1\n</parameter>\n"),
     "", "", [("f", {"c": [1, {}], "d": None, "e": True, "z": "1"})]),
    ("qwen3-coder", CODER.format("") + "\n" + CODER.format("<parameter=a>\n1\n</parameter>\n"), "", "", [("f", {}), F1]),
    ("qwen3-coder", "<tool_call>nothing</tool_call>", "", "<tool_call>nothing</tool_call>", []),
    ("deepseek", "Let me see." + DS.format(FENCED.format('{"a": 1}') + "\n" + FENCED.format('{"b": "``` <｜tool▁call▁end｜>"}')), "", "Let me see.",
     [F1, ("f", {"b": "``` <｜tool▁call▁end｜>"})]),
    ("deepseek", "<think>\nwhy\n</think>\n" + DS.format(BARE.format('{"a": 1}') + BARE.format("{}")), "why", "", [F1, ("f", {})]),
    ("deepseek", DS.format(BARE.format("{a}")), "", DS.format(BARE.format("{a}")), []),
    ("deepseek-dsml", DSML.format("function_calls", PARAMETER.format("a", "false", "1") + PARAMETER.format("b", "true", "1")), "", "", [("f", {"a": 1, "b": "1"})]),
    ("deepseek-dsml", DSML.format("tool_calls", PARAMETER.format("b", "true", "</｜DSML｜tool_calls>")), "", "", [("f", {"b": "</｜DSML｜tool_calls>"})]),
    ("deepseek-dsml", DSML.format("tool_calls", PARAMETER.format("a", "perhaps", "1")), "", DSML.format("tool_calls", PARAMETER.format("a", "perhaps", "1")), []),
    ("llama-json", '{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {}}', "", "", [F1, ("f", {})]),
    ("llama-json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", "", [F1]),
    ("llama-json", '{"name": "f"} is what I would say', "", '{"name": "f"} is what I would say', []),
    ("llama-json", 'I say {"name": "f", "parameters": {}}', "", 'I say {"name": "f", "parameters": {}}', []),
    ("pythonic", '[f(a=1, b="x"), g.h(c=[1, None, {"k": True}])]', "", "", [("f", {"a": 1, "b": "x"}), ("g.h", {"c": [1, None, {"k": True}]})]),
    ("pythonic", "<|python_start|>[f(a=-1)]<|python_end|>", "", "", [("f", {"a": -1})]),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>[f(a=2)]", "", "[f(a=2)]", [F1]),
    ("pythonic", "[f(a=open('x'))]", "", "[f(a=open('x'))]", []),
    ("pythonic", "[f(1)]", "", "[f(1)]", []),
    ("pythonic", "[(lambda: 1)(a=1)]", "", "[(lambda: 1)(a=1)]", []),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "f", "arguments": {}}]', "", "", [F1, ("f", {})]),
    ("mistral", 'So: [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"b": "[TOOL_CALLS]"}', "", "So:", [F1, ("f", {"b": "[TOOL_CALLS]"})]),
    ("mistral", "[THINK]hm[/THINK]yes", "hm", "yes", []),
    ("mistral", "[TOOL_CALLS]f{", "", "[TOOL_CALLS]f{", []),
    ("mistral", "[TOOL_CALLS]f[ARGS]{\"a\": NaN}", "", "[TOOL_CALLS]f[ARGS]{\"a\": NaN}", []),
    ("pythonic", "[f(a=1e999)]", "", "[f(a=1e999)]", []),
    ("harmony", "<|channel|>analysis<|message|>Need a tool.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>",
     "Need a tool.", "", [F1]),
    ("harmony", " to=functions.f<|channel|>commentary json<|message|>{\"a\": 1}", "", "", [F1]),
    ("harmony", "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary<|message|>First. <|end|><|start|>assistant<|channel|>final<|message|>Second.<|return|>",
     "x", "First. Second.", []),
    ("harmony", "no format at all, " * 30, "", "no format at all, " * 30, []),
    ("harmony", "short", "", "short", []),
    ("harmony", "<|channel|>commentary to=functions.f<|message|>{broken", "", "<|channel|>commentary to=functions.f<|message|>{broken", []),
]


def parsed(form: str, text: str, edges: list[int] | None = None) -> list[Piece]:
    parser = AnswerParser(form=FORMATS[form], schemas=SCHEMAS)
    cuts = sorted({0, len(text), *(e for e in edges or [] if e < len(text))})
    return [p for a, b in itertools.pairwise(cuts) for p in parser.feed(text[a:b])] + parser.finish()


@pytest.mark.parametrize(("form", "text", "reasoning", "content", "calls"), CASES)
def test_what_a_reader_would_say(form: str, text: str, reasoning: str, content: str, calls: list[tuple[str, dict]]):
    found = parse_answer(text, form=FORMATS[form], schemas=SCHEMAS)
    assert found[:2] == (reasoning, content)
    assert [(p.name, json.loads(p.text)) for p in found[2]] == calls


@pytest.mark.parametrize(("form", "text"), [case[:2] for case in CASES])
def test_cut_at_every_character_and_at_each_one(form: str, text: str):
    whole = merged(parsed(form, text))
    assert merged(parsed(form, text, list(range(len(text))))) == whole
    for at in range(1, len(text)):
        assert merged(parsed(form, text, [at])) == whole, at


MARKS = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>", "<think>", "</think>", "<｜tool▁calls▁begin｜>",
         "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>",
         '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|end|>",
         "<|start|>assistant", "<|call|>", "analysis", "final", "commentary", " to=functions.f", "f", '{"name": "f", "parameters": {}}', '{"a": 1}', "[f(a=1)]",
         '"', "\\", "{", "[", ";", " ", "\n", "```json\n", "```", "x", "é", "<", "stop", "st", *(case[1] for case in CASES[:30])]


@settings(max_examples=400, deadline=None)
@given(form=st.sampled_from(sorted(FORMATS)), text=st.lists(st.sampled_from(MARKS), max_size=10).map("".join), cuts=st.lists(st.integers(0, 300), max_size=12),
       stops=st.lists(st.sampled_from(["stop", "}", "\n"]), max_size=2), thinking=st.booleans())
def test_any_cut_gives_the_same(form: str, text: str, cuts: list[int], stops: list[str], thinking: bool):
    def run(edges: list[int]) -> tuple[list[tuple[str, str, str]], bool]:
        parser = AnswerParser(thinking, True, stops, form=FORMATS[form], schemas=SCHEMAS)
        pieces = [p for a, b in itertools.pairwise(edges) for p in parser.feed(text[a:b])] + parser.finish()
        assert not any(s in "".join(p.text for p in pieces if p.kind == "content") for s in stops)
        return merged(pieces), parser.stopped

    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    assert run(edges) == run([0, len(text)]) == run(list(range(len(text) + 1)))


@settings(max_examples=200, deadline=None)
@given(form=st.sampled_from(sorted(FORMATS)), value=st.text(max_size=30))
def test_any_text_comes_through_as_an_argument(form: str, value: str):
    """Marks, quotes and line breaks inside an argument are part of it. (Texts that hold the format's own inner marks are left out
    where it has no escape for them.)"""
    as_json = json.dumps({"b": value}, ensure_ascii=False)
    text = {"hermes": f'<tool_call>{{"name": "f", "arguments": {as_json}}}</tool_call>', "qwen3-coder": CODER.format(f"<parameter=b>\n{value}\n</parameter>\n"),
            "deepseek": DS.format(FENCED.format(as_json)), "deepseek-dsml": DSML.format("tool_calls", PARAMETER.format("b", "true", value)),
            "llama-json": f'{{"name": "f", "parameters": {as_json}}}', "pythonic": f"[f(b={value!r})]", "mistral": f"[TOOL_CALLS]f[ARGS]{as_json}",
            "harmony": f"<|channel|>commentary to=functions.f<|message|>{as_json}"}[form]
    (call,) = parsed(form, text)
    assert (call.kind, call.name, json.loads(call.text)) == ("tool_call", "f", {"b": value})


def test_a_bare_call_needs_tools_that_were_offered():
    text = '{"name": "f", "parameters": {}}'
    assert parse_answer(text, form=FORMATS["llama-json"]) == ("", text, [])
    assert len(parse_answer(text, form=FORMATS["llama-json"], schemas=SCHEMAS)[2]) == 1


@pytest.mark.parametrize(("template", "name"), [
    ("{% if tools %}<tool_call>{{ '{' }}\"name\"", "hermes"), ("<tool_call>\n<function=example>", "qwen3-coder"), ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<｜DSML｜function_calls>", "deepseek-dsml"), ("[TOOL_CALLS]", "mistral"), ('<|start_header_id|> {"name": x, "parameters": y}', "llama-json"),
    ("<|start|>assistant<|channel|>final<|message|>", "harmony"), ("{{ messages }}", "hermes")])
def test_the_format_of_a_template(template: str, name: str):
    assert format_of(template).name == name


@pytest.mark.parametrize(("text", "schema", "value"), [
    ("1", {"type": "integer"}, 1), ("1", {"type": "string"}, "1"), ("1", None, "1"), ("1", {}, "1"), ("null", {"type": ["string", "null"]}, None),
    ("True", {"type": "boolean"}, True), ("nope", {"type": "number"}, "nope"), ('{"a": 1}', {"type": "object"}, {"a": 1}), ("[" * 100_000, {"type": "array"}, "[" * 100_000)])
def test_values_by_their_schema(text: str, schema: dict | None, value: object):
    assert typed(text, schema) == value


def test_deep_nesting_and_huge_bodies_are_text():
    for form, body in (("hermes", "<tool_call>" + "[" * 50_000 + "</tool_call>"), ("pythonic", "[" * 50_000), ("llama-json", "{" * 50_000),
                       ("mistral", "[TOOL_CALLS]" + "[" * 50_000), ("pythonic", "[f(a=" + "-" * 20_000 + "1)]")):
        assert parse_answer(body, form=FORMATS[form], schemas=SCHEMAS) == ("", body, [])


# --- calls while they are written ----------------------------------------------------------------------------------------


def joined(pieces: list[Piece]) -> tuple[list[tuple[str, str, str]], int]:
    """Live pieces as whole ones, in the order in which calls end; how many calls were lost. A call's arguments are what was told of them."""
    out: list[Piece] = []
    calls: list[list[str]] = []  # of each that began: its name, and what was told
    open_: list[int] = []
    lost = 0
    for p in pieces:
        assert p.part != "whole" or p.kind != "tool_call"
        if p.kind != "tool_call":
            assert not open_, "nothing is said between the pieces of a call"
            out.append(p)
        elif p.part == "begin":
            open_.append(len(calls))
            calls.append([p.name, ""])
        elif p.part == "more":
            assert p.text and open_[-1] == len(calls) - 1, "only the newest call goes on"
            calls[-1][1] += p.text
        elif p.part == "lost":
            open_.pop(0)
            lost += 1
        else:
            name, told = calls[open_.pop(0)]
            assert (p.name, p.text) == (name, told)
            out.append(Piece("tool_call", told, name))
    assert not open_, "every call ends, or is lost"
    return merged(out), lost


def live(form: str, text: str, edges: list[int], thinking: bool = False, stops: list[str] | None = None) -> list[Piece]:
    parser = AnswerParser(thinking, True, stops or [], form=FORMATS[form], schemas=SCHEMAS, live=True)
    return [p for a, b in itertools.pairwise(edges) for p in parser.feed(text[a:b])] + parser.finish()


@pytest.mark.parametrize(("form", "text"), [case[:2] for case in CASES])
def test_live_calls_joined_are_the_plain_ones_at_every_cut(form: str, text: str):
    plain = merged(parsed(form, text))
    for edges in ([0, len(text)], list(range(len(text) + 1)), *([0, at, len(text)] for at in range(1, len(text)))):
        assert joined(live(form, text, edges))[0] == plain, edges


@settings(max_examples=600, deadline=None)
@given(form=st.sampled_from(sorted(FORMATS)), text=st.lists(st.sampled_from(MARKS), max_size=10).map("".join), cuts=st.lists(st.integers(0, 300), max_size=12),
       stops=st.lists(st.sampled_from(["stop", "}", "\n"]), max_size=2), thinking=st.booleans(), end=st.integers(0, 400))
def test_live_calls_of_any_text_cut_off_anywhere(form: str, text: str, cuts: list[int], stops: list[str], thinking: bool, end: int):
    text = text[:end] if end % 3 else text
    plain = AnswerParser(thinking, True, stops, form=FORMATS[form], schemas=SCHEMAS)
    want = merged(plain.feed(text) + plain.finish())
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for how in (edges, list(range(len(text) + 1))):
        assert joined(live(form, text, how, thinking, stops))[0] == want


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(value=st.dictionaries(st.text(max_size=8), VALUES, max_size=4), ascii_only=st.booleans(), indent=st.sampled_from([None, 2]), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_json_arguments_come_letter_by_letter_as_they_are_written(value: dict, ascii_only: bool, indent: int | None, cuts: list[int]):
    """Whatever JSON it is, in each format that holds JSON; and of an answer cut off behind `n` characters, the beginning has been told."""
    written = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    texts = {"hermes": f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>', "deepseek": DS.format(FENCED.replace("{}", "%s") % written),
             "llama-json": f'{{"name": "f", "parameters": {written}}}', "mistral": f"[TOOL_CALLS]f[ARGS]{written}",
             "harmony": f"<|channel|>commentary to=functions.f<|message|>{written}<|call|>"}
    if "<|" in written:  # marks that end a message are tokens of their own, which no argument holds
        del texts["harmony"]
    for form, text in texts.items():
        edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
        (call,), lost = joined(live(form, text, edges))
        assert call == ("tool_call", written, "f") and json.loads(call[1]) == value and not lost
        begins = text.index(written)
        parser = AnswerParser(form=FORMATS[form], schemas=SCHEMAS, live=True)
        half = begins + len(written) // 2
        told = "".join(p.text for c in text[:half] for p in parser.feed(c) if p.part == "more")
        held = len(text[begins:half]) - len(told)
        assert text[begins:half].startswith(told) and held <= 25, "no more is held back than a number"


def test_a_long_string_is_told_at_once_where_it_stands():
    """As it comes, also where values are text: what a user sees while code is written into a file."""
    code = "def f():\n    return [1, 2]\n" * 5
    for form, text in (("qwen3-coder", CODER.format(f"<parameter=b>\n{code}\n</parameter>\n")), ("deepseek-dsml", DSML.format("tool_calls", PARAMETER.format("b", "true", code))),
                       ("hermes", f'<tool_call>{{"name": "f", "arguments": {json.dumps({"b": code})}}}</tool_call>')):
        pieces = live(form, text, list(range(len(text) + 1)))
        assert sum(p.part == "more" for p in pieces) > 0.9 * len(code), form
        ((_, told, _),), lost = joined(pieces)
        assert json.loads(told) == {"b": code} and not lost


def test_what_is_told_and_then_broken():
    """It cannot be taken back: the call is said to be lost, and all that was written follows as text, as without `live`."""
    for form, text in (("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1, oh'), ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "more": 2}</tool_call>'),
                       ("llama-json", '{"name": "f", "parameters": {"a": 1}} I think'), ("mistral", "[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]f[ARGS]{\"a\"")):
        found, lost = joined(live(form, text, list(range(len(text) + 1))))
        assert found == [("content", text, "")] == merged(parsed(form, text)) and lost == text.count("arguments") + text.count("parameters") + text.count("ARGS")


def read(text: str, cuts: int = 1) -> str:
    tape, told = Tape(), []
    steps = tape.json(told.append)
    try:
        for end in range(0, len(text) + 1, cuts):
            tape.text, tape.limit = text[:end], end
            next(steps)
        tape.text, tape.limit, tape.ended = text, len(text), True
        next(steps)
    except StopIteration as done:
        assert "".join(told) == done.value
        return done.value
    raise AssertionError("it waits for more behind the end")


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(VALUES.map(json.dumps), st.lists(st.sampled_from([*'{}[],:"\\', "true", "nul", "1", "-", "0", ".5", "e3", " ", "\n", "\\u00e9", "\\u12", "\t", '"a"']),
                                                       max_size=8).map("".join)), cuts=st.integers(1, 4))
def test_the_tape_reads_json_as_python_does(text: str, cuts: int):
    """Its grammar is the library's, less the numbers that are none; letter by letter or in pieces."""
    try:
        value, end = json.JSONDecoder(parse_constant=lambda name: 1 / 0).raw_decode(text.lstrip(" \t\r\n"))
        want = text.lstrip(" \t\r\n")[:end]
    except (ValueError, ZeroDivisionError):
        want = None
    try:
        found = read(text, cuts)
    except ValueError:
        found = None
    if want is None or (want[-1].isdigit() and found is None):
        assert found is None  # behind a number Python stops where a tape may not: at "1-", "1e"
    else:
        assert found == want and json.loads(found) == value


def test_the_tape_refuses_what_is_not_there():
    for steps in (Tape("abc", ended=True).until("x"), Tape("", ended=True).json(), Tape("[" * 300, ended=True).json(), Tape("x", ended=True).string(),
                  Tape("ab", ended=True).need("abc")):
        with pytest.raises(ValueError):
            next(steps)
    waiting = Tape("ab").need("abc")
    next(waiting)


def test_the_tape_bears_values_of_a_certain_depth():
    for opens, closes in ("[]", ("{\"a\":", "}")):
        for depth in (1, DEEPEST):
            text = opens * depth + ("1" if opens != "[" else "") + closes * depth
            with pytest.raises(StopIteration) as whole:
                next(Tape(text, ended=True).json())
            assert whole.value.value == text
        with pytest.raises(ValueError, match="too deeply"):
            next(Tape(opens * (DEEPEST + 1), ended=True).json())
