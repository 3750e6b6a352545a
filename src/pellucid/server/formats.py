"""How model families write thoughts and tool calls: each family's format as data.

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

The readers are in json_calls.py (hermes, deepseek, llama-json, mistral, harmony), text_calls.py (qwen3-coder, deepseek-dsml) and
python_calls.py (pythonic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pellucid.server.calls import BlockReader, Piece, Reader
from pellucid.server.json_calls import deepseek, hermes, llama_json, mistral
from pellucid.server.python_calls import pythonic
from pellucid.server.text_calls import dsml, qwen3_coder


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


def parse_call(body: str) -> Piece | None:
    """`{"name": ..., "arguments": {...}}` as a tool_call; None when it is anything else."""
    found = BlockReader(hermes, {}).end(body)
    return found[0] if found else None


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
