"""Nothing half-written: files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pellucid.errors import PellucidError


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write to a temporary neighbour, then rename over `path`."""
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    with told_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with told_when_full(path), os.fdopen(handle, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder; on success it takes the place of `path`, on failure nothing changes.

    The old folder is moved aside before and removed after the swap, so that one of the two always exists.
    """
    path = Path(path)
    with told_when_full(path):
        if path.exists() and not path.is_dir():  # a person's file is no folder to replace
            raise NotADirectoryError(errno.ENOTDIR, "a file", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    aside = temporary.with_name(temporary.name + ".old")
    try:
        with told_when_full(path):
            yield temporary
        mask = _umask()
        os.chmod(temporary, 0o777 & ~mask)
        for file in temporary.rglob("*"):  # safetensors makes files that only their owner can read
            if file.is_file() and not file.is_symlink():
                os.chmod(file, 0o666 & ~mask)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    """The permissions that new files are to lack; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def told_when_full(path: str | os.PathLike[str]) -> Iterator[None]:
    """A full disk, a read-only place or a file where a folder should be, as an error that says so."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise PellucidError(
                f"could not write {path}", "the disk is full",
                "free some space, then run the same command with --resume; earlier files are intact") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise PellucidError(f"could not write {path}", "no permission to write there",
                                "choose another folder with --out") from error
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise PellucidError(f"could not write {path}", "a part of its path is a file, not a folder",
                                "choose another folder with --out") from error
        raise


def _system_error(error: Exception) -> int | None:
    """Its errno; safetensors, written in Rust, wraps the system's error in a text that ends in "(os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(told[1]) if told else None
