"""The public face is lazy, and quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pellucid

HEAVY = ["torch", "numpy", "transformers", "tokenizers", "tyro", "rich", "pellucid.cli", "pellucid.models"]


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pellucid_brings_nothing_heavy():
    out = fresh("import sys, time\nt = time.perf_counter()\nimport pellucid\nt = time.perf_counter() - t\n"
                f"print([m for m in {HEAVY} if m in sys.modules]); print(f'{{t:.4f}} s', file=sys.stderr)")
    assert out.strip() == "[]"


def test_help_brings_nothing_heavy():
    out = fresh("import sys\nfrom pellucid.__main__ import main\nfor argv in ([], ['--help'], ['--version'], "
                "['--lang', 'zh', '--help'], ['train', '--help']):\n    assert main(argv) == 0\n"
                f"print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip().endswith("[]")


def test_times_are_within_the_promise():
    """In processor time, best of several: other load on the machine hardly moves it. `-s` shows the figures."""
    def best(code: str) -> float:
        timed = f"import time\nt = time.process_time()\n{code}\nprint(time.process_time() - t)"
        return min(float(fresh(timed).split()[-1]) for _ in range(5))

    face, page = best("import pellucid"), best("from pellucid.__main__ import main\nmain(['--help'])")
    print(f"import pellucid {face * 1e3:.1f} ms, --help {page * 1e3:.1f} ms")
    assert face < 0.1 and page < 0.3


def test_dir_lists_the_face_without_importing_it():
    assert set(pellucid.FACE) <= set(dir(pellucid))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        pellucid.lod  # noqa: B018


@pytest.mark.parametrize("name", sorted(pellucid.FACE))
def test_every_name_of_the_face_is_there(name: str):
    assert getattr(pellucid, name) is getattr(pellucid, name)
