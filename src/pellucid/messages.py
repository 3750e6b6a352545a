"""What people read, in Chinese and English, from one catalogue.

    >>> set_language("en")
    >>> say("display.stage", index=2, count=7, title="pretrain")
    'stage 2/7 pretrain'

A missing key, a missing field and a field that the text does not use are errors: a sentence with a hole in it,
or a value that silently goes nowhere, is a mistake of ours. A room adds its own sentences with `add`.
"""

from __future__ import annotations

import os
import string
from typing import NamedTuple

LANGUAGES = ("zh", "en")


class Text(NamedTuple):
    """One message in both languages, with `{field}` holes that must be the same in both."""

    en: str
    zh: str


CATALOGUE: dict[str, Text] = {}
_language: list[str] = []  # empty until somebody chose one


def default_language() -> str:
    """`zh` where the environment's locale is Chinese, else `en`."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):  # the order of POSIX
        if value := os.environ.get(name):
            return "zh" if value.lower().startswith("zh") else "en"
    import locale

    return "zh" if (locale.getlocale()[0] or "").lower().startswith(("zh", "chinese")) else "en"


def set_language(name: str | None) -> None:
    """`zh` or `en`; None: by the locale."""
    if name is not None and name not in LANGUAGES:
        raise ValueError(f"unknown language {name!r}; one of {', '.join(LANGUAGES)}")
    _language[:] = [name or default_language()]


def language() -> str:
    return _language[0] if _language else default_language()


def pick(en: str, zh: str) -> str:
    """The one of two texts that is in the language in use."""
    return zh if language() == "zh" else en


def fields(text: str) -> set[str]:
    """Names of the `{holes}` of a message."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def add(texts: dict[str, tuple[str, str]]) -> None:
    """Put `{key: (english, chinese)}` into the catalogue. A key of other words, or unlike holes, is an error."""
    for key, pair in texts.items():
        text = Text(*pair)
        if CATALOGUE.get(key, text) != text:
            raise ValueError(f"message {key!r} stands in the catalogue already, with other words")
        if fields(text.en) != fields(text.zh):
            raise ValueError(f"message {key!r}: fields {fields(text.en)} in English, {fields(text.zh)} in Chinese")
        CATALOGUE[key] = text


def both(key: str, **values: object) -> Text:
    """The message `key` in both languages, its holes filled with `values`."""
    if key not in CATALOGUE:
        raise KeyError(f"no message {key!r} in the catalogue")
    text = CATALOGUE[key]
    if set(values) != fields(text.en):
        raise KeyError(f"message {key!r} has the fields {sorted(fields(text.en))}, not {sorted(values)}")
    return Text(text.en.format(**values), text.zh.format(**values))


def say(key: str, **values: object) -> str:
    """The message `key` in the language in use, its holes filled with `values`."""
    return pick(*both(key, **values))


def three_parts(key: str, **values: object) -> tuple[str, str, str]:
    """What happened, why, what next: the messages `key`, `key.why` and `key.next`, the last two where they exist. Each
    takes those of `values` that it has holes for; a value that none of them uses is an error, as in `say`."""
    known = {name: fields(CATALOGUE[name].en) for name in (key, f"{key}.why", f"{key}.next") if name in CATALOGUE}
    if key not in known or set(values) != set().union(*known.values()):
        raise KeyError(f"messages {list(known) or key!r} do not have the fields {sorted(values)}")
    what, why, then = (say(name, **{k: v for k, v in values.items() if k in known[name]}) if name in known else ""
                       for name in (key, f"{key}.why", f"{key}.next"))
    return what, why, then


def term(name: str) -> str:
    """A name from the event stream (a metric, a unit) as people read it: the message `term.NAME`, else as it is."""
    text = CATALOGUE.get(f"term.{name}")
    return name if text is None else pick(*text)


add({
    "help.usage": ("usage: pellucid VERB TARGET --options", "用法：pellucid 动词 对象 --选项"),
    "help.parts": ("usage: pellucid {verb} KIND [TARGET] --options", "用法：pellucid {verb} 种类 [对象] --选项"),
    "help.kinds": ("kinds", "种类"),
    "help.kind_more": ("`pellucid {verb} {kind} --help` shows a kind's options and an example.", "`pellucid {verb} {kind} --help` 显示该种类的选项与示例。"),
    "help.title": ("pellucid {version}: the whole LLM stack, running and readable",
                   "pellucid（澄明）{version}：整个大模型技术栈，可运行、可阅读"),
    "help.verbs": ("verbs", "动词"),
    "help.more": ("`pellucid VERB --help` shows a verb's options and an example; `pellucid --version` the version.",
                  "`pellucid 动词 --help` 显示该动词的选项与示例；`pellucid --version` 显示版本。"),
    "help.start": ("start here: pellucid grow", "从这里开始：pellucid grow"),
    "help.arguments": ("arguments", "参数"),
    "help.options": ("options", "选项"),
    "help.common": ("options of every verb", "所有动词共有的选项"),
    "help.example": ("example", "示例"),
    "help.default": ("default: {value}", "默认：{value}"),
    "help.required": ("required", "必填"),
    "help.help": ("Show this page.", "显示本页。"),
    "error.error": ("error", "错误"),
    "error.why": ("why", "原因"),
    "error.next": ("next", "下一步"),
    "error.verb": ("there is no verb {verb}", "没有 {verb} 这个动词"),
    "error.part": ("`pellucid {verb}` has no kind {part}", "`pellucid {verb}` 没有 {part} 这个种类"),
    "error.no_part": ("`pellucid {verb}` needs a kind: {parts}", "`pellucid {verb}` 需要指明种类：{parts}"),
    "error.option": ("`pellucid {verb}` has no option {option}", "`pellucid {verb}` 没有 {option} 这个选项"),
    "error.nearest": ("did you mean {word}?", "是否想写 {word}？"),
    "error.see": ("see `pellucid {verb} --help`", "请看 `pellucid {verb} --help`"),
    "error.see_all": ("see `pellucid --help`", "请看 `pellucid --help`"),
    "error.argument": ("`pellucid {verb}` cannot use these arguments", "`pellucid {verb}` 无法使用这些参数"),
    "error.required": ("it needs {names}", "缺少 {names}"),
    "error.interrupted": ("interrupted", "已中断"),
    "error.unexpected": ("this should not have happened: {name}: {text}", "意料之外的错误：{name}: {text}"),
    "error.debug": ("set PELLUCID_DEBUG=1 and run the same command to see where; please report it",
                    "设置 PELLUCID_DEBUG=1 后重新运行同一命令可看到出错位置；欢迎反馈"),
    "display.stage": ("stage {index}/{count} {title}", "阶段 {index}/{count} {title}"),
    "display.left": ("left {time}", "剩余 {time}"),
    "display.elapsed": ("elapsed {time}", "已用 {time}"),
    "display.step": ("step {step}", "第 {step} 步"),
    "display.metrics": ("metrics", "指标"),
    "display.latest": ("latest", "最近"),
})
