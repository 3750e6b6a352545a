"""`pellucid generate`: complete a prompt, or every line of a file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.cli.base import Positional, prepare
from pellucid.cli.failures import is_terminal
from pellucid.cli.running import RunsModel
from pellucid.errors import BadInput
from pellucid.events import Event, emit

if TYPE_CHECKING:
    from pellucid.engine.params import StructuredOutput


@dataclass(frozen=True)
class Generate(RunsModel):
    """Complete a prompt; or many at once, each line of a file, in the same batches. A single text appears as it is written.
    续写一个提示；或把文件的每一行作为提示，一起批量续写。只有一个文本时边写边显示。

    $ pellucid generate runs/grow/model "The function returns" --max-tokens 40
    $ pellucid generate Qwen/Qwen3-8B "The function returns" --quantize int8 --draft Qwen/Qwen3-0.6B
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    prompt: Positional[str | None] = None
    """The text to continue; or give --file, or pipe it in.
    要续写的文本；也可用 --file 或管道输入。"""
    file: Path | None = None
    """Prompts, one a line.
    每行一个提示的文件。"""
    max_tokens: int = 128
    """Most tokens to generate.
    最多生成的词元数。"""
    temperature: float = 0.0
    """0 is greedy.
    温度；0 为贪心。"""
    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of tokens that holds this probability.
    核采样的概率阈值。"""
    top_k: int | None = None
    """Keep the k most probable tokens.
    只保留概率最高的 k 个词元。"""
    min_p: float | None = None
    """Keep tokens with at least this share of the top token's probability.
    只保留概率不低于最高概率此比例的词元。"""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text holds already become less likely.
    大于 1 时降低已出现词元的概率。"""
    json_schema: Path | None = None
    """File with a JSON Schema: the answer is JSON that satisfies it.
    JSON Schema 文件：回答必为满足它的 JSON。"""
    regex: str | None = None
    """The answer matches this regular expression from beginning to end.
    回答从头到尾匹配此正则表达式。"""
    n: int = 1
    """Samples for each prompt.
    每个提示的采样数。"""
    stop: tuple[str, ...] = ()
    """Texts that end the answer.
    遇到这些文本即停止。"""
    chat: bool = False
    """Treat the prompt as a user's message and apply the chat template.
    把提示当作用户消息，套用聊天模板。"""


@dataclass
class Generated(Event):
    """One completion of a prompt: `index` counts the samples of the same prompt."""

    kind = "generated"
    prompt: str
    index: int
    text: str
    tokens: int
    finish_reason: str


def generate(config: Generate) -> None:
    from pellucid.engine import LLM, SamplingParams
    from pellucid.engine.config import EngineConfig

    prompts, form = _prompts(config), _form(config)
    prepare(config, seed=None)
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, n=config.n,
                            min_p=config.min_p, repetition_penalty=config.repetition_penalty, seed=config.seed, stop=config.stop,
                            structured=form)
    llm = LLM(config.model, config=EngineConfig(running=512, budget=2048, **config.proposing()), **config.opening())
    ids = [llm.chat_ids([{"role": "user", "content": p}]) if config.chat else llm.prompt_ids(p) for p in prompts]
    if len(ids) == config.n == 1 and not config.json:
        for chunk in llm.stream(ids[0], params):
            print(_shown(chunk.text), end="", flush=True)
        print()
        return
    for prompt, output in zip(prompts, llm.generate(ids, params)):
        for c in output.outputs:
            emit(Generated(prompt, c.index, c.text, len(c.token_ids), c.finish_reason))
            print(_shown(c.text))


def _form(config: Generate) -> StructuredOutput | None:
    """What the answer must be."""
    from pellucid.engine.params import StructuredOutput

    if config.json_schema is None and config.regex is None:
        return None
    schema = None
    if config.json_schema is not None:
        try:
            schema = config.json_schema.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read {config.json_schema}", str(error), "check the path given to --json-schema") from error
    return StructuredOutput(json_schema=schema, regex=config.regex)


def _shown(text: str) -> str:
    """For a terminal without what could steer it, for programs as it is."""
    from pellucid.cli.chat import harmless

    return harmless(text) if is_terminal(sys.stdout) else text


def _prompts(config: Generate) -> list[str]:
    if config.file is not None and config.prompt is not None:
        raise BadInput("both a prompt and --file were given", next="give one of them")
    if config.prompt is not None:
        return [config.prompt]
    if config.file is not None:
        if not config.file.is_file():
            raise BadInput(f"there is no file {config.file}", next="check the path given to --file")
        lines = config.file.read_text(encoding="utf-8", errors="replace").splitlines()
    elif not sys.stdin.isatty():
        lines = [sys.stdin.read()]
    else:
        lines = []
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise BadInput("there is no prompt", next='give one: pellucid generate MODEL "Once upon a time"')
    return lines
