"""What the comparisons share: turns in one process, medians, and a JSON that says where it was measured."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def turns(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Units/s of each contender (a call returns its units): the median of `rounds` turns A B C A B C ..., after a warm-up,
    so that a machine that slows down slows all of them."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            units = call()
            if number:
                speeds[name].append(units / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def options(doc: str | None, argv: list[str] | None, rounds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="keep the result here")
    return parser.parse_args(argv)


def finish(name: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """The result as the last line of stdout, and kept where asked."""
    from transformers import __version__ as transformers_version

    from pellucid.runtime import machine_card

    result = {"benchmark": name, "created": datetime.now(UTC).isoformat(timespec="seconds"),
              "machine": machine_card() | {"transformers": transformers_version}, "rows": rows}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
