"""chat, generate, serve, quantize and inspect as a person and as a program meet them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pellucid import events
from pellucid.__main__ import main
from pellucid.cli.chat import Conversation, Part, harmless, show
from pellucid.engine import LLM, SamplingParams
from pellucid.errors import BadInput
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, forward_flops, init_weights
from pellucid.quant import is_quantized
from pellucid.tasks import TOOLS
from pellucid.tokenizers import Tokenizer, train_bpe

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "17*3"}}\n</tool_call>'


def small_tokenizer() -> Tokenizer:
    return train_bpe(["one two three four five six " * 40, "".join(map(chr, range(32, 700))), CALL * 5], 450)


SPEC = DecoderSpec(450, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, tied=True, context=320)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save(init_weights(Decoder(SPEC), seed=2), path, tokenizer=small_tokenizer())
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = main([*map(str, argv), "--threads", "1"])
    out = capsys.readouterr()
    return code, out.out, out.err


def told(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---- a conversation -----------------------------------------------------------------------------------------------

class Speaker:
    """Stands for an LLM: says its lines in pieces of three characters, and remembers the prompts."""

    context = 320

    def __init__(self, *replies: str):
        self.replies, self.heard = list(replies), []
        self.tokenizer = small_tokenizer()

    def chat_ids(self, messages: Any, tools: Any = None) -> list[int]:
        return self.tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=True)[0]

    def stream(self, ids: list[int], params: SamplingParams) -> Iterator[Any]:
        from pellucid.engine import Chunk

        self.heard.append((self.tokenizer.decode(ids), params))
        text = self.replies.pop(0)
        for i in range(0, len(text), 3):
            yield Chunk(text[i : i + 3], [0])
        yield Chunk("", [1], "stop")


def shown(parts: Any, interactive: bool = True) -> str:
    out = io.StringIO()
    show(parts, out, interactive)
    return out.getvalue()


def test_tool_is_called_and_its_result_is_fed_back():
    speaker = Speaker(f"<think>\nmultiply\n</think>\n\n{CALL}", "<think>\nso\n</think>\n\n51")
    talk = Conversation(speaker, SamplingParams(64), {"calculator": TOOLS["calculator"]})  # type: ignore[arg-type]
    seen: list[Any] = []
    with events.subscribed(seen.append):
        text = shown(talk.ask("17 times 3?"))
    assert text == 'multiply\ncalculator {"expression": "17*3"} = 51\nso\n51\n'
    assert "<tool_response>\n51\n</tool_response>" in speaker.heard[1][0] and '"17*3"' in speaker.heard[1][0]
    assert speaker.tokenizer.id_of("<tool_call>") in speaker.chat_ids(talk.messages), "the call is structure, not quoted text"
    (turn,) = [e for e in seen if e.kind == "turn"]
    assert (turn.content, turn.finish_reason) == ("51", "stop")
    assert turn.calls == [{"name": "calculator", "arguments": '{"expression": "17*3"}', "result": "51"}]


@pytest.mark.parametrize(("call", "result"), [
    ('{"name": "rm", "arguments": {}}', "error: no tool 'rm'"),
    ('{"name": "calculator", "arguments": {"code": "1"}}', "error: "),
    ('{"name": "calculator", "arguments": {"expression": "__import__(1)"}}', "error: "),
    ('{"name": "calculator", "arguments": {"expression": 5}}', "error: "),
])
def test_bad_calls_are_told_to_the_model(call: str, result: str):
    speaker = Speaker(f"<tool_call>{call}</tool_call>", "sorry")
    talk = Conversation(speaker, SamplingParams(64), {"calculator": TOOLS["calculator"]})  # type: ignore[arg-type]
    assert shown(talk.ask("?"), interactive=False) == "sorry\n"
    assert talk.messages[2]["role"] == "tool" and talk.messages[2]["content"].startswith(result)


def test_a_model_that_only_calls_is_stopped():
    talk = Conversation(Speaker(*[CALL] * 9), SamplingParams(64), {"calculator": TOOLS["calculator"]})  # type: ignore[arg-type]
    list(talk.ask("?"))
    assert len(talk.llm.replies) == 5 and talk.messages[-1]["role"] == "tool"


def test_without_a_tool_the_call_is_shown():
    talk = Conversation(Speaker(CALL), SamplingParams(64))  # type: ignore[arg-type]
    assert shown(talk.ask("?")) == 'calculator {"expression": "17*3"}\n'


def test_an_answer_that_is_broken_off_stays_in_the_conversation():
    talk = Conversation(Speaker("one two three four five", "six"), SamplingParams(64), system="be kind")  # type: ignore[arg-type]
    parts = talk.ask("count")
    said = next(parts).text + next(parts).text
    seen: list[Any] = []
    with events.subscribed(seen.append):
        parts.close()
    assert seen[0].finish_reason == "cancelled"
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    assert said.strip() and talk.messages[-1]["content"].startswith(said.strip())
    list(talk.ask("go on"))
    assert "count" in talk.llm.heard[1][0] and said.strip() in talk.llm.heard[1][0]
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "be kind"}]


def test_old_exchanges_are_forgotten_when_the_context_is_full():
    talk = Conversation(Speaker(*["four five six " * 6] * 9), SamplingParams(80), system="be kind")  # type: ignore[arg-type]
    for i in range(9):
        list(talk.ask(f"one two three number {i}"))
    last, params = talk.llm.heard[-1]
    assert "be kind" in last and "number 8" in last and "number 0" not in last and talk.forgotten > 0
    assert last.count("<|im_start|>user") == last.count("<|im_start|>assistant") >= 2, "whole exchanges go"
    assert params.max_tokens >= 80
    before = list(talk.messages)
    with pytest.raises(BadInput, match="too long"):
        list(talk.ask("one two " * 300))
    assert talk.messages == before[:1] or talk.messages[-1] == before[-1], "the message that did not fit is taken back"


def test_the_terminal_is_not_steered_by_a_model():
    assert harmless("a\x1b[2Jb\x07\r\n\t中　😀") == "a\ufffd[2Jb\ufffd\ufffd\n\t中　😀"
    assert shown([Part("content", "x\x1b[31m")]) == "x\ufffd[31m\n"
    assert shown([Part("content", "x\x1b[31m")], interactive=False) == "x\x1b[31m\n"


# ---- chat as a process --------------------------------------------------------------------------------------------

def test_chat_answers_every_line_of_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n\n/clear\none two\n/exit\nnever\n"))
    code, out, _ = run(capsys, "chat", folder, "--max-tokens", "6", "--json")
    turns = [e for e in told(out) if e["kind"] == "turn"]
    assert code == 0 and [t["prompt"] for t in turns] == ["one two"] * 2
    assert turns[0]["content"] == turns[1]["content"] and turns[0]["tokens"] == 6
    llm = LLM(folder)
    expected = llm.chat([{"role": "user", "content": "one two"}], SamplingParams(6)).outputs[0].text
    assert turns[0]["content"] == expected


def test_chat_on_a_terminal(folder: Path):
    """Ctrl-C stops the answer and not the program; Ctrl-D ends it."""
    def read_until(text: str, seconds: float = 280) -> str:
        end = time.monotonic() + seconds
        while text not in "".join(seen)[start:]:
            assert time.monotonic() < end, "".join(seen)
            if select.select([screen], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    seen.append(os.read(screen, 4096).decode(errors="replace"))
        return "".join(seen)[start:]

    pid, screen = pty.fork()
    if pid == 0:
        slow = ("import sys, time; from pellucid.engine.core import Engine; step = Engine.step\n"
                "def slowly(self):\n  time.sleep(0.05); return step(self)\n"
                "Engine.step = slowly\nfrom pellucid.__main__ import main\n"
                f"sys.exit(main(['chat', {str(folder)!r}, '--max-tokens', '200', '--threads', '1']))")
        os.execve(sys.executable, [sys.executable, "-c", slow], {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"})
    seen: list[str] = []
    start = 0
    try:
        read_until("> ")
        os.write(screen, b"one two\n")
        time.sleep(2)
        start = len("".join(seen))
        os.write(screen, b"\x03")
        assert " ..." in read_until("> ")
        time.sleep(1)  # a key pressed while the line editor sets up the terminal is dropped by the system
        start = len("".join(seen))
        os.write(screen, b"\x03")
        read_until("> ")
        time.sleep(1)
        os.write(screen, b"/exit\n")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(screen)


# ---- generate -----------------------------------------------------------------------------------------------------

def test_generate_is_what_the_engine_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    llm = LLM(folder)
    expected = [o.outputs[0].text for o in llm.generate(["one", "two three"], SamplingParams(8))]
    assert run(capsys, "generate", folder, "one", "--max-tokens", "8")[:2] == (0, expected[0] + "\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo three\n")
    code, out, _ = run(capsys, "generate", folder, "--file", prompts, "--max-tokens", "8", "--json")
    found = [e for e in told(out) if e["kind"] == "generated"]
    assert code == 0 and [(e["prompt"], e["index"], e["text"], e["tokens"], e["finish_reason"]) for e in found] == [
        ("one", 0, expected[0], 8, "length"), ("two three", 0, expected[1], 8, "length")]


def test_generate_samples_by_seed(folder: Path, capsys: pytest.CaptureFixture[str]):
    def texts(seed: int) -> list[str]:
        out = run(capsys, "generate", folder, "one", "--n", "3", "--temperature", "1", "--seed", seed, "--max-tokens", "6", "--json")[1]
        return [e["text"] for e in told(out) if e["kind"] == "generated"]

    assert texts(1) == texts(1) and len(set(texts(1))) == 3 and texts(1)[1:] == texts(2)[:2]


@pytest.mark.parametrize(("argv", "says"), [
    (["one", "--file", "x"], "both a prompt and --file"),
    (["--file", "no-such-file"], "there is no file"),
    (["one", "--max-tokens", "100000"], "context of 320"),
    (["one " * 400], "context is 320"),
    (["one", "--top-p", "0"], "top_p"),
    ([""], "empty"),
])
def test_generate_refuses(folder: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "generate", folder, *argv)
    assert code == 2 and says in err


# ---- inspect and quantize -----------------------------------------------------------------------------------------

def test_inspect_counts(folder: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "inspect", folder, "--json", "--cache-dtype", "float32")
    (event,) = [e for e in told(out) if e["kind"] == "evaluation"]
    facts = event["details"]
    assert code == 0 and facts["parameters"] == count_parameters(SPEC) == sum(p.numel() for p in Decoder(SPEC).parameters())
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4 and facts["dtype"] == "float32"
    assert facts["flops_at_full_context"] == forward_flops(SPEC, 320)
    assert f"{count_parameters(SPEC):,}" in run(capsys, "inspect", folder)[1]


def test_quantize_writes_and_compares(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = tmp_path / "text.txt"
    corpus.write_text("one two three four five six " * 60)
    out_folder = tmp_path / "int8"
    code, out, err = run(capsys, "quantize", folder, "--out", out_folder, "--corpus", corpus, "--tasks", "sorting", "--problems", "3",
                         "--max-tokens", "4", "--json")
    assert code == 0, err
    (event,) = [e for e in told(out) if e["kind"] == "evaluation"]
    measured = event["details"]
    assert event["value"] == measured["size_ratio"] < 0.4
    assert abs(measured["bits_per_byte"]["int8"] / measured["bits_per_byte"]["float32"] - 1) < 0.01
    assert set(measured["accuracy"]) == {"float32", "int8"}
    llm = LLM(out_folder)
    assert is_quantized(llm.model) and llm.generate("one", SamplingParams(3))
    assert "pellucid-int8" in run(capsys, "inspect", out_folder)[1]
    assert run(capsys, "generate", out_folder, "one", "--max-tokens", "2")[0] == 0
    code, _, err = run(capsys, "quantize", out_folder, "--out", tmp_path / "again", "--corpus", corpus)
    assert code == 2 and "already" in err


def test_the_table(monkeypatch: pytest.MonkeyPatch):
    from pellucid.cli.quantize import table

    lines = table({"bytes": {"float32": 4e6, "int8": 1e6}, "bits_per_byte": {"float32": 2.0, "int8": 2.01},
                   "tokens_per_second": {"1": {"float32": 100.0, "bfloat16": 150.0, "int8": 50.0}}})
    assert [line.split()[-1] for line in lines[1:]] == ["0.250", "1.005", "0.500"]
    assert "150" in lines[3] and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(("argv", "says"), [(["--tasks", "sortin"], "sorting"), (["--out", "."], "")])
def test_quantize_refuses_before_it_works(folder: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "quantize", folder, *argv)
    assert code == 2 and says in err and (tmp_path / "file").exists()


# ---- serve --------------------------------------------------------------------------------------------------------

def test_serve_until_interrupted(folder: Path, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    command = [sys.executable, "-m", "pellucid", "serve", str(folder), "--port", "0", "--api-key-file", str(key), "--threads", "1", "--lang", "en"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        printed = ""
        while "curl" not in printed:
            line = process.stderr.readline()
            assert line, printed
            printed += line
        url = re.search(r"http://127\.0\.0\.1:\d+", printed).group()
        assert "s3cret" not in printed and "Authorization: Bearer KEY" in printed and '"model": "model"' in printed
        for _ in range(200):
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{url}/v1/models").status_code == 401
                break
            time.sleep(0.1)
        body = {"model": "model", "messages": [{"role": "user", "content": "one"}], "max_tokens": 3}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer s3cret"}, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 3
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err and "s3cret" not in out + err, err
    finally:
        if process.poll() is None:
            process.kill()


def test_serve_tells_what_is_wrong_first(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run(capsys, "serve", tmp_path / "no-model", "--port", taken.getsockname()[1])
        assert code == 2 and "cannot listen" in err
    code, _, err = run(capsys, "serve", tmp_path / "no-model", "--port", "0")
    assert code == 2 and "no checkpoint folder" in err
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing"):
        code, _, err = run(capsys, "serve", folder, "--port", "0", "--api-key-file", tmp_path / name)
        assert code == 2 and name in err


@pytest.mark.parametrize(("host", "locked", "lang", "warned"), [
    ("0.0.0.0", False, "en", "warning: everybody"), ("0.0.0.0", False, "zh", "警告"), ("0.0.0.0", True, "en", ""),
    ("127.0.0.1", False, "en", ""), ("127.0.0.2", False, "en", ""), ("localhost", False, "en", "")])
def test_serve_warns_where_everybody_may_ask(
        folder: Path, tmp_path: Path, host: str, locked: bool, lang: str, warned: str, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "key").write_text("s3cret")
    monkeypatch.setattr("pellucid.server.run.serve_forever", lambda *args, **options: None)
    more = ["--api-key-file", tmp_path / "key"] if locked else []
    code, _, err = run(capsys, "serve", folder, "--host", host, "--port", "0", "--quiet", "--lang", lang, *more)
    assert code == 0, err
    assert ("--api-key-file" in err) == bool(warned) and warned in err
    if warned:
        assert all(word in err for word in {"en": ("why: --host 0.0.0.0", "next: "), "zh": ("原因: ", "下一步: ")}[lang])


def test_a_checkpoint_with_holes_runs_when_asked_to(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "holes")
    path = tmp_path / "holes" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, err = run(capsys, "generate", tmp_path / "holes", "one", "--max-tokens", "3")
    assert code == 2 and "missing: model.layers.0.mlp.up_proj.weight (1)" in err and "--allow-missing" in err
    code, _, err = run(capsys, "generate", tmp_path / "holes", "one", "--max-tokens", "3", "--allow-missing")
    assert code == 0 and "model.layers.0.mlp.up_proj.weight" in err
