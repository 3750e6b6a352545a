"""All layers of a step of one row in one kernel (whole.cu, which says how it works): who makes which rows, and the launch.

The chain of kernels that does the same (engine/gpu_pass.py) is its readable twin. A program that waits in vain for a word (which no launch
does whose programs are all there, and the launch is a cooperative one) goes on with NaN: the request ends with an error, nothing hangs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pellucid.ops.cuda.compile import Kernel, compiled, nvrtc
from pellucid.runtime import Choice

SOURCE = Path(__file__).with_suffix(".cu")
LOG2_E = 1.4426950408889634
WARPS, SLOT, SHARED = 8, 16_896, 232_448
"""Warps that compute, bytes of a slot of the ring, bytes of shared memory that a program may have (compute capability 9.0)."""
MOST_LAYERS, PARTS = 64, 16
AHEAD = 131_072
"""Bytes of the head, for each program, that come to the L2 cache while the last layer ends."""
LARGEST = 48 << 20
"""Bytes of a layer's weights up to which it is chosen: measured are 31 MB (Qwen3-0.6B), where the chain of kernels takes a fifth longer,
and 386 MB (8B), where the chain's kernels are long enough to hide what stands between them."""
PATIENCE = 1 << 20
"""Readings of a word after which a program goes on without it: more than half a second."""
FIELDS = 13
"""Numbers of a layer: `struct Layer` in whole.cu."""


@dataclass(frozen=True)
class Sizes:
    """What all layers of a model have in common."""

    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    turned: int
    qk_norm: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def products(self) -> list[tuple[int, int]]:
        """Rows and columns of the four; of gate and up those of one."""
        wide = self.heads * self.head_dim
        return [(wide + 2 * self.kv_heads * self.head_dim, self.dim), (self.dim, wide), (self.hidden, self.dim), (self.dim, self.hidden)]


@dataclass(frozen=True)
class Plan:
    """Which program makes what."""

    sizes: Sizes
    programs: int
    parts: int
    rows: tuple[int, ...]  # of each product
    slots: int

    @property
    def words(self) -> int:
        s = self.sizes
        wide = s.heads * s.head_dim
        return wide + 2 * s.kv_heads * s.head_dim + self.parts * (wide + s.heads) + wide + 2 * s.dim + s.hidden

    @property
    def counts(self) -> int:
        """Of launches, and of words told: 16 numbers for each, so that none shares a line of the cache."""
        return 16 * (2 + 6 + self.sizes.kv_heads)

    @property
    def shared(self) -> int:
        """Bytes: the ring, a vector or the warps' parts of the attention, the layers."""
        widest = max(columns for _, columns in self.sizes.products())
        return self.slots * SLOT + max(6 * widest, 4 * WARPS * self.sizes.group * self.sizes.head_dim) + MOST_LAYERS * FIELDS * 8

    @property
    def arrays(self) -> int:
        """Bytes, at most, of the arrays in shared memory that whole.cu names itself, and of what the card keeps there."""
        a, o, g, w = self.rows
        heads = self.sizes.group * (2 * self.sizes.head_dim + 2 * WARPS) + 4 * self.sizes.head_dim
        return 4 * ((WARPS + 1) * (max(a, 2 * g) + max(o, w)) + WARPS + heads) + 3072

    def options(self, patience: int) -> list[str]:
        s, (a, o, g, w) = self.sizes, self.rows
        fixed = {"D": s.dim, "I": s.hidden, "H": s.heads, "K": s.kv_heads, "HD": s.head_dim, "S": self.parts, "P": self.programs, "RA": a, "RO": o, "RG": g, "RW": w,
                 "NORM": int(s.qk_norm), "AHEAD": AHEAD, "WARPS": WARPS, "SLOTS": self.slots, "PATIENCE": patience}
        return [f"-D{name}={value}" for name, value in fixed.items()]


def rows_of_slot(columns: int) -> int:
    """Rows that a slot of the ring holds; 0: none."""
    return next((n for n in (8, 4, 2, 1) if columns * n <= 8192), 0)


def plan_for(sizes: Sizes, processors: int) -> Plan | None:
    """The most programs among which the rows of all products can be shared evenly, a slot's at a time; None if there is no such number."""
    products = sizes.products()
    if any(columns % 64 or not rows_of_slot(columns) for _, columns in products) or sizes.head_dim not in (64, 128) or sizes.group not in (1, 2, 4):
        return None
    for programs in range(processors, max(16, sizes.kv_heads, processors // 2) - 1, -1):
        if all(rows % programs == 0 and rows // programs % 8 == 0 for rows, _ in products) and sizes.dim // programs <= 32:
            parts = min(PARTS, 1 << (programs // sizes.kv_heads).bit_length() - 1)
            plan = Plan(sizes, programs, parts, tuple(rows // programs for rows, _ in products), 0)
            slots = (SHARED - plan.shared - plan.arrays) // SLOT
            return replace(plan, slots=slots) if slots >= 6 else None
    return None


def choose_plan(sizes: Sizes, device: torch.device) -> Choice:
    """A Plan, or None, and why."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return Choice(None, "all layers in one kernel: for NVIDIA's Hopper only")
    if not SOURCE.exists() or nvrtc() is None:
        return Choice(None, "all layers in one kernel: its source, or NVRTC, which compiles it, was not found")
    plan = plan_for(sizes, torch.cuda.get_device_properties(device).multi_processor_count)
    return Choice(plan, f"all layers in one kernel of {plan.programs} programs" if plan else "all layers in one kernel: its rows cannot be shared evenly")


def code_of(plan: Plan, patience: int) -> bytes:
    return compiled(SOURCE.read_text(encoding="utf-8"), ["-arch=sm_90", "-std=c++17", *plan.options(patience)])


@cache
def kernel_of(plan: Plan, device: int, patience: int) -> Kernel:
    """For the current device, which is `device`."""
    return Kernel(code_of(plan, patience), "whole", plan.shared)


def run(
    plan: Plan, numbers: Tensor, drawn: Tensor, table: Tensor, layers: Tensor, frequencies: Tensor, last_norm: Tensor, head: Tensor, words: Tensor,
    launches: Tensor, eps: float, head_eps: float, factor: float, scale: float, patience: int = PATIENCE,
) -> Tensor:
    """The last hidden state (1, D), normed.  numbers (5, 1) int64: see engine/gpu_pass.py.  table (V, D).  layers (L, FIELDS) int64.
    frequencies (r / 2,) float32.  head: what is read next, so that its beginning is on its way.  words (2 `Plan.words`,) and launches
    (`Plan.counts`,) int64 are the kernel's own, zeros at first."""
    out = table.new_empty(1, plan.sizes.dim)
    given = (numbers, drawn, table, layers, frequencies, last_norm, head, words, launches, out, len(layers), plan.sizes.turned, float(eps),
             float(head_eps), float(factor), float(scale * LOG2_E))
    with torch.cuda.device(table.device):
        kernel_of(plan, torch.cuda.current_device(), patience)(plan.programs, 32 * (WARPS + 2), given)
    return out
