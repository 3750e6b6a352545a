"""`pellucid serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pellucid.cli.base import Common, Positional, prepare
from pellucid.errors import BadInput, PellucidError
from pellucid.events import Event, emit, note

LOCAL = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class Serve(Common):
    """Serve a model in OpenAI's protocol: chat and text completions, streaming, tool calls. Any OpenAI client works.
    以 OpenAI 协议提供模型服务：对话与续写、流式输出、工具调用；任何 OpenAI 客户端可用。

    $ pellucid serve runs/grow/model --port 8000
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only.
    监听地址；默认只有本机可以访问。"""
    port: int = 8000
    """Port; 0 takes a free one.
    端口；0 表示任选空闲端口。"""
    name: str | None = None
    """Name of the model for clients; by default that of its folder.
    客户端看到的模型名；默认取目录名。"""
    api_key_file: Path | None = None
    """File that holds the key which clients must send (a key on the command line could be read by others).
    存放密钥的文件，客户端须携带该密钥（命令行中的密钥会被他人看到）。"""
    waiting: int = 16
    """Requests that may wait; more are answered with 429.
    允许排队的请求数；超出则返回 429。"""


@dataclass
class Serving(Event):
    """The server listens."""

    kind = "serving"
    url: str
    model: str


def serve(config: Serve) -> None:
    try:
        from pellucid.server.run import bind, serve_forever, url_of
    except ModuleNotFoundError as error:
        raise PellucidError("serving needs fastapi and uvicorn", str(error), "pip install 'pellucid[serve]'") from error
    from pellucid.engine import LLM

    key = read_key(config.api_key_file) if config.api_key_file else None
    with bind(config.host, config.port) as listener:  # before the model is loaded: a taken port is told at once
        prepare(config, seed=None)
        llm = LLM(config.model, device=config.device)
        name = config.name or Path(config.model).resolve().name
        url = url_of(listener)
        emit(Serving(f"{url}/v1", name))
        print(f"{name}: {url}/v1   (Ctrl-C: stop)\n  {example(url, name, key is not None)}", file=sys.stderr)
        if config.host not in LOCAL and key is None:
            note(f"{config.host} can be reached from other machines, and no key is asked for (--api-key-file)", "warning")
        with contextlib.suppress(KeyboardInterrupt):  # the ordinary end of a server
            serve_forever(llm, name, listener, api_key=key, waiting=config.waiting)


def read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}", str(error), "check the path given to --api-key-file") from error
    if not key or not key.isascii():
        raise BadInput(f"{path} holds no key", "a key is some ASCII characters", "write one into the file")
    return key


def example(url: str, name: str, locked: bool) -> str:
    """A request to paste into a shell."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Sort 52,7,31,88."}]}, ensure_ascii=False)
    key = " -H 'Authorization: Bearer KEY'" if locked else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
