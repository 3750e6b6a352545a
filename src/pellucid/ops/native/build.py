"""Compiles the C++ kernels into one shared library. No Python headers, no PyTorch headers, only a C++17 compiler: seconds.

    python src/pellucid/ops/native/build.py

`pip install` runs this where a compiler is found (setup.py) and goes on without the library where none is. Where the package has
none, or its sources have changed since, the library is compiled when it is first needed, into the user's cache folder, once for
all copies of the package and all processes. $CXX names the compiler. The file's name carries a hash of the sources, so that a
library of other sources is never loaded. Standard library only: setup.py imports this file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16"))]
SECONDS = 300


def source_hash() -> str:
    files = sorted(p for p in HERE.iterdir() if p.suffix in (".h", ".cpp") or p.name == "build.py")
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "pellucid"


def find() -> Path | None:
    """The library of these sources, where it has been built: beside them, or in the cache folder."""
    name = f"kernels-{source_hash()}.lib"
    return next((folder / name for folder in (HERE, cache_folder()) if (folder / name).is_file()), None)


def find_or_build() -> Path:
    """One process compiles, the others wait for it. OSError: see `build`."""
    if found := find():
        return found
    import fcntl

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return find() or build(folder)


def compiler() -> str | None:
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def build(folder: Path) -> Path:
    """Compiles into that folder. OSError: no compiler, or what it complained about."""
    cxx = compiler()
    if cxx is None:
        raise OSError("no C++ compiler was found (g++, clang++ or c++ in PATH, or $CXX)")
    if os.name != "posix":
        raise OSError("the kernels' threads need a POSIX system")
    x86 = platform.machine() in ("x86_64", "AMD64")
    variants = {"base": [], **({"avx2": AVX2, "avx512": AVX512} if x86 else {})}
    with tempfile.TemporaryDirectory(prefix="pellucid-") as scratch:
        jobs = [(HERE / "kernels.cpp", name, [f"-DVARIANT={name}", *flags]) for name, flags in variants.items()]
        jobs += [(HERE / f"{name}.cpp", name, []) for name in ("main", "team")]
        objects = [os.path.join(scratch, f"{name}.o") for _, name, _ in jobs]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda job, out: _call([cxx, *FLAGS, *job[2], "-c", str(job[0]), "-o", out]), jobs, objects))
        out = os.path.join(scratch, "kernels.so")
        _call([cxx, "-shared", "-o", out, *objects, "-lpthread"])
        target = folder / f"kernels-{source_hash()}.lib"
        beside = shutil.copy(out, f"{target}.{os.getpid()}")  # another file system than scratch's, perhaps: then renamed, never half there
        os.replace(beside, target)
    return target


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took more than {SECONDS} seconds") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise OSError(f"{Path(command[0]).name} failed: {lines[0]}")


if __name__ == "__main__":
    try:
        for old in HERE.glob("kernels-*.lib"):
            old.unlink()
        print(build(HERE))
    except OSError as error:
        sys.exit(f"the C++ kernels were not built: {error}")
