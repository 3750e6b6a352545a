"""Mutation check: flip each subtle choice of the models' mathematics, and see a test fail.

    python tests/mutate.py                 every mutant of tests/models/mutants/
    python tests/mutate.py deepseek moe    those of these files

A mutant is (file, old text, new text, pytest target); `old` must stand in the file exactly once, or the mutant is reported
as stale. Each runs in a copy of the package, first unchanged (the target must pass), then changed (it must fail).
Prints a line a mutant and the score; exits with 1 if one survives or is stale.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests" / "models" / "mutants"
Mutant = tuple[str, str, str, str]


def mutants(names: list[str]) -> dict[str, list[Mutant]]:
    """file name -> its MUTANTS."""
    found: dict[str, list[Mutant]] = {}
    for path in sorted(MUTANTS.glob("*.py")):
        if names and path.stem not in names:
            continue
        spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.MUTANTS
    return found


def passes(package: Path, target: str) -> bool:
    """Whether the target passes with this copy of the package. A target may be several words: files, `-k` expressions."""
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    words = target.split(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words[0].split(), *(["-k", words[1]] if words[1:] else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2):  # 1: a test failed, 2: collection was interrupted by an error in the mutant
        raise SystemExit(f"pytest could not run {target}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def outcome(mutant: Mutant, package: Path, sound: dict[str, bool]) -> str:
    """'killed', 'SURVIVED', 'STALE' (the text is not there once), or 'BROKEN' (the target fails without the change)."""
    file, old, new, target = mutant
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        return "STALE"
    if target not in sound:
        sound[target] = passes(package, target)
    if not sound[target]:
        return "BROKEN"
    changed = package / Path(file).relative_to("src")
    try:
        changed.write_text(source.replace(old, new), encoding="utf-8")
        return "SURVIVED" if passes(package, target) else "killed"
    finally:
        changed.write_text(source, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of tests/models/mutants/, without .py")
    counts: dict[str, int] = {}
    sound: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copytree(ROOT / "src" / "pellucid", package / "pellucid", ignore=shutil.ignore_patterns("__pycache__"))
        for name, listed in mutants(parser.parse_args().names).items():
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
