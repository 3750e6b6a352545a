"""Mutation check: flip each subtle choice, of the models' mathematics or of the engine, and see a test fail.

    python tests/mutate.py                 every mutant of tests/*/mutants/
    python tests/mutate.py engine          those of a room
    python tests/mutate.py deepseek moe    those of these files

A mutant is (file, old text, new text, pytest target); `old` must stand in the file exactly once, or the mutant is reported
as stale. Each runs in a copy of the package, first unchanged (the target must pass), then changed (it must fail).
Prints a line a mutant and the score; exits with 1 if one survives or is stale. The libraries that the targets import
are imported once, and every run is a fork: needs a Unix, and the package not imported here.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process without threads may fork
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("numba", "numpy", "safetensors", "tokenizers", "torch", "transformers", "hypothesis", "jinja2", "tiktoken")
LIMIT = 300  # seconds
CLOCK = itertools.count(1_000_000_000)
Mutant = tuple[str, str, str, str]


def mutants(names: list[str]) -> dict[str, list[Mutant]]:
    """file name -> its MUTANTS."""
    found: dict[str, list[Mutant]] = {}
    for path in sorted((ROOT / "tests").glob("*/mutants/*.py")):
        if names and not {path.stem, path.parts[-3]} & set(names):
            continue
        spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.MUTANTS
    return found


def warm(targets: set[str]) -> None:
    """Imports pytest's plugins, and what the tests take from other packages, so that every fork has them."""
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    import numba  # noqa: F401  the package imports it late

    helpers = (ROOT / "tests").glob("*/*.py")
    wanted = [path for path in helpers if not path.name.startswith("test_") or any(path.name in target for target in targets)]
    for node in (n for path in wanted for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.split(".")[0] in LIBRARIES:
            for name in node.names:
                getattr(importlib.import_module(module), name.name, None)  # transformers' classes are lazy


def passes(package: Path, target: str) -> bool:
    """Whether the target passes with this copy of the package. A target may be several words: files, `-k` expressions."""
    words = target.split(" -k ")
    command = ["-q", "-x", "-p", "no:cacheprovider", *words[0].split(), *(["-k", words[1]] if words[1:] else [])]
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)  # a mutant that never ends is killed, and so counts
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os.chdir(ROOT)
            sys.path.insert(0, str(package))
            os.environ["PYTHONPATH"] = str(package)  # of the processes that a test starts
            import pytest
            from hypothesis import Phase, settings

            settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])  # an example is enough, the smallest takes minutes
            settings.load_profile("mutants")
            code = 1
            try:
                code = int(pytest.main(command))
                sys.stdout.flush()
            finally:  # whatever a mutant raises: what the parent holds (the copy) must not be cleaned up here
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code > 2:  # 1: a test failed, 2: collection was interrupted by an error in the mutant
            log.seek(0)
            print(f"pytest could not run {target}:\n{log.read()[-2000:].decode(errors='replace')}", flush=True)
    return code == 0


def write(path: Path, text: str) -> None:
    """Each time with another time of change, in whole seconds: by that and its size Python tells whether bytecode is stale."""
    path.write_text(text, encoding="utf-8")
    now = next(CLOCK)
    os.utime(path, (now, now))


def outcome(mutant: Mutant, package: Path, sound: dict[str, bool]) -> str:
    """'killed', 'SURVIVED', 'STALE' (the text is not there once), or 'BROKEN' (the target fails without the change)."""
    file, old, new, target = mutant
    changed = package / Path(file).relative_to("src")
    source = changed.read_text(encoding="utf-8")
    if source.count(old) != 1:
        return "STALE"
    if target not in sound:
        sound[target] = passes(package, target)
    if not sound[target]:
        return "BROKEN"
    try:
        write(changed, source.replace(old, new))
        return "SURVIVED" if passes(package, target) else "killed"
    finally:
        write(changed, source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rooms, or files of tests/*/mutants/ without .py")
    counts: dict[str, int] = {}
    sound: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copytree(ROOT / "src" / "pellucid", package / "pellucid", ignore=shutil.ignore_patterns("__pycache__"))
        chosen = mutants(parser.parse_args().names)
        warm({mutant[3] for listed in chosen.values() for mutant in listed})
        assert "pellucid" not in sys.modules
        for name, listed in chosen.items():
            for mutant in listed:
                found = outcome(mutant, package, sound)
                counts[found] = counts.get(found, 0) + 1
                print(f"{found:<9} {name}: {mutant[0].removeprefix('src/pellucid/')}: {mutant[1].strip()[:60]!r} -> {mutant[2].strip()[:60]!r}", flush=True)
    total, killed = sum(counts.values()), counts.get("killed", 0)
    print(f"{killed} of {total} mutants killed ({killed / max(total, 1):.0%})" + "".join(
        f", {n} {what.lower()}" for what, n in counts.items() if what != "killed"))
    return int(killed < total)


if __name__ == "__main__":
    raise SystemExit(main())
