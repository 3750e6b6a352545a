"""A spec as a tree of lines that a person reads: equal layers once, fields at their defaults not at all."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def tree(spec: Any) -> list[str]:
    """
    >>> from pellucid.nn import MLP, Attn, DecoderSpec, Layer, Rope
    >>> print("\\n".join(tree(DecoderSpec(96, 48, (Layer(Attn(4, 2, 16, Rope(16)), MLP(80)),) * 3))))
    DecoderSpec  vocab 96, dim 48
      layers 0-2 (3)
        mixer  Attn  heads 4, kv_heads 2, head_dim 16
          rope  Rope  dim 16
        ffn  MLP  hidden 80
    """
    return _lines(spec, "", "")


def _lines(spec: Any, name: str, indent: str) -> list[str]:
    plain, nested = [], []
    for f in fields(spec):
        value = getattr(spec, f.name)
        if f.name == "extra" or not f.init or (f.default is not MISSING and value == f.default):
            continue
        if is_dataclass(value) or (isinstance(value, tuple) and value and is_dataclass(value[0])):
            nested.append((f.name, value))
        else:
            plain.append(f"{f.name} {_shown(value)}")
    title = f"{name}  " if name else ""
    lines = [f"{indent}{title}{type(spec).__name__}  {', '.join(plain)}".rstrip()]
    for child, value in nested:
        lines += _lines(value, child, indent + "  ") if is_dataclass(value) else _stack(child, value, indent + "  ")
    return lines


def _stack(name: str, layers: tuple[Any, ...], indent: str) -> list[str]:
    """Layers by kind: `layers 0-2, 4-6 (6)`."""
    alike: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        alike.setdefault(layer, []).append(index)
    lines = []
    for layer, numbers in alike.items():
        own = _lines(layer, "", indent)
        head = own[0].strip().removeprefix("Layer").strip()
        lines += [f"{indent}{name} {ranges(numbers)} ({len(numbers)})" + (f"  {head}" if head else ""), *own[1:]]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, tuple)):
        return str(value)
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{k} {_shown(v)}" if isinstance(k, str) else _shown((k, v)) for k, v in value) + ")" \
            if value and all(isinstance(item, tuple) and len(item) == 2 for item in value) else "(" + ", ".join(map(_shown, value)) + ")"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def ranges(numbers: list[int]) -> str:
    """
    >>> ranges([0, 1, 2, 4, 6, 7])
    '0-2, 4, 6-7'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
