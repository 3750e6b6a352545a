"""Line charts of an experiment as one standalone SVG file: panels side by side, a line an arm, the seeds' range as a band."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#b3261e", "#1f5fa8", "#3b7d3a", "#8a5a00", "#6b4fa0", "#555555")
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 170, 46, 46, 34

Curves = Mapping[str, Sequence[Sequence[float]]]  # arm -> one curve a seed


def write(path: Path, title: str, panels: Mapping[str, Curves], x_name: str = "step", low: float = 0.0, high: float = 1.0,
          x_end: float | None = None) -> None:
    """panels: name -> arm -> curves of the seeds, on the scale low..high; `x_end` is the x of a curve's last point."""
    arms = list(dict.fromkeys(arm for curves in panels.values() for arm in curves))
    wide = LEFT + len(panels) * (WIDTH + GAP)
    tall = TOP + HEIGHT + 44 + 18 * len(arms)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" '
             'font-family="sans-serif" font-size="11">', f'<rect width="{wide}" height="{tall}" fill="white"/>',
             f'<text x="{LEFT}" y="18" font-size="13">{html.escape(title)}</text>']
    for number, (name, curves) in enumerate(panels.items()):
        parts.append(_panel(name, curves, arms, LEFT + number * (WIDTH + GAP), low, high, x_name, x_end))
    for i, arm in enumerate(arms):
        y = TOP + HEIGHT + 44 + 18 * i
        parts.append(f'<path d="M{LEFT} {y}h22" stroke="{COLOURS[i % 6]}" stroke-width="2.5"/>'
                     f'<text x="{LEFT + 30}" y="{y + 4}">{html.escape(arm)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(name: str, curves: Curves, arms: Sequence[str], x0: float, low: float, high: float, x_name: str,
           x_end: float | None) -> str:
    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - (min(max(value, low), high) - low) / (high - low))

    parts = [f'<text x="{x0}" y="{TOP - 10}">{html.escape(name)}</text>']
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + part * (high - low)
        parts.append(f'<path d="M{x0} {y(value):.1f}h{WIDTH}" stroke="#ddd"/>'
                     f'<text x="{x0 - 5}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#666">{value:g}</text>')
    longest = max((len(c) for seeds in curves.values() for c in seeds), default=1)
    for at, anchor in ((0, "start"), (longest, "end")):
        shown = at if x_end is None else at / longest * x_end
        parts.append(f'<text x="{x0 + WIDTH * at / longest:.1f}" y="{TOP + HEIGHT + 15}" text-anchor="{anchor}" fill="#666">'
                     f'{x_name if not at else ""} {shown:g}</text>')
    for arm, seeds in curves.items():
        colour = COLOURS[arms.index(arm) % 6]
        columns = list(zip(*seeds))
        xs = [x0 + WIDTH * (i + 1) / longest for i in range(len(columns))]
        means = [sum(c) / len(c) for c in columns]
        upper = [f"{x:.1f} {y(max(c)):.1f}" for x, c in zip(xs, columns)]
        lower = [f"{x:.1f} {y(min(c)):.1f}" for x, c in zip(xs, columns)]
        parts.append(f'<path d="M{"L".join(upper + lower[::-1])}Z" fill="{colour}" opacity="0.10"/>')
        parts.append(f'<path d="M{"L".join(f"{x:.1f} {y(m):.1f}" for x, m in zip(xs, means))}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    return "\n".join(parts)
