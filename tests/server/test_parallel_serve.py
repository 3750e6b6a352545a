"""`pellucid serve` with several processes, from the command line: answers, Ctrl-C, and the death of a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from tiny_splits import checkpoint, write_adapter

from pellucid.engine import LLM, SamplingParams
from pellucid.engine.adapters import read_adapter
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.opening import open_model
from pellucid.engine.request import Request
from pellucid.tokenizers import Tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc") if not os.environ.get("CI") else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint("deepseek-v3", tmp_path_factory.mktemp("served") / "model")


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str, list[dict]]:
    """The server, its address, and what it told until it listened."""
    command = [sys.executable, "-m", "pellucid", "serve", str(folder), "--name", "tiny", "--port", "0", "--json", "--cache-tokens", "2048", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told: list[dict] = []
    assert server.stdout is not None
    for line in server.stdout:
        told.append(json.loads(line))
        if told[-1]["kind"] == "serving":
            return server, told[-1]["url"], told
    raise AssertionError(server.communicate()[1])


def ask(url: str, **fields):
    body = json.dumps({"model": "tiny", "temperature": 0} | fields).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("options", [["--tp", "2"], pytest.param(["--disaggregate"], marks=pytest.mark.slow)])
def test_it_answers_as_one_process_and_ctrl_c_ends_all(folder, options):
    server, url, told = start(folder, *options)
    try:
        ready = [e for e in told if e["kind"] == "process_ready"]
        assert [e["rank"] for e in ready] == [0, 1] and all(e["peak"] > 2**20 and e["weights"] > 0 for e in ready)
        ranks = children(server.pid)
        assert len(ranks) == 2
        want = LLM(folder).generate(["hello world", "12 + 30"], SamplingParams(max_tokens=12))
        for prompt, output in zip(("hello world", "12 + 30"), want, strict=True):
            assert json.load(ask(url, prompt=prompt, max_tokens=12))["choices"][0]["text"] == output.outputs[0].text
        metrics = urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30).read().decode()
        assert 'vllm:generation_tokens_total{model_name="tiny"} 24' in metrics
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode in (0, 130) and "Traceback" not in errors
    assert gone(ranks)


def test_a_process_that_dies_ends_the_server_with_the_reason(folder):
    server, url, _ = start(folder, "--dp-attention", "2")
    ranks = children(server.pid)
    answer = ask(url, prompt="hello world", max_tokens=200, stream=True, ignore_eos=True)
    assert answer.readline().startswith(b"data: ")
    os.kill(ranks[1], signal.SIGKILL)
    rest = answer.read().decode()
    assert "process_died" in rest or '"error"' in rest
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "has ended" in errors and "signal 9" in errors and "Traceback" not in errors
    assert gone(ranks)
    with pytest.raises(urllib.error.URLError):
        ask(url, prompt="hello", max_tokens=1)


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(folder):
    server, _, _ = start(folder, "--dp", "2")
    ranks = children(server.pid)
    assert len(ranks) == 2
    server.kill()
    server.communicate(timeout=60)
    assert gone(ranks)


def test_adapters_come_and_go_in_all_processes(folder, tmp_path):
    """vLLM's endpoints; answers as from one process; the name is free again afterwards, and the model goes on."""
    (tmp_path / "later").mkdir()
    write_adapter(folder, tmp_path / "first", target_modules=["o_proj", "q_b_proj"], r=2, lora_alpha=8)
    write_adapter(folder, tmp_path / "later" / "second", target_modules=["o_proj"], r=3, lora_alpha=12)
    model, tokenizer = open_model(folder), Tokenizer.load(folder)
    want = {}
    for name, path in (("tiny", None), ("first", tmp_path / "first"), ("second", tmp_path / "later" / "second")):
        engine = Engine(model, tokenizer.eos_ids, EngineConfig(cache_tokens=512), tokenizer)
        request = Request(tokenizer.encode("hello world"), SamplingParams(max_tokens=12), adapter=read_adapter(path, model) if path else None)
        engine.add(request)
        while engine.busy:
            engine.step()
        want[name] = tokenizer.decode(request.output)
    server, url, _ = start(folder, "--tp", "2", "--adapters", str(tmp_path))
    try:
        def said(name: str) -> str:
            return json.load(ask(url, model=name, prompt="hello world", max_tokens=12))["choices"][0]["text"]

        def post(what: str, **body) -> str:
            request = urllib.request.Request(f"{url}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"})
            return urllib.request.urlopen(request, timeout=60).read().decode()

        assert said("first") == want["first"] != want["tiny"] == said("tiny")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post("load_lora_adapter", lora_name="second", lora_path="later")
        post("load_lora_adapter", lora_name="second", lora_path="later/second")
        assert said("second") == want["second"] not in (want["first"], want["tiny"]) and said("first") == want["first"]
        post("unload_lora_adapter", lora_name="first")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            said("first")
        post("load_lora_adapter", lora_name="first", lora_path="later/second")
        assert said("first") == want["second"] and said("tiny") == want["tiny"]
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode in (0, 130) and "Traceback" not in errors


@pytest.mark.parametrize("options", [
    ["--tp", "2", "--quantize", "int8", "--draft", "{folder}"],
    pytest.param(["--dp", "2", "--quantize", "int4", "--proposer", "lookup"], marks=pytest.mark.slow)])
def test_quantized_weights_and_drafts_from_the_command_line(folder, options):
    server, url, _ = start(folder, *(option.format(folder=folder) for option in options))
    try:
        llm = LLM(folder, quantize=options[3])
        for prompt in ("hello world", "12 + 30 = 42 12 + 30"):
            want = llm.generate([prompt], SamplingParams(max_tokens=16))[0].outputs[0].text
            assert json.load(ask(url, prompt=prompt, max_tokens=16))["choices"][0]["text"] == want
        metrics = urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30).read().decode()
        (accepted,) = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total{")]
        assert "--draft" not in options or float(accepted.split()[-1]) > 5
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_what_cannot_be_spread_is_refused_with_what_works(folder):
    done = subprocess.run([sys.executable, "-m", "pellucid", "serve", str(folder), "--tp", "3", "--port", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "4 attention heads cannot be shared out to 3 processes" in done.stderr and "use 1, 2 or 4" in done.stderr
