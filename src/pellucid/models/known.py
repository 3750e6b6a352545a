"""Well-known models by name: the fields of their config.json as published, so that they can be inspected and planned for
without a download. The data is `known.json` beside this file; `tests/models/test_known.py` holds their parameter counts."""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput, nearest


@cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "known.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def names() -> list[str]:
    return sorted(_table())


def find_config(name: str) -> dict[str, Any]:
    """config.json of a well-known model (upper and lower case do not matter). BadInput names the nearest one."""
    fields = _table().get(name.lower())
    if fields is None:
        raise BadInput(f"there is no well-known model {name!r}{nearest(name.lower(), names())}", next=f"known: {', '.join(names())}")
    return dict(fields)


def nearest_name(name: str) -> str | None:
    close = difflib.get_close_matches(name.lower(), names(), n=1)
    return close[0] if close else None
