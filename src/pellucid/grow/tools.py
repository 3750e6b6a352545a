"""Stage 7: the grown model behind the real server, asked through HTTP in OpenAI's protocol, calling a real calculator.

No grader stands in between: the server parses the call from the model's text, the calculator computes, its result goes
back as a tool message, and the model answers. Solved: the calculator's result and the final answer are both right.
"""

from __future__ import annotations

import json
import random
import urllib.request
from typing import TYPE_CHECKING, Any

from pellucid import events, tasks
from pellucid.engine import LLM
from pellucid.server import running_server

if TYPE_CHECKING:
    from pellucid.grow.job import Job, Result

ASKED = 40


def run(job: Job) -> Result:
    from pellucid.grow.job import Result

    task = tasks.make("calculator")
    rng = random.Random(job.config.seed + 5)
    problems = [task.sample(rng, "heldout") for _ in range(min(ASKED, max(4, job.problems // 10)))]
    llm = LLM(job.model, job.tokenizer)
    with running_server(llm, name="grown") as url:
        cases = [ask(url, p) for p in problems]
    solved = sum(c["solved"] for c in cases)
    shown = next((c for c in cases if c["solved"]), cases[0])
    job.report["tools"] = {"transcript": shown["messages"], "solved": solved, "asked": len(cases), "cases": cases[:8]}
    events.emit(events.SampleShown("tools", shown["messages"][0]["content"], str(shown["call"]), {"solved": float(shown["solved"])}))
    return Result("problems solved through the server", "", True, None, solved / len(cases), {"asked": len(cases)})


def ask(url: str, problem: tasks.Problem) -> dict[str, Any]:
    """One problem over HTTP: question, tool call, the calculator's result, final answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": problem.prompt}]
    message = reply(url, messages)
    messages.append(message)
    calls = message.get("tool_calls") or []
    if len(calls) != 1:
        return {"messages": messages, "call": None, "result": None, "solved": False}
    function = calls[0]["function"]
    result = call_tool(function["name"], function["arguments"])
    messages.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": result})
    messages.append(reply(url, [messages[0], {k: v for k, v in message.items() if k != "reasoning_content"}, messages[-1]]))
    final = (messages[-1].get("content") or "").strip()
    return {"messages": messages, "call": function["arguments"], "result": result, "answer": final,
            "solved": result == expected(problem) == final}


def reply(url: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's next message."""
    body = {"model": "grown", "messages": messages, "temperature": 0, "max_tokens": 100}
    answer = post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]
    return {k: v for k, v in answer.items() if v or k == "content"}


def call_tool(name: str, arguments: str) -> str:
    """The tool's result, or what went wrong, as text for the model."""
    if name not in tasks.TOOLS:
        return f"error: no tool {name!r}"
    try:
        return tasks.TOOLS[name].run(**json.loads(arguments))
    except (ValueError, TypeError) as error:
        return f"error: {error}"


def expected(problem: tasks.Problem) -> str:
    a, operation, b = problem.answer
    return tasks.calculate(f"{a}{operation}{b}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())
