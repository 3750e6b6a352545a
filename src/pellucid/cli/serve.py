"""`pellucid serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pellucid.cli.base import OpensModel, Positional, prepare
from pellucid.cli.watch import EngineLines
from pellucid.errors import BadInput, PellucidError
from pellucid.events import Event, emit, subscribed
from pellucid.messages import add, say

add({
    "serve.stop": ("Ctrl-C: stop", "Ctrl-C 停止"),
    "serve.open": ("warning: everybody who reaches {host}:{port} can use this model",
                   "警告：凡能访问 {host}:{port} 者均可使用此模型"),
    "serve.open_why": ("--host {host} listens to other machines, and no key is asked for",
                       "--host {host} 对其他机器开放，且不要求密钥"),
    "serve.open_next": ("leave out --host to serve this machine only, or ask for a key:", "省略 --host 即只服务本机；或要求密钥："),
})
NEW_KEY = """python3 -c 'import secrets; print(secrets.token_urlsafe())' > key; chmod 600 key   # then: --api-key-file key"""


@dataclass(frozen=True)
class Serve(OpensModel):
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
    running: int = 64
    """Requests that run at a time.
    同时运行的请求数。"""
    cache_tokens: int | None = None
    """Tokens that the cache has room for; by default what memory allows, at most as many full contexts as requests run.
    缓存可容纳的词元数；默认取内存所允许的，最多为并发数个完整上下文。"""
    prefix: Literal["chain", "radix", "radix-cost", "none"] = "chain"
    """Prefix cache: chain of block hashes, radix tree (exact to the token; radix-cost evicts what is cheapest to lose), or none.
    前缀缓存：分块哈希链、基数树（精确到词元；radix-cost 先淘汰损失最小者）或不用。"""
    order: Literal["first-come", "longest-hit", "depth-first", "fair"] = "first-come"
    """Who is admitted first: the oldest, the longest hit in the prefix cache, depth first by prefix, or the least served API user.
    准入次序：先到先得、前缀命中最长、按前缀深度优先，或得到服务最少者。"""
    budget: int = 512
    """Tokens computed in a step; prompts longer than that are cut into chunks.
    每步计算的词元数；更长的提示会被分块。"""
    drafts: int = 0
    """Tokens proposed from the request's own text and checked in one pass (speculative decoding); the answers do not change.
    从请求自身文本中猜测、一次验证的词元数（投机解码）；不改变回答。"""


@dataclass
class Serving(Event):
    """The server listens."""

    kind = "serving"
    url: str
    model: str
    locked: bool  # clients must send a key


def serve(config: Serve) -> None:
    try:
        from pellucid.server.run import bind, serve_forever, url_of
    except ModuleNotFoundError as error:
        raise PellucidError("serving needs fastapi and uvicorn", str(error), "pip install 'pellucid[serve]'") from error
    from pellucid.engine import LLM
    from pellucid.engine.core import EngineConfig

    key = read_key(config.api_key_file) if config.api_key_file else None
    with bind(config.host, config.port) as listener:  # before the model is loaded: a taken port is told at once
        prepare(config, seed=None)
        llm = LLM(config.model, device=config.device, allow_missing=config.allow_missing)
        name = config.name or Path(config.model).resolve().name
        url = url_of(listener)
        emit(Serving(f"{url}/v1", name, key is not None))
        print(f"{name}: {url}/v1   ({say('serve.stop')})\n  {example(url, name, key is not None)}", file=sys.stderr)
        if key is None and not is_loopback(listener):
            print(open_to_all(config.host, listener), file=sys.stderr)  # also with --quiet
        engine = EngineConfig(cache_tokens=config.cache_tokens, prefix=config.prefix, order=config.order, running=config.running,
                              budget=config.budget, drafts=config.drafts)
        lines = contextlib.nullcontext() if config.quiet or config.json else subscribed(EngineLines(sys.stderr))
        with contextlib.suppress(KeyboardInterrupt), lines:  # Ctrl-C is the ordinary end of a server
            serve_forever(llm, name, listener, api_key=key, waiting=config.waiting, engine=engine)


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it: by the address that was bound, whatever name was given."""
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def open_to_all(host: str, listener: socket.socket) -> str:
    """The warning of a server that asks nobody for a key, in three parts."""
    return (f"{say('serve.open', host=host, port=listener.getsockname()[1])}\n"
            f"  {say('error.why')}: {say('serve.open_why', host=host)}\n"
            f"  {say('error.next')}: {say('serve.open_next')}\n        {NEW_KEY}")


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
