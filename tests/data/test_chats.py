"""Conversations from a file: the two forms, and an error for every way of getting them wrong."""

import gzip
import json

import pytest

from pellucid.data.chats import Chat, chat_of, read_chats
from pellucid.errors import BadInput

TURN = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write(path, *lines):
    raw = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_both_forms(tmp_path, name):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    file = write(tmp_path / name, {"messages": TURN, "tools": [{"name": "f"}]}, "", {"prompt": "2+2?", "completion": "4"},
                 {"prompt": TURN[:1], "completion": TURN[1:]}, {"messages": [parts, call]})
    first, second, third, fourth = read_chats(file)
    assert first == Chat(TURN, [{"name": "f"}]) and second == third == Chat(TURN)
    assert fourth.messages[0]["content"] == "ab" and fourth.messages[1]["content"] == ""


def test_sharegpt(tmp_path):
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    talk = [{"from": "human", "value": "2+2?"}, call, {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}]
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"conversations": talk, "system": "s", "tools": '[{"name": "f"}]', "id": 1},
                                {"conversations": TURN}]))
    first, second = read_chats(file)
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert first.messages[0]["content"] == "s" and first.tools == [{"name": "f"}] and second == Chat(TURN)
    assert first.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_parquet_and_its_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [[{**TURN[0], "name": "x"}, TURN[1]]]
    columns = {"messages": [*rows, None], "prompt": [None, "2+2?"], "completion": [None, "4"], "tools": pyarrow.nulls(2)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert list(read_chats(tmp_path / "a.parquet")) == [Chat([{**TURN[0], "name": "x"}, TURN[1]]), Chat(TURN)]


def test_the_key_is_the_question_not_the_answer():
    other = chat_of({"prompt": "2+2?", "completion": "four"})
    assert chat_of({"messages": TURN}).key == other.key != chat_of({"prompt": "2+3?", "completion": "4"}).key
    assert chat_of({"messages": [{"role": "system", "content": "s"}, *TURN]}).key != other.key
    begun = [chat_of({"messages": [{"role": "assistant", "content": greeting}]}).key for greeting in ("Hello.", "Hi.")]
    assert begun[0] != begun[1]  # the assistant begins: nothing was asked


@pytest.mark.parametrize("line, message", [
    ("[1]", "a list instead of an object"), ({"messages": []}, "at least one message"), ({"messages": "hi"}, "not a list"),
    ({"dialogue": TURN}, "'dialogue'"), ({}, "fields are none"), ({"prompt": "a"}, '"messages", or "prompt"'),
    ({"prompt": 1, "completion": "a"}, "must be strings"), ({"messages": ["hi"]}, "message 1 is a str"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
    ({"messages": [{"content": "a"}]}, '"role" None'), ({"messages": [{"role": 3, "content": "a"}]}, '"role" 3'),
    ({"messages": [{"role": "user"}]}, 'no text in "content"'), ({"messages": [{"role": "assistant"}]}, 'no text in "content"'),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "images, which these models cannot see"),
    ({"conversations": [{"from": "humans", "value": "a"}]}, "did you mean 'human'"), ({"conversations": 3}, "not a list"),
    ({"conversations": [{"from": "human", "value": 3}]}, 'no text in "content"'),
    ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "not JSON with a name"),
    ({"messages": TURN[:1]}, "nothing to learn"), ({"prompt": "a", "completion": " "}, "nothing to learn"),
    ({"messages": TURN, "tools": "f"}, '"tools"'), ({"messages": TURN, "tools": {"a": 1}}, '"tools"'), ("{", "is not JSON")])
def test_a_wrong_line_is_named_with_the_valid_form(tmp_path, line, message):
    file = write(tmp_path / "a.jsonl", {"messages": TURN}, line)
    stream = read_chats(file)
    assert next(stream) == Chat(TURN)
    with pytest.raises(BadInput) as error:
        next(stream)
    assert f"{file}, line 2" in error.value.what and message in str(error.value) and '"messages"' in error.value.next


def test_missing_empty_and_other_files(tmp_path):
    with pytest.raises(BadInput, match="there is no file"):
        read_chats(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("q,a")
    with pytest.raises(BadInput, match="neither JSONL nor Parquet"):
        read_chats(tmp_path / "a.csv")
    with pytest.raises(BadInput, match="is empty"):
        list(read_chats(write(tmp_path / "e.jsonl", "", " ")))
