"""The C++ kernels under the compiler's sanitizers: nothing is read or written outside, overflows, or is read while another writes it.

    python tests/sanitize.py                                   addresses and undefined behaviour
    python tests/sanitize.py thread                            races (the kernels' threads are their own, without OpenMP: nothing is hidden)
    python tests/sanitize.py address tests/ops/test_native.py  of these tests only

Builds the library with `-fsanitize=...` in a copy of the package and runs the native tests with it, the sanitizers' runtime preloaded.
Needs g++ with its sanitizers, on Linux. Exits with 1 where a test fails or a sanitizer finds something: its report is printed.
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
TESTS = ["tests/ops/test_native.py", "tests/engine/test_native_step.py", "tests/engine/test_native_batch.py", "tests/ops/test_where_memory_lies.py"]
KINDS = {"address": ("address,undefined", ("libasan.so", "libubsan.so")), "thread": ("thread", ("libtsan.so",))}


def build_into(package: Path, checks: str) -> None:
    spec = importlib.util.spec_from_file_location("build", package / "ops" / "native" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={checks}", "-fno-sanitize-recover=undefined"]
    link, build.SECONDS = build._call, 1800
    build._call = lambda command: link([*command, f"-fsanitize={checks}"] if "-shared" in command else command)
    print(build.build(package / "ops" / "native"), flush=True)


def runtime(name: str) -> str:
    path = subprocess.run([os.environ.get("CXX", "g++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"the compiler has no {name}")
    return os.path.realpath(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, default="address")
    parser.add_argument("tests", nargs="*", default=TESTS)
    asked = parser.parse_args()
    checks, libraries = KINDS[asked.kind]
    with tempfile.TemporaryDirectory() as folder:
        package, reports = Path(folder) / "pellucid", Path(folder) / "report"
        shutil.copytree(ROOT / "src" / "pellucid", package, ignore=shutil.ignore_patterns("__pycache__", "*.lib"))
        build_into(package, checks)
        options = f"log_path={reports}:abort_on_error=0:halt_on_error={int(asked.kind == 'address')}"
        environment = {
            **os.environ, "PYTHONPATH": folder, "LD_PRELOAD": " ".join(map(runtime, libraries)), "OMP_NUM_THREADS": "2",
            "ASAN_OPTIONS": f"{options}:detect_leaks=0",  # Python keeps much until it ends
            "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
            "TSAN_OPTIONS": f"{options}:ignore_noninstrumented_modules=1:report_signal_unsafe=0:die_after_fork=0"}  # PyTorch's and numba's OpenMP is not ours
        # A compiler, and a shell that plays one, cannot start with the runtime of threads.
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiler", *asked.tests], cwd=ROOT, env=environment).returncode
        found = sorted(Path(folder).glob("report.*"))
        for path in found:
            print(path.read_text(errors="replace")[:20_000])
    print(f"{asked.kind}: {'tests passed' if code == 0 else 'tests failed'}, {len(found)} reports")
    return int(code != 0 or bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
