"""From a typed dataclass to a command: flags and help from its fields, the event stream to people or to programs.

A verb is a function with one annotated parameter; its annotation is the dataclass of its options (see `Common`).
A field's docstring is its help: lines with Chinese characters are the Chinese help, the others the English one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional

from pellucid import events, messages, runtime
from pellucid.cli import processes, usage
from pellucid.cli.failures import did_you_mean
from pellucid.errors import BadInput

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
__all__ = ["Common", "OpensModel", "Positional", "prepare", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every verb."""

    json: bool = False
    """Print the event stream, one JSON object a line, and nothing else on stdout.
    在标准输出上只逐行打印 JSON 事件。"""
    quiet: bool = False
    """Show no progress: results and errors only.
    不显示进度，只给出结果与错误。"""
    lang: Literal["zh", "en"] | None = None
    """Language of the texts for people; by default that of the locale.
    文字的语言；默认取自系统区域设置。"""
    seed: int | None = None
    """Seed of every random draw; by default 0 where work is measured, a new one each time in chat and generate.
    所有随机数的种子；训练与评测默认为 0，对话与生成每次不同。"""
    threads: int | None = None
    """CPU threads; by default all the cores that this process may use.
    CPU 线程数；默认用尽本进程可用的核心。"""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU where there is one.
    cpu、cuda 或 auto（有 GPU 就用 GPU）。"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpensModel(Common):
    """Options of every verb that opens a checkpoint."""

    allow_missing: bool = False
    """Go on when weights are missing from the checkpoint, or some are left over: missing ones are random, and both are named.
    检查点缺少或多出权重时仍继续：缺少的随机初始化，并逐一列出。"""


def run(config_class: type[T], function: Callable[[T], int | None], argv: list[str], verb: str) -> int:
    """Parse `argv`, connect the event stream to what `--json`, `--quiet` and the terminal ask for, call `function`.

    Returns the exit code: what `function` returns, None meaning 0. Raises what it raises.
    """
    if "-h" in argv or "--help" in argv:
        print(usage.page(config_class, verb))
        return 0
    config: Any = parse(config_class, argv, verb)
    messages.set_language(config.lang)
    if getattr(config, "processes", 1) > 1 and not getattr(config, "dry_run", False) and not processes.started_by_others():
        return processes.start([*verb.split(), *argv], config.processes)
    with shown(json_lines=config.json, quiet=config.quiet):
        return function(config) or 0


def config_class_of(function: Callable[..., Any]) -> type:
    """The dataclass that annotates the first parameter of a verb's function."""
    hints = typing.get_type_hints(function)
    return next(hint for name, hint in hints.items() if name != "return")


def parse(config_class: type[T], argv: list[str], verb: str) -> T:
    """`argv` as an instance of the dataclass.  BadInput names the option that is nearest to a misspelt one.

    What stands in a place of its own may be given by its name as well (`MODEL` or `--model MODEL`), and a list in pieces
    (`--reward a --reward b` is `--reward a b`); `ALIASES` of the class are other names of its options.
    """
    import tyro

    argv = gathered(config_class, argv)
    config_class = by_name(config_class, argv)
    known = ["--help", *usage.flags(config_class)]
    for word in argv:
        if word == "--":
            break
        name = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and name not in known:
            raise BadInput(messages.say("error.option", verb=verb, option=word.split("=")[0]),
                           next=did_you_mean(name, known) or messages.say("error.see", verb=verb))
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            return tyro.cli(config_class, prog=f"pellucid {verb}", args=argv, config=(FlagCreatePairsOff,))
    except SystemExit as refused:
        why = _refusal(heard.getvalue())
        if why.startswith("Missing from"):  # tyro names the type of what is missing; people know it by its name
            needed = [o.name for o in usage.options(config_class) if o.default is dataclasses.MISSING]
            why = messages.say("error.required", names=" ".join(needed))
        raise BadInput(messages.say("error.argument", verb=verb), why, messages.say("error.see", verb=verb)) from refused


def gathered(config_class: type, argv: list[str]) -> list[str]:
    """Aliases by their proper names, and the values of a repeated list behind its first mention."""
    aliases = getattr(config_class, "ALIASES", {})
    lists = {o.name for o in usage.options(config_class) if o.value.startswith("[") and not o.positional}
    words: list[str] = []
    values: dict[str, list[str]] = {}  # of the lists
    current = None
    for i, word in enumerate(argv):
        if word == "--":
            return [*_placed(words, values), *argv[i:]]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = aliases.get(name.replace("_", "-"), name)
            current = name.replace("_", "-") if name.replace("_", "-") in lists else None
            if current is None:
                words.append(name + equals + value)
            else:
                words += [] if current in values else [current]
                values.setdefault(current, []).extend([value] if equals else [])
                current = None if equals else current
        elif current is not None:
            values[current].append(word)
        else:
            words.append(word)
    return _placed(words, values)


def _placed(words: list[str], values: dict[str, list[str]]) -> list[str]:
    return [w for word in words for w in (word, *values.get(word, ()))]


def by_name(config_class: type[T], argv: list[str]) -> type[T]:
    """The class with those fields as flags that have a place of their own and are named in `argv`."""
    given = {word.split("=")[0] for word in argv}
    named = [o.name.lower() for o in usage.options(config_class) if o.positional and f"--{o.name.lower()}" in given]
    if not named:
        return config_class
    hints = typing.get_type_hints(config_class)  # without the mark of a place
    flagged = type(config_class.__name__, (config_class,), {"__annotations__": {name: hints[name] for name in named},
                                                            "__module__": config_class.__module__, "__doc__": config_class.__doc__})
    return dataclasses.dataclass(frozen=True)(flagged)


def _refusal(page: str) -> str:
    """The sentence in tyro's answer: what stands between its first two rules (all of it, should the page change)."""
    lines = [line.strip() for line in page.splitlines()]
    rules = [i for i, line in enumerate(lines) if len(line) > 3 and not line.strip("-")]
    return " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines).strip()


@contextlib.contextmanager
def shown(json_lines: bool, quiet: bool) -> Iterator[None]:
    """Events go to stdout as JSON lines, to a live view, to plain lines on stderr, or nowhere.

    With `json_lines` whatever is printed meanwhile goes to stderr, so that stdout holds events alone. Of several processes the first one shows.
    """
    from pellucid.cli import display

    if not processes.is_first():
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    elif json_lines:
        out = sys.stdout
        with events.subscribed(JsonLines(out)), contextlib.redirect_stdout(sys.stderr):
            yield
    elif quiet:
        yield
    else:
        with display.for_people() as reader, events.subscribed(reader):
            yield


class JsonLines:
    """Subscriber: every event as one JSON line."""

    def __init__(self, out: TextIO):
        self.out = out

    def __call__(self, event: events.Event) -> None:
        self.out.write(json.dumps(event.as_dict(), ensure_ascii=False) + "\n")
        self.out.flush()


def prepare(config: Common, seed: int | None = 0) -> torch.device:
    """Seed, threads and device of a verb that computes, each choice noted with its reason.

    `seed` is used where the person gave none; None there leaves the generators as they are.
    """
    processes.check(config)
    device, threads = runtime.choose_device(config.device), runtime.choose_threads(processes.threads_here(config.threads))
    chosen = seed if config.seed is None else config.seed
    if chosen is not None:
        runtime.seed_everything(chosen)
    events.note(f"device {device}, threads {threads}, seed {'new' if chosen is None else chosen}")
    return device.value
