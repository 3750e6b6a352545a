"""Nothing half-written: full disks, failures and kills leave the earlier file or folder as it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pellucid import files
from pellucid.errors import PellucidError


def fail_with(number: int):
    def call(*args, **kw):
        raise OSError(number, os.strerror(number))
    return call


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch, where: str):
    path = tmp_path / "report.json"
    files.write_atomic(path, "old")
    monkeypatch.setattr(os, where, fail_with(errno.ENOSPC))
    with pytest.raises(PellucidError if where == "fsync" else OSError):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"),  # EDQUOT: a quota
    (errno.EACCES, "no permission"), (errno.EROFS, "no permission"), (errno.EPERM, "no permission")])
def test_the_error_says_what_why_and_next(tmp_path: Path, number: int, words: str):
    with pytest.raises(PellucidError) as told, files.told_when_full(tmp_path / "x"):
        raise OSError(number, "x")
    assert words in told.value.why and told.value.next and told.value.exit_code == 1


@pytest.mark.parametrize("place", ["a", "a/b"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / place
    with pytest.raises(PellucidError, match="could not write") as told:
        files.write_atomic(path, "x")
    assert "is a file" in told.value.why
    with pytest.raises(PellucidError, match="could not write"), files.atomic_folder(path):
        pytest.fail("began")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_room_for_a_folder_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "mkdir", fail_with(errno.ENOSPC))
    with pytest.raises(PellucidError) as told:
        files.write_atomic(tmp_path / "a" / "b", "x")
    assert "disk is full" in told.value.why


def test_other_system_errors_pass_unchanged(tmp_path: Path):
    with pytest.raises(IsADirectoryError), files.told_when_full(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "x")


def test_write_atomic_makes_folders_and_writes_text_and_bytes(tmp_path: Path):
    files.write_atomic(tmp_path / "a" / "b.txt", "澄明")
    files.write_atomic(tmp_path / "a" / "c.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "澄明".encode()
    assert (tmp_path / "a" / "c.bin").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failed_folder_leaves_the_old_one(tmp_path: Path, error: BaseException):
    folder = tmp_path / "model"
    with files.atomic_folder(folder) as f:
        (f / "weights").write_text("old")
    with pytest.raises((type(error), PellucidError)), files.atomic_folder(folder) as f:
        (f / "weights").write_text("new")
        raise error
    assert (folder / "weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path):
    for name in ("one", "two"):
        with files.atomic_folder(tmp_path / "model") as f:
            (f / name).write_text(name)
    assert os.listdir(tmp_path / "model") == ["two"] and os.listdir(tmp_path) == ["model"]


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch):
    with files.atomic_folder(tmp_path / "model") as f:
        (f / "old").write_text("x")
    real, calls = os.replace, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "x")
        real(a, b)
    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError), files.atomic_folder(tmp_path / "model") as f:
        (f / "new").write_text("x")
    assert os.listdir(tmp_path / "model") == ["old"]


KILLED = """
import os, signal, sys
from pathlib import Path
from pellucid import files
path = Path(sys.argv[1])
real, calls = os.replace, []
def kill(a, b):
    calls.append(a)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = kill
if sys.argv[2] == "file":
    files.write_atomic(path, "new")
else:
    with files.atomic_folder(path) as f:
        (f / "weights").write_text("new")
"""


@pytest.mark.parametrize(("what", "at"), [("file", 1), ("folder", 1), ("folder", 2)])
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_kill_in_the_middle_leaves_the_old_state(tmp_path: Path, what: str, at: int):
    path = tmp_path / "thing"
    if what == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "weights").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), what, str(at)], timeout=240)
    assert done.returncode == -signal.SIGKILL
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.read_text() == "old"]
    assert len(kept) == 1  # under its own name, or (killed between the two renames) beside it, whole
    if at == 1:
        assert kept[0] in (path, path / "weights")


def test_weights_on_a_full_disk(tmp_path: Path):
    """What safetensors raised when it wrote to a small tmpfs: no OSError."""
    from safetensors import SafetensorError

    with pytest.raises(PellucidError) as told, files.atomic_folder(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert told.value.why == "the disk is full" and not list(tmp_path.iterdir())
    with pytest.raises(SafetensorError), files.told_when_full(tmp_path):
        raise SafetensorError("something else")


def test_files_of_a_folder_have_ordinary_permissions(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    with files.atomic_folder(tmp_path / "model") as folder:
        (folder / "deeper").mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"x": torch.ones(4)}, folder / "deeper" / "model.safetensors")
    made = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*")}
    assert made["model.safetensors"] == made["config.json"] and made["deeper"] == (tmp_path / "model").stat().st_mode & 0o777
