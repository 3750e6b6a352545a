"""`pellucid serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pellucid.cli.base import Common, Positional, prepare
from pellucid.errors import PellucidError


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


def serve(config: Serve) -> None:
    try:
        from pellucid.server import serve_forever
        from pellucid.server.run import bind, url_of
    except ModuleNotFoundError as error:
        raise PellucidError("serving needs fastapi and uvicorn", str(error), "pip install 'pellucid[serve]'") from error
    from pellucid.engine import LLM

    key = None
    if config.api_key_file is not None:
        try:
            key = config.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise PellucidError(f"cannot read {config.api_key_file}", str(error)) from error
    listener = bind(config.host, config.port)  # before the model is loaded: a taken port is told at once
    device = prepare(config, seed=None)
    llm = LLM(config.model, device=str(device))
    name = config.name or os.path.basename(os.path.normpath(config.model))
    url = url_of(listener)
    print(f"{name} at {url}/v1   (Ctrl-C stops)\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
          f"    -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Sort 52,7,31,88.\"}}]}}'",
          file=sys.stderr)
    serve_forever(llm, name, listener, api_key=key, waiting=config.waiting)
