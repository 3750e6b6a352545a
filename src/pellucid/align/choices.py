"""Checks that configurations share: a choice that does not exist, or that would silently do nothing, is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from pellucid.errors import BadInput, nearest


def check_name(what: str, value: object, choices: object) -> None:
    """`choices`: a Literal, or a sequence of names."""
    allowed = list(get_args(choices) or choices)  # type: ignore[call-overload]
    if value not in allowed:
        raise BadInput(f"unknown {what} {value!r}{nearest(str(value), allowed)}", next=f"use one of {', '.join(allowed)}")


def check_choices(cfg: Any, what: str) -> None:
    """Every field whose type names its values holds one of them."""
    for name, kind in get_type_hints(type(cfg)).items():
        choices, value = [c for c in get_args(kind) if isinstance(c, str)], getattr(cfg, name)
        if choices and value not in choices:
            raise BadInput(f"{what}: {name}={value!r} is not a choice{nearest(str(value), choices)}",
                           next=f"use one of {', '.join(choices)}")


def check_unused(cfg: Any, what: str, needs: Mapping[str, tuple[bool, str]]) -> None:
    """A choice that would silently do nothing is refused: the person believes that it acts.

    needs: field -> (whether it acts here, what it needs to act).
    """
    default = {f.name: f.default for f in fields(cfg)}
    for name, (used, need) in needs.items():
        if not used and getattr(cfg, name) != default[name]:
            raise BadInput(f"{what}: {name}={getattr(cfg, name)!r} has no effect here", f"it needs {need}",
                           f"leave {name} out, or choose {need}")


def changed(kind: type, base: Mapping[str, Any], changes: Mapping[str, Any], what: str) -> Any:
    """`kind(**base, **changes)`, refusing fields that do not exist."""
    known = [field.name for field in fields(kind)]
    for name in changes:
        if name not in known:
            raise BadInput(f"{what} has no choice {name!r}{nearest(name, known)}", next=f"the choices are {', '.join(known)}")
    return kind(**{**base, **changes})
