"""`pellucid serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pellucid.cli.base import Positional, prepare
from pellucid.cli.running import RunsModel
from pellucid.cli.watch import EngineLines, Watch
from pellucid.errors import BadInput, PellucidError
from pellucid.events import Event, RunLog, emit, note, subscribed
from pellucid.messages import add, say

if TYPE_CHECKING:
    from pellucid.engine.config import EngineConfig

add({
    "serve.ready": ("{name}: weights loaded in {loaded} s, first pass in {warm} s", "{name}：加载权重 {loaded} 秒，首次前向 {warm} 秒"),
    "serve.cache": ("{name}: cache of {tokens} tokens in {dtype} ({why}); attention: {path} ({reason})",
                    "{name}：缓存 {tokens} 个词元，格式 {dtype}（{why}）；注意力：{path}（{reason}）"),
    "serve.defaults": ("{name}: where a request says nothing, as generation_config.json recommends: {text} (--sampling openai: without)",
                       "{name}：请求未指定时采用 generation_config.json 的推荐值：{text}（--sampling openai 则不采用）"),
    "serve.stop": ("Ctrl-C: stop", "Ctrl-C 停止"),
    "serve.open": ("warning: everybody who reaches {host}:{port} can use this model",
                   "警告：凡能访问 {host}:{port} 者均可使用此模型"),
    "serve.open_why": ("--host {host} listens to other machines, and no key is asked for",
                       "--host {host} 对其他机器开放，且不要求密钥"),
    "serve.open_next": ("leave out --host to serve this machine only, or ask for a key:", "省略 --host 即只服务本机；或要求密钥："),
})
NEW_KEY = """python3 -c 'import secrets; print(secrets.token_urlsafe())' > key; chmod 600 key   # then: --api-key-file key"""


@dataclass(frozen=True)
class Serve(RunsModel):
    """Serve models in OpenAI's protocol: chat and text completions, responses, tool calls, embeddings, reranking. Any OpenAI client works.
    以 OpenAI 协议提供模型服务：对话、续写、responses、工具调用、向量与重排；任何 OpenAI 客户端可用。

    $ pellucid serve runs/grow/model --port 8000
    $ pellucid serve runs/grow/model sentence-transformers/all-MiniLM-L6-v2 --name chat embed
    $ pellucid serve Qwen/Qwen3-8B --quantize int8 --draft Qwen/Qwen3-0.6B --watch
    """

    models: Positional[tuple[str, ...]]
    """Checkpoints: folders or Hub ids, one or several; encoders make vectors and rank texts.
    检查点：一个或多个目录或 Hub id；编码器提供向量与重排。"""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only.
    监听地址；默认只有本机可以访问。"""
    port: int = 8000
    """Port; 0 takes a free one.
    端口；0 表示任选空闲端口。"""
    name: tuple[str, ...] = ()
    """Names of the models for clients, in their order; by default those of their folders.
    客户端看到的模型名，按模型顺序；默认取目录名。"""
    api_key_file: Path | None = None
    """File that holds the key which clients must send, or several, one a line (a key on the command line could be read by others).
    Clients of different keys share no cached prefixes.
    存放密钥的文件，每行一个，客户端须携带其一（命令行中的密钥会被他人看到）；不同密钥之间不共享前缀缓存。"""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may call the server from a browser, such as http://localhost:3000; * (any) only with --api-key-file.
    允许其网页从浏览器调用本服务的来源，例如 http://localhost:3000；*（任意）须与 --api-key-file 同用。"""
    waiting: int = 16
    """Requests that may wait; more are answered with 429.
    允许排队的请求数；超出则返回 429。"""
    running: int = 64
    """Requests that run at a time.
    同时运行的请求数。"""
    max_tokens: int | None = None
    """Most tokens of one answer; by default what the context leaves.
    单个回答的最多词元数；默认以上下文为限。"""
    timeout: float | None = None
    """Seconds that one answer may take; then 504.
    单个回答的最长秒数；超出则返回 504。"""
    max_body: int = 4 << 20
    """Bytes of the largest request; more are answered with 413.
    请求体的最大字节数；超出则返回 413。"""
    grace: int = 10
    """Seconds that open answers get when the server is stopped (Ctrl-C, SIGTERM).
    停止服务（Ctrl-C、SIGTERM）时留给未完成回答的秒数。"""
    cache_tokens: int | None = None
    """Tokens that the cache has room for; by default what memory allows, at most as many full contexts as requests run.
    缓存可容纳的词元数；默认取内存所允许的，最多为并发数个完整上下文。"""
    prefix: Literal["chain", "radix", "radix-cost", "none"] = "chain"
    """Prefix cache: chain of block hashes, radix tree (exact to the token; radix-cost evicts what is cheapest to lose), or none.
    前缀缓存：分块哈希链、基数树（精确到词元；radix-cost 先淘汰损失最小者）或不用。"""
    order: Literal["first-come", "longest-hit", "depth-first", "planned", "fair"] = "first-come"
    """Who is admitted first: the oldest, the longest hit in the prefix cache, depth first by prefix, or the key or salt served least.
    准入次序：先到先得、前缀命中最长、按前缀深度优先，或得到服务最少的密钥。"""
    step_ms: float | None = None
    """Longest step in milliseconds: prompts are read in smaller pieces, so that answers on their way keep their pace.
    每步的最长毫秒数：提示被切成更小的块读取，使正在进行的回答保持速度。"""
    budget: int = 512
    """Tokens computed in a step; prompts longer than that are cut into chunks.
    每步计算的词元数；更长的提示会被分块。"""
    adapters: Path | None = None
    """Folder of LoRA adapters (PEFT's format), one a subfolder: each is a model of its own name, and more can be loaded while it runs.
    LoRA 适配器目录（PEFT 格式），每个子目录一个：各以其名作为模型，运行中可继续加载。"""
    tp: int = 1
    """Processes that share every layer of a model: heads, channels and experts (tensor parallelism). Each reads its part of the weights.
    分摊模型每一层（注意力头、通道、专家）的进程数（张量并行）；各进程只读取自己的权重。"""
    dp: int = 1
    """Engines beside each other, each with all weights; requests go to the one that has their prefix, or the emptiest. Goes with --tp.
    并列的引擎数，各持全部权重；请求分给已有其前缀者或最空闲者。可与 --tp 合用。"""
    dp_attention: int = 1
    """Processes with requests and cache of their own that share feed-forwards and experts: for latent attention, whose cache --tp would hold
    several times. With --tp: groups of so many processes, which share heads.
    各有请求与缓存、共享前馈层与专家的进程数：适合潜在注意力（--tp 会重复存放其缓存）。与 --tp 合用时为进程组数，组内分摊注意力头。"""
    disaggregate: bool = False
    """One process computes prompts, another goes on with the answers: long prompts do not hold up running answers.
    一个进程计算提示，另一个继续生成：长提示不会拖慢正在进行的回答。"""
    tool_format: str | None = None
    """How the model writes tool calls: hermes, qwen3-coder, deepseek, deepseek-dsml, llama-json, pythonic, mistral, harmony; by default
    what its chat template shows.
    模型书写工具调用的格式；默认由对话模板判断。"""
    sampling: Literal["model", "openai"] = "model"
    """Temperature and the like where a client gives none: as the model's generation_config.json recommends, or OpenAI's (1, nothing cut off).
    客户端未指定温度等参数时：取模型 generation_config.json 的推荐值，或 OpenAI 的默认值（温度 1，不截断）。"""
    watch: bool = False
    """Show queue, batch, blocks and prefix tree live in the terminal.
    在终端实时显示队列、批次、缓存块与前缀树。"""
    log: Path | None = None
    """Append one JSON line for each request to this file.
    为每个请求在该文件中追加一行 JSON。"""
    otel: bool = False
    """OpenTelemetry spans, sent to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the extra `otel`.
    OpenTelemetry 追踪，发送到 OTEL_EXPORTER_OTLP_ENDPOINT；需安装 `otel` 附加依赖。"""


@dataclass
class Serving(Event):
    """The server listens."""

    kind = "serving"
    url: str
    model: str  # names with commas between
    locked: bool  # clients must send a key


def serve(config: Serve) -> None:
    try:
        from pellucid.server.run import bind, serve_forever, url_of
    except ModuleNotFoundError as error:
        raise PellucidError("serving needs fastapi and uvicorn", str(error), "pip install 'pellucid[serve]'") from error
    from pellucid.engine.config import EngineConfig
    from pellucid.server.app import create_app
    from pellucid.server.cors import check_origins

    keys = read_keys(config.api_key_file) if config.api_key_file else []
    names = names_of(config)
    check_origins(config.cors, bool(keys))
    if config.adapters and not config.adapters.is_dir():
        raise BadInput(f"there is no folder {config.adapters}", next="check the path given to --adapters")
    with bind(config.host, config.port) as listener:  # before the model is loaded: a taken port is told at once
        prepare(config, seed=None)
        engine = EngineConfig(cache_tokens=config.cache_tokens, prefix=config.prefix, order=config.order, running=config.running,
                              budget=config.budget, step_seconds=None if config.step_ms is None else config.step_ms / 1e3,
                              **config.proposing())
        models = {name: opened(name, path, config, engine) for name, path in zip(names, config.models)}
        app = create_app(models, api_key=keys, waiting=config.waiting, engine=engine, max_tokens=config.max_tokens, timeout=config.timeout,
                         max_body=config.max_body, form=config.tool_format, tracing=config.otel, adapters=config.adapters,
                         cors=config.cors, recommended=config.sampling == "model")
        for served in app.state.desk.registry.engines:
            tell_cache(served.name, served.engine)
        tell_defaults(app.state.desk.registry)
        url = url_of(listener)
        emit(Serving(f"{url}/v1", ", ".join(names), bool(keys)))
        print(f"{', '.join(names)}: {url}/v1   ({say('serve.stop')})\n  {example(url, names[0], bool(keys))}", file=sys.stderr)
        if not keys and not is_loopback(listener):
            print(open_to_all(config.host, listener), file=sys.stderr)  # also with --quiet
        with contextlib.suppress(KeyboardInterrupt), shown(config, app.state.desk.registry):  # Ctrl-C is the ordinary end of a server
            serve_forever(app, listener, config.grace)


def opened(name: str, path: str, config: Serve, engine: EngineConfig) -> Any:
    """The model, loaded and warm: its first request finds kernels compiled. Says how long both took."""
    from pellucid.engine import LLM
    from pellucid.engine.core import warm_up
    from pellucid.models.hub import local_folder
    from pellucid.server.defaults import read_defaults
    from pellucid.server.registry import open_model

    if config.sampling == "model":
        read_defaults(local_folder(path))  # refused, if at all, before the weights are read
    began = time.perf_counter()
    model = open_model(path, engine, **config.opening(), tp=config.tp, dp=config.dp, dp_attention=config.dp_attention,
                       disaggregate=config.disaggregate)
    loaded = time.perf_counter() - began
    if isinstance(model, LLM) and model.layout.processes > 1:
        return model  # its processes load and warm up when the engine is made, and tell it themselves
    warm = warm_up(model.model) if isinstance(model, LLM) else 0.0
    note(say("serve.ready", name=name, loaded=f"{loaded:.1f}", warm=f"{warm:.1f}"))
    return model


def tell_cache(name: str, engine: Any) -> None:
    """How much the engine's cache holds and in which format, and by which path it is read."""
    if runner := getattr(engine, "runner", None):  # of this process
        note(say("serve.cache", name=name, tokens=f"{engine.room.value:,}", why=engine.room.reason, dtype=runner.pages.codes.name,
                 path=runner.path.value, reason=runner.path.reason))


def tell_defaults(registry: Any) -> None:
    """Which settings a model's requests have where they say nothing, if they are not the usual ones."""
    for name, model in registry.models.items():
        if text := str(getattr(model, "defaults", None) or ""):
            note(say("serve.defaults", name=name, text=text))


@contextlib.contextmanager
def shown(config: Serve, registry: Any) -> Iterator[None]:
    """What the engines do: live, or a line per interval, or nothing; and the log of requests."""
    with contextlib.ExitStack() as stack:
        if config.log:
            stack.enter_context(subscribed(RequestLog(config.log)))
        if config.watch:
            stack.enter_context(Watch(registry))
        elif not (config.quiet or config.json):
            stack.enter_context(subscribed(EngineLines(sys.stderr)))
        yield


class RequestLog(RunLog):
    """Of the events, those that end a request."""

    def __call__(self, event: Event) -> None:
        if event.kind in ("answered", "served"):
            super().__call__(event)


def names_of(config: Serve) -> list[str]:
    """One name for each model, none of them twice."""
    if not config.models:
        raise BadInput("there is no model to serve", next="pellucid serve FOLDER")
    names = list(config.name) or [Path(path).resolve().name for path in config.models]
    if len(names) != len(config.models):
        raise BadInput(f"{len(config.models)} models and {len(names)} names", next="give one --name for each model, or none")
    if len(set(names)) != len(names):
        raise BadInput(f"two models have one name: {', '.join(names)}", next="give each its own: --name FIRST SECOND")
    return names


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it: by the address that was bound, whatever name was given."""
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def open_to_all(host: str, listener: socket.socket) -> str:
    """The warning of a server that asks nobody for a key, in three parts."""
    return (f"{say('serve.open', host=host, port=listener.getsockname()[1])}\n"
            f"  {say('error.why')}: {say('serve.open_why', host=host)}\n"
            f"  {say('error.next')}: {say('serve.open_next')}\n        {NEW_KEY}")


def read_keys(path: Path) -> list[str]:
    """One a line."""
    try:
        keys = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}", str(error), "check the path given to --api-key-file") from error
    keys = [key.strip() for key in keys if key.strip()]
    if not keys or not all(key.isascii() for key in keys):
        raise BadInput(f"{path} holds no key", "a key is some ASCII characters", "write one into the file")
    return keys


def example(url: str, name: str, locked: bool) -> str:
    """A request to paste into a shell."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Sort 52,7,31,88."}]}, ensure_ascii=False)
    key = " -H 'Authorization: Bearer KEY'" if locked else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
