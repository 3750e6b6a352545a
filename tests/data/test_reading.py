"""Readers: every format, broken bytes and lines, links in circles, nothing held whole."""

import gzip
import io
import json
import os
import sys
import tracemalloc

import pytest

from pellucid import events
from pellucid.data import reading
from pellucid.data.corpora import read
from pellucid.data.reading import Document, files_in, pieces_of
from pellucid.errors import BadInput


def texts(path, *kinds):
    return [d.text for d in (read(path, kinds) if kinds else read(path))]


def noted(action):
    seen = []
    with events.subscribed(seen.append):
        action()
    return " | ".join(event.text for event in seen)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.md").write_text("# Title\n", encoding="utf-8")
    (tmp_path / "a.TXT").write_text("plain\r\nlines", encoding="utf-8", newline="")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text("x = '语言'\n", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"content": "two"}\n"three"\n', encoding="utf-8")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"messages": [{"role": "user", "content": "q"}, '
                                                        b'{"role": "assistant", "content": "a"}]}'))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    for hidden in (".git", "__pycache__", "node_modules"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "config.txt").write_text("not this")
    (tmp_path / ".hidden.txt").write_text("nor this")
    return tmp_path


def test_a_folder_of_every_kind_in_the_order_of_names(folder):
    assert list(read(folder)) == [
        Document("plain\nlines", "a.TXT"), Document("# Title\n", "b.md"), Document("x = '语言'\n", "code/main.py"),
        Document("one", "d.jsonl"), Document("two", "d.jsonl"), Document("three", "d.jsonl"), Document("q\n\na", "e.jsonl.gz")]
    assert texts(folder, "markdown", "source") == ["# Title\n", "x = '语言'\n"]
    assert texts(str(folder / "b.md")) == ["# Title\n"]


def test_a_file_of_unknown_suffix_named_directly_is_text(tmp_path):
    (tmp_path / "README").write_text("hello")
    assert texts(tmp_path / "README") == ["hello"]


def test_bad_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ok \xff\xfe caf\xe9 \xe8\xaf\xad end")
    found = []
    assert "3 bytes are not UTF-8" in noted(lambda: found.extend(texts(tmp_path)))
    assert found == ["ok \ufffd\ufffd caf\ufffd 语 end"]
    (tmp_path / "bad.txt").write_bytes("a real \ufffd is no error".encode())
    assert noted(lambda: texts(tmp_path)) == ""


def test_byte_order_marks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfutf8")
    (tmp_path / "b.txt").write_bytes("windows 语\r\n".encode("utf-16"))
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "json"}')
    assert texts(tmp_path) == ["utf8", "windows 语\n", "json"]


def test_binary_files_are_skipped_in_a_folder_and_refused_alone(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0\0\0")
    assert "b.txt: skipped" in noted(lambda: texts(tmp_path))
    with pytest.raises(BadInput, match="is not text"):
        texts(tmp_path / "b.txt")


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_pieces_join_to_the_whole_and_keep_to_their_size(size):
    text = "\n\n".join(f"paragraph {n}\nwith two lines" for n in range(40)) + "x" * 200
    pieces = list(pieces_of(io.StringIO(text), size))
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces)
    if size == 64:
        assert pieces[0].endswith("\n\n")


def test_a_large_file_is_never_held_whole(tmp_path):
    (tmp_path / "large.txt").write_text("word " * 200 + "\n", encoding="utf-8")
    with open(tmp_path / "large.txt", "ab") as f:
        for _ in range(24):
            f.write(b"0123456789 line of text\n" * 50_000)
    tracemalloc.start()
    total = sum(len(d.text) for d in read(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == (tmp_path / "large.txt").stat().st_size > 28e6 and peak < 12e6


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nbroken\n')
    stream = read(tmp_path)
    assert next(stream).text == "first"
    with pytest.raises(BadInput, match="line 2 is not JSON"):
        next(stream)


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="links need rights on Windows")
def test_links_in_circles_and_links_to_nothing(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("once")
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "also").symlink_to(tmp_path / "sub", target_is_directory=True)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "twice.txt").symlink_to(tmp_path / "sub" / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts(tmp_path) == ["once"]


def test_files_come_in_one_order_whatever_the_disk_says(folder, monkeypatch):
    expected = [file.name for file, _ in files_in(folder)]
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: reversed(list(scandir(place))))
    assert [file.name for file, _ in files_in(folder)] == expected


def test_files_without_permission(tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return  # the superuser may read everything; the next test shows the same with an error that is raised
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "b.txt").chmod(0)
    assert "b.txt: skipped" in noted(lambda: texts(tmp_path))
    with pytest.raises(BadInput, match="cannot read"):
        texts(tmp_path / "b.txt")


def test_an_unreadable_file_in_a_folder_is_skipped_and_told(folder, monkeypatch):
    def failing(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reading, "looks_binary", failing)
    assert "b.md: skipped, Permission denied" in noted(lambda: texts(folder))
    with pytest.raises(BadInput, match="cannot read"):
        texts(folder / "b.md")


def test_wrong_requests_are_refused_before_reading(tmp_path):
    with pytest.raises(BadInput, match="no file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="did you mean 'markdown'"):
        read(tmp_path, ["markdwn"])


def test_nothing_to_read_is_an_error_at_the_end(tmp_path):
    with pytest.raises(BadInput, match="no text found") as error:
        texts(tmp_path)
    assert "no file with a known suffix" in error.value.why
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(BadInput, match="no text found") as error:
        texts(tmp_path)
    assert "1 files" in error.value.why


@pytest.mark.parametrize("line, message", [
    ("{'text': 1}", "is not JSON"), ('{"text": "a"', "is not JSON"), ('{"body": "a"}', "no text can be found"),
    ('{"text": 3}', "no text can be found"), ("[1, 2]", "no text can be found"), ("[" * 100_000, "is not JSON"),
    ('{"n": ' + "9" * 5000 + "}", "is not JSON")])
def test_broken_lines_name_file_line_and_form(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(BadInput, match=message) as error:
        texts(file)
    assert f"{file}, line 3" in error.value.what and '{"text": "..."}' in error.value.next


def test_a_line_without_end_is_refused_and_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pellucid.data.records.MAX_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 5000 + '"}')
    with pytest.raises(BadInput, match="line 1: longer than"):
        texts(tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-12], lambda raw: b"not gzip", lambda raw: raw[:20] + b"\xff" * 20 + raw[40:]])
def test_broken_gzip(tmp_path, damage):
    lines = "\n".join(json.dumps({"text": f"{n * 7919 % 1000}"}) for n in range(1000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(lines)))
    with pytest.raises(BadInput, match=r"broken gzip|is not JSON"):
        texts(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / name, row_group_size=2)

    write("a.parquet", id=[1, 2, 3], text=["one", None, "three"])
    with pytest.raises(BadInput, match="row 2: no text"):
        texts(tmp_path)
    write("a.parquet", id=[1, 2, 3], text=["one", "", "语"])
    write("b.parquet", prompt=["p"], completion=["c"])
    write("c.parquet", messages=[[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]])
    assert texts(tmp_path) == ["one", "语", "p\n\nc", "q\n\na"]
    write("d.parquet", body=["x"])
    with pytest.raises(BadInput, match="no text column"):
        texts(tmp_path / "d.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "e.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="not a whole Parquet file"):
        texts(tmp_path / "e.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadInput, match="cannot read") as error:
        texts(tmp_path)
    assert "pip install 'pellucid[data]'" in error.value.next
