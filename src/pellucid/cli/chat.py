"""`pellucid chat`: talk to a model in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pellucid.cli.base import Common, Positional, prepare
from pellucid.cli.failures import is_terminal

if TYPE_CHECKING:
    from pellucid.engine import LLM, SamplingParams

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CALLS_IN_A_ROW = 4


@dataclass(frozen=True)
class Chat(Common):
    """A conversation in the terminal: answers appear as they are written, thoughts are dimmed. /clear begins again,
    /exit ends, Ctrl-C stops an answer. Without a terminal: one answer for each line of stdin.
    在终端里对话：回答边写边显示，思考部分变暗。/clear 重新开始，/exit 退出，Ctrl-C 停止当前回答。非终端时每行输入给出一个回答。

    $ pellucid chat runs/grow/model --tool calculator
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    max_tokens: int = 512
    """Longest answer.
    最长回答。"""
    temperature: float = 0.0
    """0 is greedy.
    温度；0 为贪心。"""
    top_p: float | None = None
    """Nucleus sampling.
    核采样的概率阈值。"""
    system: str | None = None
    """System message.
    系统消息。"""
    tool: Literal["calculator"] | None = None
    """Run this tool when the model calls it, and let it go on with the result.
    模型调用时运行此工具，并让它带着结果继续。"""
    forget: bool = False
    """Answer each message by itself, without the earlier ones.
    每条消息单独回答，不带历史。"""


def chat(config: Chat) -> None:
    from pellucid.engine import LLM, SamplingParams

    device = prepare(config, seed=None)
    llm = LLM(config.model, device=str(device))
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages: list[dict[str, Any]] = list(opening)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/clear" or config.forget:
            messages = list(opening)
        if not line or line == "/clear":
            continue
        messages.append({"role": "user", "content": line})
        for _ in range(CALLS_IN_A_ROW):
            ids = llm.chat_ids(messages)
            room = max(1, min(config.max_tokens, llm.context - len(ids)))
            params = SamplingParams(max_tokens=room, temperature=config.temperature, top_p=config.top_p, seed=config.seed)
            text = answer(llm, ids, params)
            messages.append({"role": "assistant", "content": text.split("</think>")[-1].lstrip("\n")})
            result = run_tool(text) if config.tool else None
            if result is None:
                break
            print(f"{DIM if is_terminal(sys.stdout) else ''}= {result}{PLAIN if is_terminal(sys.stdout) else ''}")
            messages.append({"role": "tool", "content": result})


def _lines() -> Iterator[str]:
    """What the person types; ends at Ctrl-D."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def answer(llm: LLM, ids: list[int], params: SamplingParams) -> str:
    """Prints the answer as it comes, its thought dimmed; returns the whole text. Ctrl-C ends the answer, not the program."""
    colour = is_terminal(sys.stdout)
    text, dimmed = "", False
    try:
        for chunk in llm.stream(ids, params):
            text += chunk.text
            thinking = "<think>" in text and "</think>" not in text
            if colour and thinking != dimmed:
                print(DIM if thinking else PLAIN, end="")
                dimmed = thinking
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        text += " ..."
        print(" ...", end="")
    print(PLAIN if dimmed else "")
    return text


def run_tool(text: str) -> str | None:
    """The result of the tool call that `text` ends with; None where it holds none."""
    from pellucid.tasks import TOOLS

    if "<tool_call>" not in text:
        return None
    body = text.split("<tool_call>")[-1].split("</tool_call>")[0]
    try:
        call = json.loads(body)
        name, arguments = call["name"], call["arguments"]
        return TOOLS[name].run(**arguments) if name in TOOLS else f"error: no tool {name!r}"
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {type(error).__name__}: {error}"
