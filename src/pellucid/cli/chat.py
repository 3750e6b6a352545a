"""`pellucid chat`: talk to a model in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pellucid.cli.base import Positional, prepare
from pellucid.cli.failures import coloured, is_terminal, told
from pellucid.cli.running import RunsModel
from pellucid.errors import BadInput
from pellucid.events import Event, emit

if TYPE_CHECKING:
    from pellucid.engine import LLM, SamplingParams
    from pellucid.server.calls import Piece
    from pellucid.tasks import Tool

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CALLS_IN_A_ROW = 4


@dataclass(frozen=True)
class Chat(RunsModel):
    """A conversation in the terminal: answers appear as they are written, thoughts are dimmed. /clear begins again,
    /exit ends, Ctrl-C stops an answer. Without a terminal: one answer for each line of stdin, without its thought.
    在终端里对话：回答边写边显示，思考部分变暗。/clear 重新开始，/exit 退出，Ctrl-C 停止当前回答。
    非终端时每行输入给出一个回答（不含思考）。

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
    tell: bool = False
    """Describe the tool in the prompt; models grown here know it by heart.
    在提示中描述工具；此处培育的模型无需描述。"""
    forget: bool = False
    """Answer each message by itself, without the earlier ones.
    每条消息单独回答，不带历史。"""


@dataclass
class Turn(Event):
    """One answer in a conversation, with the results of the tools that it called."""

    kind = "turn"
    prompt: str
    content: str
    reasoning: str
    calls: list[dict[str, Any]]
    tokens: int
    seconds: float
    finish_reason: str  # stop | length | cancelled


@dataclass
class Part:
    """What the terminal shows next: a piece of a thought or an answer, or a call with its result."""

    kind: Literal["reasoning", "content", "tool"]
    text: str


@dataclass
class Conversation:
    """The messages so far; `ask` adds the next two (and those of the tools called in between)."""

    llm: LLM
    params: SamplingParams
    tools: dict[str, Tool] = field(default_factory=dict)
    system: str | None = None
    tell: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    forgotten: int = 0

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Iterator[Part]:
        """The answer in parts. Closing the iterator ends it; what was said until then stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        turn = Turn(text, "", "", [], 0, 0.0, "cancelled")
        began = time.perf_counter()
        try:
            for _ in range(CALLS_IN_A_ROW):
                calls = []
                for piece in self._answer(turn):
                    if piece.kind == "tool_call":
                        calls.append(piece)
                    else:
                        yield Part(piece.kind, piece.text)
                if not calls or not self.tools:
                    yield from (Part("content", f"{c.name} {c.text}") for c in calls)
                    return
                for piece in calls:
                    yield self._run(piece, turn)
        finally:
            turn.seconds = time.perf_counter() - began
            emit(turn)

    def _answer(self, turn: Turn) -> Iterator[Piece]:
        """One answer of the model, added to the messages even when it is cut off."""
        from pellucid.server.formats import format_of
        from pellucid.server.parser import AnswerParser

        ids, params = self._prompt()
        tokenizer = self.llm.tokenizer
        form = format_of(" ".join(tokenizer.source.templates.values()))
        schemas = {name: t.schema.get("function", {}).get("parameters", {}) for name, t in self.tools.items()}
        opened = tokenizer.decode(ids[-8:]).rstrip().endswith(form.think[0])  # some templates open the thought themselves
        parser, pieces = AnswerParser(opened, form=form, schemas=schemas), []
        stream = self.llm.stream(ids, params)
        try:
            for chunk in stream:
                turn.tokens += len(chunk.token_ids)
                turn.finish_reason = chunk.finish_reason or "cancelled"
                new = parser.feed(chunk.text) + (parser.finish() if chunk.finish_reason else [])
                pieces += new
                yield from new
        finally:
            stream.close()  # type: ignore[attr-defined]
            content, turn.reasoning = ("".join(p.text for p in pieces if p.kind == k) for k in ("content", "reasoning"))
            turn.content = content
            calls = [{"type": "function", "function": {"name": p.name, "arguments": p.text}} for p in pieces if p.kind == "tool_call"]
            self.messages.append({"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})})

    def _run(self, call: Piece, turn: Turn) -> Part:
        try:
            result = self.tools[call.name].run(**json.loads(call.text)) if call.name in self.tools else f"error: no tool {call.name!r}"
        except (TypeError, ValueError) as error:  # arguments of other names or types: the model can read why
            result = f"error: {error}"
        self.messages.append({"role": "tool", "content": result})
        turn.calls.append({"name": call.name, "arguments": call.text, "result": result})
        return Part("tool", f"{call.name} {call.text} = {result}")

    def _prompt(self) -> tuple[list[int], SamplingParams]:
        """The ids, and params that fit behind them. The oldest exchanges are forgotten where the context is too short."""
        from dataclasses import replace

        schemas = [t.schema for t in self.tools.values()] if self.tell and self.tools else None
        context = self.llm.context
        while True:
            ids = self.llm.chat_ids(self.messages, tools=schemas)
            room = context - len(ids)
            first = 1 if self.system else 0
            questions = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i > first]
            if room >= min(self.params.max_tokens, context // 4) or not questions:
                break
            del self.messages[first : questions[0]]
            self.forgotten += 1
        if room < 1:
            last = next(i for i in range(len(self.messages) - 1, -1, -1) if self.messages[i]["role"] == "user")
            del self.messages[last:]
            raise BadInput(f"the message is too long: {len(ids)} tokens for a context of {context}", next="say it in fewer words")
        return ids, replace(self.params, max_tokens=min(self.params.max_tokens, room))


def chat(config: Chat) -> None:
    from pellucid.engine import LLM, SamplingParams
    from pellucid.engine.config import EngineConfig
    from pellucid.tasks import TOOLS

    prepare(config, seed=None)
    params = SamplingParams(config.max_tokens, config.temperature, top_p=config.top_p, seed=config.seed)
    tools = {str(config.tool): TOOLS[config.tool]} if config.tool else {}
    llm = LLM(config.model, config=EngineConfig(budget=2048, **config.proposing()), **config.opening())
    talk = Conversation(llm, params, tools, config.system, config.tell)
    for line in lines(sys.stdin):
        if line == "/exit":
            return
        if line == "/clear" or config.forget:
            talk.clear()
        if line and line != "/clear":
            answer(talk, line)


def lines(stdin: TextIO) -> Iterator[str]:
    """What the person types; ends at Ctrl-D. Ctrl-C gives a fresh line."""
    if not stdin.isatty():
        yield from (line.strip() for line in stdin)
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in `input`)
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print("\n/exit", file=sys.stderr)
        except EOFError:
            print()
            return


def answer(talk: Conversation, line: str) -> None:
    """Show one answer. On a terminal Ctrl-C ends the answer, not the program, and so does a message that does not fit."""
    interactive = is_terminal(sys.stdout)
    parts = talk.ask(line)
    try:
        show(parts, sys.stdout, interactive)
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(f"{PLAIN} ...")
    except BadInput as error:
        if not interactive:
            raise
        print(f"{error.what} ({told(error).next})", file=sys.stderr)
    finally:
        parts.close()  # type: ignore[attr-defined]


def show(parts: Iterable[Part], out: TextIO, interactive: bool) -> None:
    """On a terminal thoughts and tool calls too, dimmed, each kind on lines of its own; elsewhere the answer alone."""
    dim, plain = (DIM, PLAIN) if coloured(out) else ("", "")
    last, ended = "", True
    for part in parts:
        if part.kind != "content" and not interactive:
            continue
        if last and (part.kind != last or last == "tool"):
            out.write("\n" if not ended else "")
        text = harmless(part.text) if interactive else part.text
        out.write(text if part.kind == "content" else f"{dim}{text}{plain}")
        out.flush()
        last, ended = part.kind, text.endswith("\n")
    out.write("" if last and ended else "\n")
    out.flush()


def harmless(text: str) -> str:
    """Without the control characters with which a text could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000" else "\ufffd" for c in text)
