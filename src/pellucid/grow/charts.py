"""Charts as inline SVG: curves, bars, grouped bars, a divided bar. Numbers in, markup out; nothing is looked up.

Positions along x are percentages and along y pixels, without a viewBox: a chart fills the width that it is given, and
its letters keep their size on a phone. Colours are CSS classes of the page (`s0` is the accent, `s1` ... greys).
Every mark has a `<title>`, shown when the pointer rests on it. Values that are not finite numbers are left out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard


class Text(NamedTuple):
    """One text in both languages of the page; the page shows one of them."""

    en: str
    zh: str


Label = Text | str


def escaped(text: Any) -> str:
    """Text for HTML: markup is escaped, control characters become visible, lone surrogates become U+FFFD."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in clean))


def words(label: Label, tag: str = "span") -> str:
    """A label as markup; a `Text` as two elements, of which the page hides one."""
    if isinstance(label, str):
        return escaped(label)
    return f'<{tag} class="en">{escaped(label.en)}</{tag}><{tag} class="zh">{escaped(label.zh)}</{tag}>'


def finite(value: Any) -> TypeGuard[float]:
    """A number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (progress in 0..1, value). `dots`: few measurements, each marked.

    colour: number of the page's class, `s0` (the accent) or `s1`.
    """

    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False

    def clean(self) -> list[tuple[float, float]]:
        pairs = [(p[0], p[1]) for p in self.points if len(p) == 2 and finite(p[0]) and finite(p[1])]
        return sorted((min(1.0, max(0.0, x)), y) for x, y in pairs)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose low..high, at most `most` intervals."""
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-100):  # flat
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * m for m in (1, 2, 2.5, 5, 10, 20, 25, 50)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            return [i * step for i in range(first, last + 1)]
    raise AssertionError("the steps above reach fifty times the range")


def number(value: float, percent: bool = False) -> str:
    """A value beside a chart: a share in percent, else about three figures."""
    if percent:
        return f"{100 * value:.1f}%"
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _tick_text(value: float, step: float, percent: bool) -> str:
    if percent:
        value, step = 100 * value, 100 * step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if not math.isclose(round(step, decimals), step):  # 0.25 needs one more
        decimals += 1
    return f"{value:,.{decimals}f}" + ("%" if percent else "")


HEIGHT = 176  # of the plot, in pixels; 28 more carry the axis below
BANDS = 60  # the most places of a chart that show their values to the pointer


def curves(series: Sequence[Series], *, percent: bool = False, from_zero: bool = False,
           references: Sequence[tuple[str, float]] = ()) -> str:
    """Lines over the progress of a stage (0..100 %). `references` are dashed level lines with a name.

    The empty string where there is nothing to draw.
    """
    lines = [(s, points) for s in series if (points := s.clean())]
    values = [y for _, points in lines for _, y in points]
    if not values:
        return ""
    references = [(name, v) for name, v in references if finite(v)]
    values += [v for _, v in references] + ([0.0] if from_zero else [])
    marks = ticks(min(values), max(values))
    low, high = marks[0], marks[-1]

    def at(value: float) -> float:
        return HEIGHT * (high - value) / (high - low)

    parts = [_grid(marks, at, percent), _progress_axis()]
    for name, value in references:
        y, told = at(value), f"{escaped(name)} {number(value, percent)}"
        parts.append(f'<line class="reference" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="small reference-name" x="100%" y="{y - 6:.1f}" text-anchor="end">{told}</text>')
    for s, points in reversed(lines):  # the first series is drawn last, on top
        parts.append(_line(points, s.colour, at))
        if s.dots:
            dot = f'<circle class="dot s{s.colour}" r="3.2"'
            parts += [f'{dot} cx="{100 * x:.2f}%" cy="{at(y):.1f}"/>' for x, y in points]
    parts.append(_bands(lines, at, percent))
    return f'<svg class="chart" height="{HEIGHT + 28}" role="img">{"".join(parts)}</svg>'


def _grid(marks: list[float], at: Any, percent: bool) -> str:
    """Level lines with their values left of the plot."""
    step = marks[1] - marks[0]
    return "".join(
        f'<line class="{"axis" if i == 0 else "grid"}" x1="0" x2="100%" y1="{at(v):.1f}" y2="{at(v):.1f}"/>'
        f'<text class="small" x="-8" y="{at(v) + 4:.1f}" text-anchor="end">{_tick_text(v, step, percent)}</text>'
        for i, v in enumerate(marks))


def _progress_axis() -> str:
    ends = ((0, "start"), (50, "middle"), (100, "end"))
    return "".join(f'<text class="small" x="{x}%" y="{HEIGHT + 19}" text-anchor="{anchor}">{x}%</text>'
                   for x, anchor in ends)


def _line(points: list[tuple[float, float]], colour: int, at: Any) -> str:
    """The line itself, in a nested drawing that is stretched to the width of the chart."""
    path = "L".join(f"{1000 * x:.1f} {at(y):.1f}" for x, y in points)
    return (f'<svg x="0" y="0" width="100%" height="{HEIGHT}" viewBox="0 0 1000 {HEIGHT}" preserveAspectRatio="none" '
            f'overflow="visible"><path class="line s{colour}" d="M{path}"/></svg>')


def _bands(lines: list[tuple[Series, list[tuple[float, float]]]], at: Any, percent: bool) -> str:
    """Invisible upright bands, each with the values of all lines at its place."""
    densest = max((points for _, points in lines), key=len)
    places = densest[:: -(-len(densest) // BANDS)]
    edges = [0.0, *((a[0] + b[0]) / 2 for a, b in pairwise(places)), 1.0]
    out = []
    for (x, _), (left, right) in zip(places, pairwise(edges)):
        near = [(s.colour, min(points, key=lambda p: abs(p[0] - x))) for s, points in lines]
        told = " · ".join(number(y, percent) for _, (_, y) in near)
        dots = "".join(f'<circle class="s{c}" cx="{100 * px:.2f}%" cy="{at(y):.1f}" r="4"/>' for c, (px, y) in near)
        band = f'<rect x="{100 * left:.2f}%" width="{100 * (right - left):.2f}%" height="{HEIGHT}"/>'
        out.append(f'<g class="band">{band}{dots}<title>{x:.0%}: {told}</title></g>')
    return "".join(out)


def bars(rows: Sequence[tuple[Label, float, bool]], *, percent: bool = False) -> str:
    """Horizontal bars from zero, one a row: (name, value, whether it is ours and wears the accent)."""
    rows = [row for row in rows if finite(row[1])]
    if not rows:
        return ""
    largest = max(max(v for _, v, _ in rows), 1e-12)
    parts = []
    for i, (name, value, ours) in enumerate(rows):
        y, width = 42 * i, 100 * max(value, 0.0) / largest
        parts.append(
            f'<g class="{"ours" if ours else "peer"}"><text x="0" y="{y + 13}">{words(name, "tspan")}</text>'
            f'<text class="value" x="100%" y="{y + 13}" text-anchor="end">{number(value, percent)}</text>'
            f'<rect class="track" x="0" y="{y + 20}" width="100%" height="10" rx="2"/>'
            f'<rect class="{"s0" if ours else "s1"}" x="0" y="{y + 20}" width="{width:.2f}%" height="10" rx="2">'
            f"<title>{number(value, percent)}</title></rect></g>")
    return f'<svg class="bars" height="{42 * len(rows)}" role="img">{"".join(parts)}</svg>'


def grouped(groups: Sequence[tuple[Label, dict[str, float]]], keys: dict[str, int]) -> str:
    """Upright bars of shares (0..1), a group per label, a bar per key. keys: key -> number of its colour (`k0` ...)."""
    groups = [(label, {k: v for k, v in values.items() if k in keys and finite(v)}) for label, values in groups]
    groups = [g for g in groups if g[1]]
    if not groups:
        return ""
    marks = [0.0, 0.25, 0.5, 0.75, 1.0]

    def at(value: float) -> float:
        return 14 + (HEIGHT - 14) * (1 - min(1.0, max(0.0, value)))

    parts = [_grid(marks, at, True)]
    group, slot = 100 / len(groups), 76 / len(groups) / len(keys)
    for g, (label, values) in enumerate(groups):
        for i, key in enumerate(keys):
            if key not in values:
                continue
            x, y, value = g * group + 0.12 * group + i * slot, at(values[key]), values[key]
            middle = f'text-anchor="middle" x="{x + slot / 2:.2f}%"'
            parts.append(
                f'<g><rect class="k{keys[key]}" x="{x + slot * 0.08:.2f}%" y="{y:.1f}" width="{slot * 0.84:.2f}%" '
                f'height="{max(HEIGHT - y, 1):.1f}"><title>{escaped(key)}: {number(value, True)}</title></rect>'
                f'<text class="tiny" {middle} y="{y - 4:.1f}">{100 * value:.0f}</text></g>')
        name = words(label, "tspan")
        parts.append(f'<text x="{(g + 0.5) * group:.2f}%" y="{HEIGHT + 20}" text-anchor="middle">{name}</text>')
    return f'<svg class="chart" height="{HEIGHT + 28}" role="img">{"".join(parts)}</svg>'


def divided(rows: Sequence[tuple[Label, Sequence[tuple[str, float]]]]) -> str:
    """Bars cut into parts on one scale (seconds): (name, [(part, seconds), ...]) a row."""
    rows = [(name, [(k, v) for k, v in parts if finite(v) and v > 0]) for name, parts in rows]
    rows = [row for row in rows if row[1]]
    if not rows:
        return ""
    total = max(sum(v for _, v in parts) for _, parts in rows)
    names = list(dict.fromkeys(k for _, parts in rows for k, _ in parts))
    out = []
    for i, (name, parts) in enumerate(rows):
        y, x = 54 * i, 0.0
        whole = sum(v for _, v in parts)
        out.append(f'<text x="0" y="{y + 13}">{words(name, "tspan")}</text>'
                   f'<text class="value" x="100%" y="{y + 13}" text-anchor="end">{whole:.0f} s</text>')
        for key, seconds in parts:
            width, place = 100 * seconds / total, f'x="{x:.2f}%" y="{y + 20}"'
            out.append(f'<rect class="p{names.index(key) % 8}" {place} width="{width:.2f}%" height="22">'
                       f"<title>{escaped(key)}: {seconds:.1f} s ({seconds / whole:.0%})</title></rect>")
            x += width
    return f'<svg class="bars" height="{54 * len(rows)}" role="img">{"".join(out)}</svg>'


def balance(value: float, largest: float) -> str:
    """A small bar from the middle: to the right where an advantage is positive, to the left where it is negative."""
    width = 50 * min(1.0, abs(value) / largest) if largest > 0 else 0.0
    x, kind = (50.0, "up") if value > 0 else (50 - width, "down")
    bar = f'<rect class="{kind}" x="{x:.2f}%" y="3" width="{width:.2f}%" height="8"><title>{value:+.2f}</title></rect>'
    middle = '<line class="axis" x1="50%" x2="50%" y1="0" y2="14"/>'
    return f'<svg class="balance" height="14" role="img">{middle}{bar}</svg>'
