"""What a checkpoint recommends where a client says nothing: the settings of its generation_config.json, as vLLM takes them.

temperature, top_p, top_k, min_p and repetition_penalty; max_new_tokens bounds answers for which no length is asked. A client's own
settings come first. `do_sample` is not looked at: the server draws, unless a temperature of 0 is asked for.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pellucid.engine import SamplingParams
from pellucid.errors import BadInput

FILE = "generation_config.json"


@dataclass(frozen=True)
class Defaults:
    """None: nothing is recommended."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items() if value is not None)


NOTHING = Defaults()


def read_defaults(folder: Path | None) -> Defaults:
    """Of a checkpoint's folder. BadInput for settings that are not possible."""
    if folder is None or not (folder / FILE).is_file():
        return NOTHING
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        given: dict[str, Any] = {name: found.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        given["max_tokens"] = found.get("max_new_tokens")
        given = {name: number(name, value) for name, value in given.items() if value is not None}
        read = Defaults(**given)
        SamplingParams(**{name: value for name, value in asdict(read).items() if value is not None})
    except (OSError, ValueError, AttributeError, BadInput) as error:
        reason = error.what if isinstance(error, BadInput) else str(error)
        raise BadInput(f"{folder / FILE} cannot be used", reason, "mend it, or serve with --sampling openai") from error
    return read


def number(name: str, value: Any) -> float | int | None:
    """The value as it can be asked for; None where it says that nothing is cut off."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {str(value)[:40]!r}, which is no number")
    if name in ("top_k", "max_tokens"):
        return int(value) if value > 0 else None
    return float(value)
