"""Imports go only downward: a room imports from floors below it, never from a sibling or from above."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import pellucid

PACKAGE = Path(pellucid.__file__).parent

# The one table of floors. The ground floor stands on its own foundation: errors and messages import nothing of ours.
FLOORS = [
    ["errors", "messages"],
    ["events", "files", "runtime"],
    ["ops", "tokenizers"],
    ["nn"],
    ["models", "optim", "quant"],
    ["data", "tasks", "plan", "parallel"],
    ["train", "engine"],
    ["align", "server", "rag"],
    ["agents"],
    ["grow", "lab"],
    ["cli"],
    ["__main__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms that import without torch; in `cli` it is imported inside the verbs' functions.
TORCH_FREE = ["errors", "messages", "events", "files", "runtime", "tokenizers", "tasks", "cli", "__main__"]


def rooms_imported(source: str, module: str = "pellucid.x") -> set[str]:
    """Rooms of pellucid that a module's source imports anywhere: at the top, in functions, for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" if base == "pellucid" else base for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name != "pellucid"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pellucid":
            names = [f"pellucid.{node.attr}"]  # the lazy face, or a room reached through `import pellucid`
        else:
            continue
        for name in names:
            if name.startswith("pellucid.") and name != "pellucid.__version__":
                word = name.split(".")[1]
                found.add(pellucid.FACE[word].split(".")[1] if word in pellucid.FACE else word)
    return found


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    return ".".join(["pellucid", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def test_every_room_has_a_floor():
    assert {room_of(p) for p in modules()} <= set(FLOOR_OF), "add the new room to FLOORS"


@pytest.mark.parametrize("room", [room for rooms in FLOORS for room in rooms])
def test_imports_only_go_downward(room: str):
    wrong = []
    for path in modules():
        if room_of(path) == room:
            others = rooms_imported(path.read_text(encoding="utf-8"), dotted(path)) - {room}
            wrong += [f"{path.name} imports {o}" for o in others if FLOOR_OF.get(o, 99) >= FLOOR_OF[room]]
    assert not wrong


@pytest.mark.parametrize(("source", "rooms"), [
    ("from pellucid import events, ops", {"events", "ops"}),
    ("import pellucid.engine.sampler as s", {"engine"}),
    ("def f():\n    from pellucid.nn.specs import Attn", {"nn"}),
    ("import pellucid\nv = pellucid.__version__", set()),
    ("import pellucid\nm = pellucid.load('x')", {"models"}),
    ("from pellucid import LLM", {"engine"}),
    ("from ..engine import LLM", {"engine"}),
    ("from . import sibling", {"quant"}),
    ("import torch, json", set()),
])
def test_the_reader_of_imports_sees_every_form(source: str, rooms: set[str]):
    assert rooms_imported(source, "pellucid.quant.int8") == rooms


def test_a_sideways_import_is_seen(tmp_path: Path):
    assert FLOOR_OF["models"] == FLOOR_OF["quant"] and FLOOR_OF["ops"] < FLOOR_OF["nn"] < FLOOR_OF["models"]
    assert len(FLOOR_OF) == sum(map(len, FLOORS)), "a room stands on one floor only"


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter without user site or network."""
    guard = "import socket\ndef _no(*a, **k): raise OSError('network used at import')\nsocket.socket.connect = _no\n"
    done = subprocess.run([sys.executable, "-c", guard + code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_light_rooms_import_without_torch():
    names = [dotted(p) for p in modules() if room_of(p) in TORCH_FREE]
    out = run_python(f"import importlib, sys\nfor n in {names}:\n  importlib.import_module(n)\n"
                     "  assert 'torch' not in sys.modules, n")
    assert out == ""


def test_importing_everything_prints_nothing_and_reaches_nothing():
    assert run_python(f"import importlib\nfor n in {[dotted(p) for p in modules()]}: importlib.import_module(n)") == ""


def test_every_declared_import_is_a_dependency():
    """What the package imports is in the standard library, in pyproject's dependencies, or in an extra."""
    distribution = {"huggingface_hub": "huggingface-hub", "PIL": "pillow", "opentelemetry": "opentelemetry-sdk"}
    imported = set(itertools.chain.from_iterable(outside(p) for p in modules()))
    text = (PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    declared = text[: text.index("dev = [")]
    missing = {m for m in imported if f'"{distribution.get(m, m)}>=' not in declared}
    assert not missing


def outside(path: Path) -> set[str]:
    """Top-level names of third-party modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"pellucid", ""}
