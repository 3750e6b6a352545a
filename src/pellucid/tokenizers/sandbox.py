"""The sandbox that chat templates run in: Jinja's, with an end to how long they run and how much they write.

Templates come from strangers. Jinja's immutable sandbox keeps them away from Python's internals, but lets two loops of
100,000 steps run inside one another, and a text double itself forty times. Here every step of a loop and every call
asks whether the time is up, and whatever joins or repeats text asks how long it gets. What a template may compute,
and its result, is that of transformers.

Not stopped: one built-in operation while it works on data within these bounds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import jinja2
import jinja2.nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""Of processor time for one conversation; an honest template takes milliseconds."""

LARGEST = 1 << 25
"""Characters that one text may have, and all output together (the longest contexts are a tenth of it)."""

WIDEST = 10_000
"""The largest number that a filter or method which pads, indents or slices may be given."""

PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "slice", "batch", "round", "tojson"}

# Filters that take a sequence as it is; the others write out what they are given.
NATIVE = {"length", "count", "first", "last", "list", "map", "select", "selectattr", "reject", "rejectattr", "items",
          "reverse", "default", "d", "attr", "sort", "unique", "groupby", "dictsort", "sum", "min", "max", "random",
          "join"}


class Exceeded(SecurityError):
    """The template ran too long or wrote too much."""


class Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.end = time.thread_time() + SECONDS
        self.written = 0


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def budget() -> Iterator[None]:
    """Everything rendered inside counts together."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def tick() -> None:
    """Is the time up?"""
    used = _budget.get()
    if used is not None and time.thread_time() > used.end:
        raise Exceeded(f"it took more than {SECONDS:.0f} seconds")


def allow(size: int, most: int = LARGEST) -> None:
    """Refuse what would be larger than `most`."""
    if size > most:
        raise Exceeded(f"it writes, pads or computes more than {most:,} characters or bits")


def weight(value: Any) -> int:
    """About the number of characters that `value` has when written out; counting ends where it is too large."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        total += len(item) if isinstance(item, str | bytes) else 16
        allow(total)
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            left += item
    return total


def bounded(name: str, value: Any, args: tuple[Any, ...]) -> None:
    """Refuse a filter or method whose result would be too large."""
    if name in PADDING:
        allow(max((abs(arg) for arg in args if isinstance(arg, int)), default=0), WIDEST)
    elif name == "replace" and len(args) >= 2 and isinstance(value, str):
        allow(len(value) + value.count(str(args[0])) * len(str(args[1])))
    elif name == "join":
        text, items = (value, args[0]) if isinstance(value, str) and args else (args[0] if args else "", value)
        allow(weight(items) + len(items) * weight(text) if isinstance(items, list | tuple) else 0)
    elif name == "translate" and args:
        allow(len(value) * weight(args[0]))
    elif name == "format" and isinstance(value, str):
        formatted(value, args)


def formatted(text: str, values: Any) -> None:
    """Refuse `text % values` and `text.format(values)` that pad too far, or repeat a value too often."""
    allow(len(text) + (text.count("%") + text.count("{")) * weight(values))
    text = text.replace("{{", "").replace("}}", "")
    widths = [int(width) for width in re.findall(r"(?:%[^%a-zA-Z(]*?|\{[^{}]*?)(\d{5,})", text)]
    if re.search(r"%[^%a-zA-Z(]*\*|\{[^{}]*:[^{}]*\{", text):  # widths that are values
        widths += [v for v in (values if isinstance(values, list | tuple) else [values]) if isinstance(v, int)]
    allow(max(widths, default=0), WIDEST)


class Watched(NodeTransformer):
    """Puts the questions into a template's syntax tree."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(cast(jinja2.nodes.Expr, node.iter), "(each)")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filter(node.nodes[0], "(concat)", node.nodes[1:])


def _filter(node: jinja2.nodes.Expr, name: str, args: Iterable[jinja2.nodes.Expr] = ()) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno, environment=node.environment)


class WatchedCode(CodeGenerator):
    def visit_Template(self, node: jinja2.nodes.Template, frame: Any = None) -> None:
        super().visit_Template(Watched().visit(node), frame)


def each(items: Any) -> Iterator[Any]:
    for item in items:
        tick()
        yield item


def concat(*parts: Any) -> str:
    allow(sum(map(weight, parts)))
    return "".join(map(str, parts))


def written(value: Any) -> Any:
    """What `{{ ... }}` shows."""
    used = _budget.get()
    if used is not None:
        used.written += weight(value)
        allow(used.written)
    return value


class Names(Namespace):
    """`namespace()` without names that begin with an underscore, behind which Python's internals lie."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)


def namespace(*args: Any, **kwargs: Any) -> Names:
    names = Names()
    for name, value in dict(*args, **kwargs).items():
        names[name] = value
    return names


class Dict:
    """`dict(...)` and `dict.fromkeys(...)`, without the other attributes of a Python type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Sandbox(ImmutableSandboxedEnvironment):
    """filters and globals: those of Jinja, bounded; without `lipsum`, which writes nonsense of any length."""

    code_generator_class = WatchedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(finalize=written, **options)
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"}
        self.globals |= {"namespace": namespace, "dict": Dict()}
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"(each)": each, "(concat)": concat}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _bounded_filter(name, function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            formatted(left, right) if isinstance(left, str) else None
        elif isinstance(left, int) and isinstance(right, int):
            bits = abs(left).bit_length(), abs(right).bit_length()
            allow({"*": sum(bits), "+": max(bits), "**": bits[0] * min(abs(right), 1 << 32)}[operator], 1 << 14)
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(items, "__len__"):
                    allow(len(items) * times)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            allow(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            bounded(getattr(__obj, "__name__", ""), owner, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            formatted(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    context_first = hasattr(function, "jinja_pass_arg")

    @wraps(function)  # keeps Jinja's mark of filters that are handed the context
    def checked(*args: Any, **kwargs: Any) -> Any:
        tick()
        at = 1 if context_first else 0
        args = (*args[:at], _sized(args[at]), *args[at + 1:]) if name == "join" else args
        if name not in NATIVE:
            for item in args[at:]:
                weight(item)
        bounded(name, args[at], (*args[at + 1:], *kwargs.values()))
        return function(*args, **kwargs)

    return checked


def _sized(items: Any) -> Any:
    return items if isinstance(items, str) or hasattr(items, "__len__") else [*each(items)]
