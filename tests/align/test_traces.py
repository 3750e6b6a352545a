"""Traces: verified, deduplicated, resumed to the same file; the endpoint against a real HTTP server that misbehaves."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
from tiny_policy import Echo, policy, tokenizer

from pellucid import events
from pellucid.align.teachers import EndpointTeacher, LocalTeacher
from pellucid.align.traces import TraceConfig, check_template, collect, progress_file
from pellucid.data.chats import read_chats
from pellucid.errors import BadInput, PellucidError
from pellucid.tasks import Completion, make

TASK = make("chain")


class Scripted:
    """Right for even problems, wrong for odd; each answer three times with other spaces, then cut off."""

    name = "scripted"

    def __init__(self, fail_at: int | None = None):
        self.calls, self.fail_at = 0, fail_at

    def answer(self, problems, n, temperature, seed):
        self.calls += 1
        if self.calls == self.fail_at:
            raise PellucidError("no network")
        import random

        out = []
        for i, p in enumerate(problems):
            right = TASK.demonstrate(p, random.Random(0))
            text = right if i % 2 == 0 else "<think>\nno\n</think>\n\nnonsense"
            out.append([Completion(text if j < 2 else text.replace("\n\n", "\n\n\n") if j == 2 else text, 5, j != 3) for j in range(n)])
        return out


CONFIG = TraceConfig(problems=10, samples=4, keep=2, batch=4, temperature=1.0)


def test_only_verified_answers_equal_ones_once(tmp_path):
    file = tmp_path / "traces.jsonl"
    made = collect(Scripted(), TASK, file, CONFIG)
    assert (made.problems, made.answers, made.correct, made.duplicates, made.kept, made.solved) == (10, 40, 15, 10, 5, 5)
    chats = list(read_chats(file))  # what `pellucid train sft` reads
    assert len(chats) == 5
    for line, chat in zip(file.read_text().splitlines(), chats):
        record = json.loads(line)
        assert record["problem"] % 4 % 2 == 0 and record["teacher"] == "scripted" and chat.messages[-1]["role"] == "assistant"


def test_several_of_a_problem_at_most_keep(tmp_path):
    teacher = LocalTeacher(policy(), tokenizer(), Echo(), max_tokens=6)
    verify = lambda problem, said: {"correct": 1.0}  # every answer counts, so that many differ
    for keep in (1, 3):
        made = collect(teacher, Echo(), tmp_path / f"{keep}.jsonl", TraceConfig(problems=8, samples=12, keep=keep, temperature=1.0), verify=verify)
        records = [json.loads(x) for x in (tmp_path / f"{keep}.jsonl").read_text().splitlines()]
        counts = [sum(r["problem"] == n for r in records) for n in range(8)]
        assert max(counts) == keep and made.kept == sum(counts)
        assert len({(r["problem"], r["messages"][-1]["content"]) for r in records}) == len(records)


@pytest.mark.parametrize("torn", ["", '{"messages": [{"ro', "half a batch"])
def test_a_killed_run_ends_with_the_same_file(tmp_path, torn):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    collect(Scripted(), TASK, whole, CONFIG)
    with pytest.raises(PellucidError, match="no network"):
        collect(Scripted(fail_at=3), TASK, part, CONFIG)
    if torn == "half a batch":  # lines of the third batch that were written, but not accounted for
        torn = "".join(x for x in whole.read_text().splitlines(keepends=True) if json.loads(x)["problem"] == 8)
    with part.open("a") as f:
        f.write(torn)
    made = collect(Scripted(), TASK, part, CONFIG, resume=True)
    assert part.read_text() == whole.read_text() and made.answers == 40
    teacher = Scripted()
    collect(teacher, TASK, part, CONFIG, resume=True)
    assert teacher.calls == 0 and part.read_text() == whole.read_text()


def test_refusals(tmp_path):
    file = tmp_path / "t.jsonl"
    collect(Scripted(), TASK, file, CONFIG)
    with pytest.raises(BadInput, match="exists"):
        collect(Scripted(), TASK, file, CONFIG)
    with pytest.raises(BadInput, match="other settings"):
        collect(Scripted(), TASK, file, TraceConfig(problems=10, samples=2, keep=2, batch=4, temperature=1.0), resume=True)
    with pytest.raises(BadInput, match="no answer"):
        collect(Scripted(), TASK, tmp_path / "n.jsonl", CONFIG, verify=lambda p, said: {"correct": 0.0})
    with pytest.raises(BadInput, match="dialogue"):
        collect(Scripted(), make("lookup"), tmp_path / "d.jsonl", CONFIG)
    for wrong in ({"keep": 0}, {"temperature": 0.0}, {"batch": 0}):
        with pytest.raises(BadInput):
            TraceConfig(**wrong)


def test_a_template_that_drops_the_thought_is_refused(tmp_path):
    file = tmp_path / "t.jsonl"
    collect(Scripted(), TASK, file, CONFIG)
    check_template(tokenizer(), file)

    class Dropping:
        def encode_chat(self, messages, tools=None):
            messages = [{**m, "content": m["content"].rpartition("</think>")[2]} for m in messages]
            return tokenizer().encode_chat(messages)

        decode = staticmethod(tokenizer().decode)

    with pytest.raises(BadInput, match="drops the thought"):
        check_template(Dropping(), file)


# --- an endpoint --------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """script: statuses to answer with, in turn; then always 200."""

    script: list[int] = []
    seen: list[dict] = []
    reply: dict = {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        status = Server.script.pop(0) if Server.script else 200
        said = Server.reply if status == 200 else {"error": {"message": f"sorry {self.headers.get('Authorization')}"}}
        data = json.dumps(said).encode() if status != 299 else b"not json"
        self.send_response(200 if status == 299 else status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.script, Server.seen = [], []
    Server.reply = {"choices": [{"message": {"content": "42", "reasoning_content": "six times seven"}, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 7}}
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def problem():
    import random

    return TASK.sample(random.Random(0), "train")


def teacher(url, **more):
    return EndpointTeacher(url, "m", max_tokens=50, wait=0.01, timeout=5, **more)


def test_what_is_asked_and_understood(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    said = teacher(url + "/").answer([problem()] * 2, 2, 0.7, seed=5)
    assert said[0][0] == Completion("<think>\nsix times seven\n</think>\n\n42", 7, True) and [len(g) for g in said] == [2, 2]
    assert {s["path"] for s in Server.seen} == {"/v1/chat/completions"} and sorted(s["seed"] for s in Server.seen) == [5, 6, 7, 8]
    first = Server.seen[0]
    assert first["key"] == "Bearer sk-secret" and first["temperature"] == 0.7 and first["max_tokens"] == 50
    assert first["messages"] == [{"role": "user", "content": problem().prompt}]


def test_failures_for_the_moment_are_tried_again(url):
    Server.script = [500, 429, 299, 503]
    assert teacher(url, at_once=1).answer([problem()], 1, 0.7, 0)[0][0].finished and len(Server.seen) == 5
    assert Server.seen[0]["seed"] == Server.seen[4]["seed"]


def test_failures_for_good_end_it_and_never_show_the_key(url, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    heard = []
    with events.subscribed(heard.append):
        Server.script = [401]
        with pytest.raises(PellucidError) as refused:
            teacher(url, key_from="MY_KEY", at_once=1).answer([problem()], 1, 0.7, 0)
        assert len(Server.seen) == 1 and "MY_KEY" in str(refused.value.next)
        Server.script = [500] * 10
        with pytest.raises(PellucidError, match="3 attempts") as tired:
            teacher(url, key_from="MY_KEY", at_once=1, retries=2).answer([problem()], 1, 0.7, 0)
        Server.script = []
        collect(teacher(url, key_from="MY_KEY"), TASK, tmp_path / "t.jsonl", TraceConfig(problems=2, samples=2, temperature=1.0),
                verify=lambda p, said: {"correct": 1.0})
    everything = " ".join([str(refused.value), str(vars(refused.value)), str(tired.value), str(vars(tired.value)), repr(teacher(url, key_from="MY_KEY")),
                           str([e.as_dict() for e in heard]), (tmp_path / "t.jsonl").read_text(), progress_file(tmp_path / "t.jsonl").read_text()])
    assert "sk-secret" not in everything and "sorry Bearer ***" in everything


def test_answers_that_are_none_and_addresses_that_are_none(url):
    Server.reply = {"object": "list"}
    with pytest.raises(PellucidError, match="no chat completion"):
        teacher(url).answer([problem()], 1, 0.7, 0)
    with pytest.raises(PellucidError, match="attempts"):
        EndpointTeacher("http://127.0.0.1:9/v1", "m", retries=0).answer([problem()], 1, 0.7, 0)
    for wrong in ({"url": "localhost:8000"}, {"model": ""}):
        with pytest.raises(BadInput):
            EndpointTeacher(**{"url": url, "model": "m", **wrong})
