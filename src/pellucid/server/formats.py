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

A reader gives None for what is no valid call: it stays text, word for word. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Schemas = dict[str, dict[str, Any]]  # a function's name -> JSON Schema of its parameters


@dataclass(frozen=True)
class Piece:
    """A bit of text, or one whole call (`text`: its arguments as JSON)."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    name: str = ""


@dataclass(frozen=True)
class Format:
    """blocks: texts that open and close a block of calls; one that nothing closes goes to the answer's end.
    read: what stands in a block -> its calls.  whole: False while a closing text belongs to an argument.
    bare: where tools were offered, an answer that begins with it is a call without an opening text.
    signs: a chat template that holds all of them writes this format."""

    name: str
    blocks: tuple[tuple[str, str | None], ...]
    read: Callable[[str, Schemas], list[Piece] | None]
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


# --- readers ------------------------------------------------------------------------------------------------------------


def call_of(name: Any, arguments: Any) -> Piece | None:
    """A call, if both can be those of one; arguments may be an object or its JSON."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Piece("tool_call", json.dumps(arguments, ensure_ascii=False, allow_nan=False), name)


def parse_call(body: str) -> Piece | None:
    """`{"name": ..., "arguments": {...}}` as a tool_call; None when it is anything else."""
    try:
        found: Any = json.loads(body)
        if not isinstance(found, dict) or set(found) - {"name", "arguments"}:
            return None
        return call_of(found.get("name"), found.get("arguments", {}))
    except (ValueError, RecursionError):
        return None


def hermes(body: str, schemas: Schemas) -> list[Piece] | None:
    call = parse_call(body)
    return None if call is None else [call]


def llama_json(body: str, schemas: Schemas) -> list[Piece] | None:
    """`{"name": ..., "parameters": {...}}`, several with `;` between."""
    cursor, calls = Cursor(body), []
    while cursor.left:
        found = cursor.json()
        if not isinstance(found, dict) or set(found) - {"name", "parameters", "arguments", "type"}:
            return None
        calls.append(call_of(found.get("name"), found.get("parameters", found.get("arguments"))))
        cursor.take(";")
    return None if None in calls or not calls else calls  # type: ignore[return-value]


def mistral(body: str, schemas: Schemas) -> list[Piece] | None:
    cursor, calls = Cursor(body), []
    if cursor.sees("["):
        found = cursor.json()
        if not isinstance(found, list) or cursor.left:
            return None
        calls = [call_of(c.get("name"), c.get("arguments")) if isinstance(c, dict) else None for c in found]
    else:
        while cursor.left:
            name = cursor.until("[ARGS]").partition("[CALL_ID]")[0].strip()
            calls.append(call_of(name, cursor.json()))
            cursor.take("[TOOL_CALLS]")
    return None if None in calls or not calls else calls  # type: ignore[return-value]


def deepseek(body: str, schemas: Schemas) -> list[Piece] | None:
    """V3 and R1: a type word, the name on a line, JSON in a fence. V3.1: the name, then JSON."""
    cursor, calls = Cursor(body), []
    while cursor.left:
        if not cursor.take("<｜tool▁call▁begin｜>"):
            return None
        name = cursor.until("<｜tool▁sep｜>").strip()
        if name == "function":
            name = cursor.until("\n").strip()
        fenced = cursor.take("```json")
        calls.append(call_of(name, cursor.json()))
        if (fenced and not cursor.take("```")) or not cursor.take("<｜tool▁call▁end｜>"):
            return None
    return None if None in calls or not calls else calls  # type: ignore[return-value]


def tagged(cursor: Cursor, opens: str, closes: str, end: str) -> list[tuple[str, str]]:
    """(head, value) of each `OPENS head>value CLOSES` up to `end`. A value may hold CLOSES: it ends where another begins, or all do."""
    found = []
    while not cursor.take(end):
        if not cursor.take(opens):
            raise ValueError("no parameter")
        head = cursor.until(">")
        value = cursor.until(closes)
        while not (cursor.sees(opens) or cursor.sees(end)):
            value += closes + cursor.until(closes)
        found.append((head, value))
    return found


def qwen3_coder(body: str, schemas: Schemas) -> list[Piece] | None:
    """Values are text: the schema says what they mean. One line break at each end is not part of a value."""
    cursor, calls = Cursor(body), []
    while cursor.left:
        if not cursor.take("<function="):
            return None
        name = cursor.until(">").strip()
        properties = schemas.get(name, {}).get("properties", {})
        arguments = {key: typed(value.removeprefix("\n").removesuffix("\n"), properties.get(key))
                     for key, value in tagged(cursor, "<parameter=", "</parameter>", "</function>")}
        calls.append(call_of(name, arguments))
    return None if None in calls or not calls else calls  # type: ignore[return-value]


def typed(text: str, schema: Any) -> Any:
    """A value by its schema: text where it may be text, otherwise JSON; text too where it is no JSON."""
    options = [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])] if isinstance(schema, dict) else []
    words = [o.get("type") for o in options if isinstance(o, dict)]
    types = {t for word in words for t in (word if isinstance(word, list) else [word]) if t}
    if not types or ("string" in types and not (text == "null" and "null" in types)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def dsml(body: str, schemas: Schemas) -> list[Piece] | None:
    """`string="false"`: the value is JSON."""
    cursor, calls = Cursor(body), []
    while cursor.left:
        if not cursor.take('<｜DSML｜invoke name="'):
            return None
        name = cursor.until('">')
        arguments = {}
        for head, value in tagged(cursor, '<｜DSML｜parameter name="', "</｜DSML｜parameter>", "</｜DSML｜invoke>"):
            key, _, kind = head.partition('" string="')
            if kind not in ('true"', 'false"'):
                return None
            arguments[key] = value if kind == 'true"' else json.loads(value)
        calls.append(call_of(name, arguments))
    return None if None in calls or not calls else calls  # type: ignore[return-value]


def pythonic(body: str, schemas: Schemas) -> list[Piece] | None:
    """A Python list of calls with keywords and literals. It is read by its words: Python's own parser can be broken by deep nesting."""
    words = Words(body)
    words.take("[")
    calls = []
    while True:
        name = words.name()
        words.take("(")
        arguments = {}
        while not words.sees(")"):
            key = words.name()
            words.take("=")
            arguments[key] = words.value()
            if not words.sees(")"):
                words.take(",")
        words.take(")")
        calls.append(call_of(name, arguments))
        if words.sees("]"):
            words.take("]")
            return None if words.left or None in calls else calls  # type: ignore[return-value]
        words.take(",")


WORD = re.compile(r"""\s*(?: (?P<text> \'\'\'.*?\'\'\' | \"{3}.*?\"{3} | '(?:\\.|[^'\\\n])*' | "(?:\\.|[^"\\\n])*" )
    | (?P<number> -?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)? ) | (?P<name> [^\W\d]\w*(?:\.[^\W\d]\w*)* ) | (?P<sign> [\[\](){},:=] ) )""", re.VERBOSE | re.DOTALL)
CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class Words:
    """Python's literals, word by word, nested at most 64 deep. ValueError where something else stands."""

    def __init__(self, text: str):
        self.words: list[tuple[str, str]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = WORD.match(text, at)
            if found is None or found.lastgroup is None:
                raise ValueError("no literal")
            self.words.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        self.at = 0

    @property
    def left(self) -> bool:
        return self.at < len(self.words)

    def sees(self, sign: str) -> bool:
        return self.left and self.words[self.at] == ("sign", sign)

    def take(self, sign: str) -> None:
        if not self.sees(sign):
            raise ValueError(f"no {sign}")
        self.at += 1

    def next(self) -> tuple[str, str]:
        if not self.left:
            raise ValueError("the text ends")
        self.at += 1
        return self.words[self.at - 1]

    def name(self) -> str:
        kind, word = self.next()
        if kind != "name":
            raise ValueError("no name")
        return word

    def value(self, depth: int = 0) -> Any:
        kind, word = self.next()
        if kind == "text":
            return ast.literal_eval(word)
        if kind == "number":
            return float(word) if set(word) & set(".eE") else int(word)
        if kind == "name" and word in CONSTANTS:
            return CONSTANTS[word]
        if kind != "sign" or word not in "[({" or depth == 64:
            raise ValueError("no value")
        return self._table(depth + 1) if word == "{" else self._list("]" if word == "[" else ")", depth + 1)

    def _list(self, end: str, depth: int) -> list[Any]:
        values = []
        while not self.sees(end):
            values.append(self.value(depth))
            if not self.sees(end):
                self.take(",")
        self.take(end)
        return values

    def _table(self, depth: int) -> dict[str, Any]:
        table = {}
        while not self.sees("}"):
            key = self.value(depth)
            self.take(":")
            table[str(key)] = self.value(depth)
            if not self.sees("}"):
                self.take(",")
        self.take("}")
        return table


class Cursor:
    """A place in a text that only moves on; white space before what is looked for does not count. ValueError where it is not there."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    @property
    def left(self) -> bool:
        self._skip()
        return self.at < len(self.text)

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def sees(self, word: str) -> bool:
        at = self.at
        self._skip()
        found = self.text.startswith(word, self.at)
        self.at = at
        return found

    def take(self, word: str) -> bool:
        if not self.sees(word):
            return False
        self._skip()
        self.at += len(word)
        return True

    def until(self, word: str) -> str:
        """The text before `word`; the cursor stands behind it then."""
        end = self.text.index(word, self.at)
        text, self.at = self.text[self.at : end], end + len(word)
        return text

    def json(self) -> Any:
        self._skip()
        value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        return value


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


def read_block(form: Format, body: str, schemas: Schemas) -> list[Piece] | None:
    """The calls of a block, None where it is no valid one: whatever a model writes, nothing is raised."""
    try:
        return form.read(body, schemas)
    except (ValueError, SyntaxError, RecursionError, MemoryError, AttributeError, TypeError):
        return None
