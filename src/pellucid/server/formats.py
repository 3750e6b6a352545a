"""How model families write thoughts and tool calls: each family's format as data, with a reader of what stands in a block.

| name          | a call                                                                          |
|---------------|---------------------------------------------------------------------------------|
| hermes        | <tool_call>{"name": ..., "arguments": {...}}</tool_call>      (Qwen 2.5, Qwen3) |
| qwen3-coder   | <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call> |
| deepseek      | <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>...    V3, R1 (fenced JSON) and V3.1   |
| deepseek-dsml | <｜DSML｜function_calls><｜DSML｜invoke name="F">...              V3.2 and V4     |
| llama-json    | {"name": ..., "parameters": {...}}; ...                         Llama 3.1, 3.2  |
| pythonic      | [f(a=1), g(b="x")]                                              Llama 4         |
| mistral       | [TOOL_CALLS][{...}, ...]  or  [TOOL_CALLS]NAME[ARGS]{...}                       |
| harmony       | <|channel|>commentary to=functions.NAME <|message|>{...}        gpt-oss         |

A reader follows the text as it is written (server/tape.py) and tells of a call what has become certain. Where the arguments are JSON
in their place they are passed on letter by letter; where they must be made of text (qwen3-coder, deepseek-dsml), texts are, and other
values one by one when they are whole; pythonic arguments one by one. What is no valid call stays text, word for word. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pellucid.server.tape import Reading, Tape

Schemas = dict[str, dict[str, Any]]  # a function's name -> JSON Schema of its parameters


@dataclass(frozen=True)
class Piece:
    """A bit of text, or a call.  name, text: its function, and its arguments as JSON.

    part: "whole", or of a call that is told as it is written: "begin" (its name), "more" (what its arguments go on with), "end" (the name
    and all arguments), "lost" (the oldest one that has not ended is none after all; what the model wrote follows as content).
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    name: str = ""
    part: Literal["whole", "begin", "more", "end", "lost"] = "whole"


class Calls:
    """Where a reader puts what it finds.  found: whole calls.  said: what has become certain of them since it was last emptied."""

    def __init__(self) -> None:
        self.found: list[Piece] = []
        self.said: list[Piece] = []
        self._name = ""
        self._text: list[str] = []

    def begin(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError("no name")
        name.encode()  # a half of a surrogate pair can be sent to nobody
        self._name, self._text = name, []
        self.said.append(Piece("tool_call", "", name, "begin"))

    def more(self, text: str) -> None:
        text.encode()
        self._text.append(text)
        self.said.append(Piece("tool_call", text, self._name, "more"))

    def end(self) -> None:
        text = "".join(self._text)
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        json.dumps(arguments, allow_nan=False)  # numbers beyond those of JSON
        self.found.append(Piece("tool_call", text, self._name))

    def whole(self, name: Any, arguments: Any) -> None:
        """Arguments that were no JSON in their place."""
        self.begin(name)
        self.more(as_json(arguments))
        self.end()


Reader = Callable[[Tape, Calls, Schemas], Reading[None]]


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Format:
    """blocks: texts that open and close a block of calls; one that nothing closes goes to the answer's end.
    read: what stands in a block -> its calls.  whole: False while a closing text belongs to an argument.
    bare: where tools were offered, an answer that begins with it is a call without an opening text.
    signs: a chat template that holds all of them writes this format."""

    name: str
    blocks: tuple[tuple[str, str | None], ...]
    read: Reader
    signs: tuple[str, ...]
    whole: Callable[[str], bool] = lambda body: True
    bare: str = ""
    think: tuple[str, str] = ("<think>", "</think>")
    channels: bool = False

    @property
    def markers(self) -> str:
        """All texts that mean something; special tokens that are none of them are not shown."""
        inner = "<｜tool▁call▁begin｜><｜tool▁call▁end｜><｜tool▁sep｜>[ARGS][CALL_ID]"
        return " ".join([*(text or "" for block in self.blocks for text in block), *self.think, inner, HARMONY_MARKERS if self.channels else ""])


HARMONY_MARKERS = "<|start|><|channel|><|constrain|><|message|><|end|><|call|><|return|>"
FAULTS = (ValueError, SyntaxError, RecursionError, MemoryError, AttributeError, TypeError)
"""What reading may end with, whatever a model writes."""


class BlockReader:
    """A block of calls as it is written: `feed` it the text from the block's beginning, then `end` it."""

    def __init__(self, read: Reader, schemas: Schemas):
        self.tape, self.calls = Tape(), Calls()
        self._steps, self._open = read(self.tape, self.calls, schemas), True
        self.broken = False
        self._begun = 0  # calls whose beginning has been said

    def feed(self, text: str, limit: int) -> list[Piece]:
        """text: all of it so far, of which `limit` characters are certain to be the block's. What has become certain of its calls."""
        said = self._go_on(text, limit)
        self._begun += sum(p.part == "begin" for p in said)
        return said

    def _go_on(self, text: str, limit: int) -> list[Piece]:
        self.tape.text, self.tape.limit = text, limit
        if self._open:
            try:
                next(self._steps)
            except StopIteration:
                self._open = False
            except FAULTS:
                self._open, self.broken = False, True
        said, self.calls.said = self.calls.said, []
        return said

    def end(self, text: str, live: bool = False) -> list[Piece] | None:
        """Its calls, or with `live` what had not been said of them; None where it is no valid block: it stays text."""
        self.tape.ended = True
        said = self._go_on(text, len(text))
        if self.broken or self._open or not self.calls.found:
            return None
        return [*said, *(replace(call, part="end") for call in self.calls.found)] if live else self.calls.found

    def lost(self) -> list[Piece]:
        """To be told where calls had begun and `end` gave none."""
        return [Piece("tool_call", "", "", "lost")] * self._begun


def read_block(form: Format, body: str, schemas: Schemas) -> list[Piece] | None:
    """The calls of a block, None where it is no valid one: whatever a model writes, nothing is raised."""
    return BlockReader(form.read, schemas).end(body)


def parse_call(body: str) -> Piece | None:
    """`{"name": ..., "arguments": {...}}` as a tool_call; None when it is anything else."""
    found = BlockReader(hermes, {}).end(body)
    return found[0] if found else None


# --- readers: JSON where it stands --------------------------------------------------------------------------------------


def arguments(tape: Tape, calls: Calls, name: Any) -> Reading[None]:
    """An object, told as it comes; or, as some models write it, a string that holds its JSON."""
    if (yield from tape.sees("{")):
        calls.begin(name)
        yield from tape.json(calls.more)
        calls.end()
    else:
        inner = json.loads((yield from tape.json()))
        if not isinstance(inner, str):
            raise ValueError("arguments are an object")
        calls.whole(name, json.loads(inner))


def call_object(tape: Tape, calls: Calls, keys: tuple[str, ...], known: set[str] | None = None, default: str | None = None) -> Reading[None]:
    """`{"name": ..., KEY: {...}}` in any order.  keys: those that may hold the arguments.  known: no others may be there."""
    yield from tape.need("{")
    name, held, seen = None, default, set[str]()
    told = False
    while not (yield from tape.take("}")):
        if seen:
            yield from tape.need(",")
        key = yield from tape.string()
        yield from tape.need(":")
        if key in seen or (key in keys and seen & set(keys)) or (known is not None and key not in known):
            raise ValueError(f"{key} cannot stand here")
        seen.add(key)
        if key == "name":
            name = json.loads((yield from tape.json()))
        elif key in keys and name is not None:
            yield from arguments(tape, calls, name)
            told = True
        elif key in keys:
            held = yield from tape.json()
        else:
            yield from tape.json()
    if not told:
        yield from arguments(Tape(held or "", ended=True), calls, name)


def call_list(tape: Tape, calls: Calls, keys: tuple[str, ...]) -> Reading[None]:
    """`[{...}, {...}]`"""
    yield from tape.need("[")
    while True:
        yield from call_object(tape, calls, keys)
        if not (yield from tape.take(",")):
            break
    yield from tape.need("]")
    yield from at_end(tape)


def at_end(tape: Tape) -> Reading[None]:
    if (yield from tape.left()):
        raise ValueError("something follows")


def hermes(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from call_object(tape, calls, ("arguments",), {"name", "arguments"}, "{}")
    yield from at_end(tape)


def llama_json(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """`{"name": ..., "parameters": {...}}`, several with `;` between."""
    while (yield from tape.left()):
        yield from call_object(tape, calls, ("parameters", "arguments"), {"name", "parameters", "arguments", "type"})
        yield from tape.take(";")


def mistral(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    if (yield from tape.sees("[")):
        yield from call_list(tape, calls, ("arguments",))
        return
    while (yield from tape.left()):
        name = (yield from tape.until("[ARGS]")).partition("[CALL_ID]")[0].strip()
        yield from arguments(tape, calls, name)
        yield from tape.take("[TOOL_CALLS]")


def deepseek(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """V3 and R1: a type word, the name on a line, JSON in a fence. V3.1: the name, then JSON."""
    while (yield from tape.left()):
        yield from tape.need("<｜tool▁call▁begin｜>")
        name = (yield from tape.until("<｜tool▁sep｜>")).strip()
        if name == "function":
            name = (yield from tape.until("\n")).strip()
        fenced = yield from tape.take("```json")
        yield from arguments(tape, calls, name)
        if fenced:
            yield from tape.need("```")
        yield from tape.need("<｜tool▁call▁end｜>")


def forced(name: str) -> Reader:
    """An answer whose form the server has fixed: the arguments of the tool `name`, or a list of {"name", "parameters"}."""
    def read(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
        if not name:
            yield from call_list(tape, calls, ("parameters",))
            return
        yield from arguments(tape, calls, name)
        yield from at_end(tape)

    return read


# --- readers: arguments one by one, as text -----------------------------------------------------------------------------


def tagged(tape: Tape, calls: Calls, opens: str, closes: str, end: str, kind: Callable[[str], tuple[str, Callable[[str], Any] | None]],
           trim: bool) -> Reading[None]:
    """`OPENS head>value CLOSES` up to `end`. A value may hold CLOSES: it ends where another begins, or all do.

    kind: head -> the argument's name, and what makes its value of the text; None: it is the text itself, and is told as it comes.
    trim: a line break at each end is not part of a value.
    """
    before = "{"
    while not (yield from tape.take(end)):
        yield from tape.need(opens)
        key, convert = kind((yield from tape.until(">")))
        calls.more(f"{before}{as_json(key)}: ")
        text = Spoken(calls.more if convert is None else None, trim)
        yield from tape.until(closes, text.add)
        while not ((yield from tape.sees(opens)) or (yield from tape.sees(end))):
            text.add(closes)
            yield from tape.until(closes, text.add)
        text.finish()
        if convert is not None:
            calls.more(as_json(convert(text.all)))
        before = ", "
    calls.more("{}" if before == "{" else "}")
    calls.end()


class Spoken:
    """A text in pieces, told as the inside of a JSON string."""

    def __init__(self, tell: Callable[[str], None] | None, trim: bool):
        self.tell, self.trim = tell, trim
        self.all, self._held, self._begun = "", "", False
        if tell is not None:
            tell('"')

    def add(self, text: str) -> None:
        if not text:
            return
        if self.trim and not self._begun:
            text = text.removeprefix("\n")
        self._begun = True
        text = self._held + text
        self._held = "\n" if self.trim and text.endswith("\n") else ""  # the last one is not part of the value
        self._say(text.removesuffix(self._held))

    def _say(self, text: str) -> None:
        if self.tell is None:
            self.all += text
        elif text:
            self.tell(as_json(text)[1:-1])

    def finish(self) -> None:
        if self.tell is not None:
            self.tell('"')


def qwen3_coder(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """Values are text: the schema says what they mean. One line break at each end is not part of a value."""
    while (yield from tape.left()):
        yield from tape.need("<function=")
        name = (yield from tape.until(">")).strip()
        properties = schemas.get(name, {}).get("properties", {})

        def kind(key: str, properties: dict[str, Any] = properties) -> tuple[str, Callable[[str], Any] | None]:
            schema = properties.get(key)
            return key, None if is_text(schema) else lambda text: typed(text, schema)

        calls.begin(name)
        yield from tagged(tape, calls, "<parameter=", "</parameter>", "</function>", kind, trim=True)


def types_of(schema: Any) -> set[str]:
    options = [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])] if isinstance(schema, dict) else []
    words = [o.get("type") for o in options if isinstance(o, dict)]
    return {t for word in words for t in (word if isinstance(word, list) else [word]) if t}


def is_text(schema: Any) -> bool:
    """Whether every text is a value."""
    types = types_of(schema)
    return not types or ("string" in types and "null" not in types)


def typed(text: str, schema: Any) -> Any:
    """A value by its schema: text where it may be text, otherwise JSON; text too where it is no JSON."""
    types = types_of(schema)
    if not types or ("string" in types and not (text == "null" and "null" in types)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def dsml(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """`string="false"`: the value is JSON."""
    def kind(head: str) -> tuple[str, Callable[[str], Any] | None]:
        key, _, word = head.partition('" string="')
        if word not in ('true"', 'false"'):
            raise ValueError("no kind")
        return key, None if word == 'true"' else json.loads

    while (yield from tape.left()):
        yield from tape.need('<｜DSML｜invoke name="')
        calls.begin((yield from tape.until('">')))
        yield from tagged(tape, calls, '<｜DSML｜parameter name="', "</｜DSML｜parameter>", "</｜DSML｜invoke>", kind, trim=False)


def pythonic(tape: Tape, calls: Calls, schemas: Schemas) -> Reading[None]:
    """A Python list of calls with keywords and literals. It is read by its words: Python's own parser can be broken by deep nesting."""
    words = Words(tape)
    yield from tape.need("[")
    while True:
        calls.begin((yield from words.name()))
        yield from tape.need("(")
        before = "{"
        while not (yield from tape.take(")")):
            key = yield from words.name()
            yield from tape.need("=")
            value = yield from words.value()
            calls.more(f"{before}{as_json(key)}: {as_json(value)}")
            before = ", "
            if not (yield from tape.sees(")")):
                yield from tape.need(",")
        calls.more("{}" if before == "{" else "}")
        calls.end()
        if (yield from tape.take("]")):
            yield from at_end(tape)
            return
        yield from tape.need(",")


WORD = re.compile(r"""(?P<text> \'\'\'.*?\'\'\' | \"{3}.*?\"{3} | '(?:\\.|[^'\\\n])*' | "(?:\\.|[^"\\\n])*" )
    | (?P<number> -?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)? ) | (?P<name> [^\W\d]\w*(?:\.[^\W\d]\w*)* )""", re.VERBOSE | re.DOTALL)
RUN = re.compile(r"[\w.+-]*")
CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class Words:
    """Python's literals, word by word, nested at most 64 deep. ValueError where something else stands."""

    def __init__(self, tape: Tape):
        self.tape = tape

    def next(self) -> Reading[tuple[str, str]]:
        """(text | number | name, the word)"""
        tape = self.tape
        if not (yield from tape.left()):
            raise ValueError("the text ends")
        while tape.text[tape.at].isspace():
            tape.at += 1
        while True:
            found = WORD.match(tape.text, tape.at, tape.limit)
            if not self._may_go_on(found):
                break
            yield from tape.more()
        if found is None or found.lastgroup is None:
            raise ValueError("no literal")
        tape.at = found.end()
        return found.lastgroup, found[found.lastgroup]

    def _may_go_on(self, found: re.Match[str] | None) -> bool:
        """Whether more text could make another word of this one."""
        tape = self.tape
        if tape.ended:
            return False
        quote = tape.text[tape.at]
        if quote not in "'\"":
            run = RUN.match(tape.text, tape.at, tape.limit)
            return run is not None and run.end() == tape.limit
        head = tape.text[tape.at : min(tape.limit, tape.at + 3)]
        if head == quote * 3:
            return found is None or len(found[0]) < 6
        return found is None or head == quote * 2

    def name(self) -> Reading[str]:
        kind, word = yield from self.next()
        if kind != "name":
            raise ValueError("no name")
        return word

    def value(self, depth: int = 0) -> Reading[Any]:
        if depth > 64:
            raise ValueError("nested too deeply")
        for opens, closes in ("[]", "()"):
            if (yield from self.tape.take(opens)):
                return (yield from self._list(closes, depth + 1))
        if (yield from self.tape.take("{")):
            return (yield from self._table(depth + 1))
        kind, word = yield from self.next()
        if kind == "text":
            return ast.literal_eval(word)
        if kind == "number":
            return float(word) if set(word) & set(".eE") else int(word)
        if word not in CONSTANTS:
            raise ValueError("no value")
        return CONSTANTS[word]

    def _list(self, closes: str, depth: int) -> Reading[list[Any]]:
        values: list[Any] = []
        while not (yield from self.tape.take(closes)):
            values.append((yield from self.value(depth)))
            if not (yield from self.tape.sees(closes)):
                yield from self.tape.need(",")
        return values

    def _table(self, depth: int) -> Reading[dict[str, Any]]:
        table: dict[str, Any] = {}
        while not (yield from self.tape.take("}")):
            key = yield from self.value(depth)
            yield from self.tape.need(":")
            table[str(key)] = yield from self.value(depth)
            if not (yield from self.tape.sees("}")):
                yield from self.tape.need(",")
        return table


def outside_text(body: str) -> bool:
    """Whether JSON that is cut off here is not inside a string."""
    inside, escaped = False, False
    for c in body:
        if escaped:
            escaped = False
        elif c == "\\" and inside:
            escaped = True
        elif c == '"':
            inside = not inside
    return not inside


def behind(word: str, opens: str) -> Callable[[str], bool]:
    """A block is whole behind `word`, or where it does not hold what it should."""
    return lambda body: body.rstrip().endswith(word) or opens not in body


HERMES = Format("hermes", (("<tool_call>", "</tool_call>"),), hermes, ("<tool_call>",), outside_text)
FORMATS = {f.name: f for f in (  # the first whose signs a template holds
    Format("harmony", (), hermes, ("<|channel|>", "<|message|>"), channels=True),
    Format("qwen3-coder", (("<tool_call>", "</tool_call>"),), qwen3_coder, ("<tool_call>", "<function="), behind("</function>", "<function=")),
    HERMES,
    Format("deepseek-dsml", tuple((f"<｜DSML｜{w}>", f"</｜DSML｜{w}>") for w in ("function_calls", "tool_calls")), dsml, ("｜DSML｜",),
           behind("</｜DSML｜invoke>", "<｜DSML｜invoke")),
    Format("deepseek", (("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),), deepseek, ("<｜tool▁calls▁begin｜>",), outside_text),
    Format("mistral", (("[TOOL_CALLS]", None),), mistral, ("[TOOL_CALLS]",), think=("[THINK]", "[/THINK]")),
    Format("pythonic", (("<|python_start|>", "<|python_end|>"),), pythonic, ("<|python_start|>",), bare="["),
    Format("llama-json", (("<|python_tag|>", None),), llama_json, ("<|start_header_id|>", '"parameters"'), bare="{"),
)}


def format_of(template: str) -> Format:
    """The format that a chat template writes; hermes where it shows none."""
    return next((f for f in FORMATS.values() if all(sign in template for sign in f.signs)), HERMES)
