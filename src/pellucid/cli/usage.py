"""The help page of a verb, in the language of its reader, written from the dataclass of its options.

The class's docstring gives the summary and, as lines that begin with `$ `, the examples; a field's docstring gives its
help. In both, lines with Chinese characters are the Chinese text and the others the English one.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from functools import cache
from typing import Any

from tyro.conf import Positional

from pellucid.messages import language, say

CHINESE = re.compile("[\u4e00-\u9fff]")
MARKER = Positional[int].__metadata__[0]  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Option:
    """One field as people type it: `--max-tokens INT`, or `TARGET` where it is positional."""

    name: str
    value: str  # what follows the flag: INT, PATH ..., empty for a switch
    help: str  # the field's docstring, both languages
    default: Any  # dataclasses.MISSING where the option is required
    positional: bool
    owner: type  # the class that declares it


def options(config_class: type) -> list[Option]:
    """The fields of a config as options, in the order of declaration."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    docs, owner = {}, {}
    for cls in reversed(config_class.__mro__[:-1]):
        docs.update(field_docs(cls))
        owner.update(dict.fromkeys(inspect.get_annotations(cls), cls))
    found = []
    for field in dataclasses.fields(config_class):
        positional = MARKER in getattr(hints[field.name], "__metadata__", ())
        name = field.name.upper() if positional else "--" + field.name.replace("_", "-")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is True:
            name = name.replace("--", "--no-", 1)
        found.append(Option(name, value_of(hints[field.name]), docs.get(field.name, ""), default, positional,
                            owner[field.name]))
    return found


def flags(config_class: type) -> list[str]:
    return [option.name for option in options(config_class) if not option.positional]


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal that follows it in the source of the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found[field.target.id] = inspect.cleandoc(after.value.value)
    return found


def value_of(hint: Any) -> str:
    """What a person types for a value of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return value_of(args[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(value_of(a) for a in args if a is not type(None))
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if origin in (tuple, list):
        return f"[{value_of(args[0])} ...]"
    return {bool: "", int: "INT", float: "NUMBER", str: "TEXT"}.get(hint, getattr(hint, "__name__", "TEXT").upper())


def in_language(text: str) -> str:
    """The lines of a two-language text that are for the present reader, joined; the other language if there are none."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("$ ")]
    chinese = [line for line in lines if CHINESE.search(line)]
    english = [line for line in lines if not CHINESE.search(line)]
    return "".join(chinese) if language() == "zh" and chinese else " ".join(english or chinese)


def examples(config_class: type) -> list[str]:
    """The command lines in the class's docstring, without their `$ `."""
    lines = (line.strip() for line in inspect.cleandoc(config_class.__doc__ or "").splitlines())
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def page(config_class: type, verb: str) -> str:
    """The whole help page."""
    own = [o for o in options(config_class) if o.owner.__name__ != "Common"]
    common = [o for o in options(config_class) if o.owner.__name__ == "Common"]
    targets, flagged = [o for o in own if o.positional], [o for o in own if not o.positional]
    shape = " ".join(o.name if o.default is dataclasses.MISSING else f"[{o.name}]" for o in targets)
    parts = [f"pellucid {verb} {shape}".rstrip() + " --options", "", *_wrapped(in_language(config_class.__doc__ or ""), 0)]
    if found := examples(config_class):
        parts += ["", say("help.example"), *(f"  {line}" for line in found)]
    for title, group in (("help.arguments", targets), ("help.options", flagged), ("help.common", common)):
        if group:
            parts += ["", say(title), *(line for option in group for line in _rows(option))]
    return "\n".join(parts)


def _rows(option: Option) -> list[str]:
    head = f"  {option.name} {'' if option.positional else option.value}".rstrip()
    text = in_language(option.help)
    if option.default is dataclasses.MISSING:
        text += f" ({say('help.required')})"
    elif option.default not in (None, False, True, (), ""):
        shown = " ".join(map(str, option.default)) if isinstance(option.default, (tuple, list)) else option.default
        text += f" ({say('help.default', value=shown)})"
    lines = _wrapped(text, 28)
    return [head + lines[0][len(head):], *lines[1:]] if len(head) < 27 else [head, *lines]


def _wrapped(text: str, indent: int) -> list[str]:
    """`text` in lines that fit the terminal, by display width: a Chinese character takes two columns."""
    from rich.cells import cell_len

    room = max(40, min(shutil.get_terminal_size().columns, 110) - indent)
    lines: list[str] = []
    line = ""
    for piece in re.findall(r"[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+|\s+", text):
        if cell_len(line + piece) > room and piece.strip() and not piece.startswith(tuple("，。；：、）")):
            lines, line = [*lines, line], ""
        line += piece if line or piece.strip() else ""
    return [" " * indent + part.rstrip() for part in [*lines, line]]
