"""Who answers a task's problems for others to learn from: a local model, or any endpoint that speaks OpenAI's chat protocol."""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from pellucid.align.prompts import content_of
from pellucid.align.rollout import Rollouts
from pellucid.errors import BadInput, PellucidError
from pellucid.nn import Decoder
from pellucid.tasks import Completion, Problem, Task, dialogue_of
from pellucid.tasks.task import completion
from pellucid.tokenizers import Tokenizer

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses after which the same request may well succeed
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for


class Teacher(Protocol):
    """Answers problems."""

    @property
    def name(self) -> str:
        """What traces say of their origin."""
        ...

    def answer(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[list[Completion]]:
        """n completions of each problem."""
        ...


class LocalTeacher:
    """A model in this process."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, task: Task, *, max_tokens: int, name: str = "local"):
        self.name = name
        self.rollouts = Rollouts(model.eval(), tokenizer, task, max_tokens=max_tokens)

    def answer(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[list[Completion]]:
        return [list(group) for group in self.rollouts.for_evaluation(seed)(list(problems), n, temperature)]


@dataclass
class EndpointTeacher:
    """A model behind an endpoint: OpenAI, vLLM, SGLang, llama.cpp, Ollama, `pellucid serve` ...

    The key is read from the environment variable `key_from` for each request, and is kept, written and shown nowhere.
    A request that fails for the moment (no connection, timeout, 429, 5xx) is made again, up to `retries` times, each time after
    twice the wait, or after what the server's Retry-After says.
    """

    url: str
    model: str
    max_tokens: int = 2048
    key_from: str = "OPENAI_API_KEY"
    timeout: float = 600.0
    retries: int = 5
    at_once: int = 8
    wait: float = 1.0
    """Seconds before the first repetition."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the request's body."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BadInput(f"{self.url} is no address of an endpoint", "it must begin with http:// or https://",
                           "for instance http://localhost:8000/v1")
        if not self.model:
            raise BadInput("which model of the endpoint?", "its name is missing", "give --teacher-model NAME")
        self.url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    @property
    def name(self) -> str:
        return self.model

    def answer(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[list[Completion]]:
        asked = [(problem, seed + i * n + j) for i, problem in enumerate(problems) for j in range(n)]
        pool = ThreadPoolExecutor(self.at_once)
        try:
            said = list(pool.map(lambda job: self._one(job[0], temperature, job[1]), asked))
        finally:
            pool.shutdown(cancel_futures=True)  # one failure ends the batch: what is not yet asked is not asked
        return [said[i * n : (i + 1) * n] for i in range(len(problems))]

    def _one(self, problem: Problem, temperature: float, seed: int) -> Completion:
        content = content_of(problem)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": self.max_tokens, "seed": seed,
                **self.extra}
        reply = self._request(body, random.Random(seed))
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
            tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise PellucidError("the teacher's answer is no chat completion", f"it begins {json.dumps(reply)[:120]}",
                                "check that the address is that of an OpenAI-compatible endpoint") from None
        if thought and "<think>" not in text:  # servers that part the thought from the answer
            text = completion(thought.strip(), text.strip())
        return Completion(text, tokens, choice.get("finish_reason") == "stop")

    def _request(self, body: dict[str, Any], rng: random.Random) -> Any:
        why = ""
        for attempt in range(self.retries + 1):
            headers = {"Content-Type": "application/json"}
            if key := os.environ.get(self.key_from):
                headers["Authorization"] = f"Bearer {key}"
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            asked_for = 0.0
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {_said(error)}"
                if error.code not in AGAIN:
                    raise PellucidError("the teacher refuses the request", self._without_key(why), self._advice(error.code)) from None
                asked_for = _retry_after(error.headers.get("Retry-After"))
            except (OSError, ValueError) as error:  # no connection, a timeout, half an answer
                why = str(error) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(max(self.wait * 2**attempt * (1 + 0.25 * rng.random()), asked_for), LONGEST_WAIT))
        raise PellucidError(f"the teacher at {self.url} gave no answer in {self.retries + 1} attempts", self._without_key(why),
                            "what was made is kept: go on later with the same command and --resume")

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.key_from)
        return text.replace(key, "***") if key else text

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"put a valid key into the environment variable {self.key_from}, or name another with --key-from"
        return "check --teacher-model and the address" if status == 404 else ""


def _said(error: urllib.error.HTTPError) -> str:
    try:
        body = json.loads(error.read() or b"{}")
        told = body.get("error", body) if isinstance(body, dict) else body
        return str(told.get("message", told) if isinstance(told, dict) else told)[:300]
    except (ValueError, OSError):
        return error.reason if isinstance(error.reason, str) else ""


def _retry_after(value: str | None) -> float:
    """Seconds; a date, which the header may hold as well, is not worth a parser: the usual wait does."""
    try:
        return max(float(value or 0), 0.0)
    except ValueError:
        return 0.0


def check_single_turn(task: Task, problem: Problem) -> None:
    """A dialogue with tools is no single completion. Errors: BadInput."""
    if dialogue_of(task, problem) is not None:
        raise BadInput(f"the task {problem.task} is a dialogue with tools", "traces are single answers",
                       "distil it on-policy (--method on-policy), or train on its demonstrations")
