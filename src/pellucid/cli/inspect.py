"""`pellucid inspect`: what is in a model, from its config.json alone; two models side by side; how a text is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pellucid.cli.base import Common, Positional
from pellucid.errors import BadInput

if TYPE_CHECKING:
    from pellucid.plan import Inspection


@dataclass(frozen=True)
class Inspect(Common):
    """Architecture, parameters, cache, context and arithmetic of a model; its weights are not read.
    查看模型的结构、参数量、缓存、上下文与计算量；不读取权重。

    $ pellucid inspect runs/grow/model
    """

    model: Positional[str | None] = None
    """Checkpoint: a folder, a Hub id, or the name of a well-known model such as deepseek-v3.
    检查点：目录、Hub id，或知名模型的名称（如 deepseek-v3）。"""
    compare: tuple[str, str] | None = None
    """Two models side by side, differences marked: --compare qwen3-8b llama-3.1-8b.
    并排比较两个模型并标出差异：--compare qwen3-8b llama-3.1-8b。"""
    text: str | None = None
    """Show how the model's tokenizer cuts this text, with ids.
    显示该模型的分词器如何切分这段文字及其编号。"""
    cache_dtype: str = "bfloat16"
    """Number format of the cache that is counted: float32, bfloat16, float16, fp8, int8 (the last two with a scale a token and head).
    计算缓存大小所用的数值格式：float32、bfloat16、float16、fp8、int8（后两者每个词元每个头另有一个缩放因子）。"""


def inspect(config: Inspect) -> None:
    if (config.model is None) == (config.compare is None):
        raise BadInput("inspect needs one model, or --compare with two",
                       next="pellucid inspect runs/grow/model, or: pellucid inspect --compare qwen3-8b llama-3.1-8b")
    if config.compare is not None:
        if config.text is not None:
            raise BadInput("--text is cut by one model's tokenizer, not by two", next=f"pellucid inspect {config.compare[0]} --text ...")
        return compare(config)
    assert config.model is not None
    if config.text is not None:
        return show_text(config.model, config.text)
    from pellucid import events, plan

    info = plan.inspect(config.model, cache_dtype=config.cache_dtype)
    events.emit(events.Evaluation("inspect", "parameters", float(info.parameters), info.as_dict()))
    for line in page(info):
        print(line)


def page(info: Inspection) -> list[str]:
    """The report for people: facts, parameters by part, the tree of specs."""
    from pellucid.plan.tree import tree

    facts = facts_of(info)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {shown(value)}" for name, value in facts.items()]
    lines += ["", f"{'parameters by part':<24}{'total':>20}{'active a token':>20}"]
    for part in info.parts:
        lines.append(f"  {part.name:<22}{part.parameters:>20,}{part.active:>20,}")
    return [*lines, "", *tree(info.spec)]


def facts_of(info: Inspection, at: int | None = None) -> dict[str, Any]:
    """One line each, in the words of the field. at: the context whose FLOPs are told; None: the model's own."""
    from pellucid.plan.tree import ranges

    ahead = {"beside it, for multi-token prediction": info.ahead_parameters} if info.ahead_parameters else {}
    facts: dict[str, Any] = {
        "family": info.spec.family, "shape": info.shape, "weights": info.dtype, "parameters": info.parameters, **ahead,
        "active parameters": info.active_parameters, "active without embeddings": info.active_without_embeddings,
        "context": info.context,
    }
    if info.kinds:  # a model that writes
        facts |= {f"cache bytes a token ({info.cache_dtype})": info.kv_bytes_per_token}
    if info.cross_bytes_per_source_token:
        facts[f"cache bytes a source token ({info.cache_dtype})"] = info.cross_bytes_per_source_token
    if info.state_bytes:
        facts["cache bytes a sequence, any length"] = info.state_bytes
    for kind in info.kinds if len(info.kinds) > 1 else []:
        facts[f"  {kind.mixer} + {kind.ffn}, {len(kind.layers)} layers: {shortened(ranges(kind.layers))}"] = f"{kind.cache_bytes:,} a token" + (
            f", {kind.state_bytes:,} a sequence" if kind.state_bytes else "")
    token = {"EncoderDecoder": "a source and a written token", "DualEncoder": "a token of text"}.get(info.shape, "a token")
    at = at or info.context
    facts |= {f"forward FLOPs {token}, empty context": info.flops_per_token,
              f"training FLOPs {token}, empty context": info.training_flops_per_token,
              f"forward FLOPs {token} at context {at:,}": info.flops(at)}
    if info.flops_per_image is not None:
        facts |= {"forward FLOPs an image": info.flops_per_image, "training FLOPs an image": 3 * info.flops_per_image}
    if info.stored:
        facts["stored numbers"] = ", ".join(f"{name} {n:,}" for name, n in info.stored.items())
    if info.tokenizer:
        facts["tokenizer"] = ", ".join(f"{name} {shown(value)}" for name, value in info.tokenizer.items() if value not in (None, "", [], {}))
    return facts


def compare(config: Inspect) -> None:
    from pellucid import events, plan

    assert config.compare is not None
    a, b = (plan.inspect(name, cache_dtype=config.cache_dtype) for name in config.compare)
    rows = compared(a, b)
    events.emit(events.Evaluation("inspect", "differences", float(sum(x != y for _, x, y in rows)), {
        "models": [a.as_dict(), b.as_dict()], "rows": [{"name": name, "values": [x, y], "same": x == y} for name, x, y in rows]}))
    first = max(len(name) for name, _, _ in rows)
    second = max(len(config.compare[0]), *(len(x) for _, x, _ in rows))
    print(f"  {'':<{first}}  {config.compare[0]:<{second}}  {config.compare[1]}")
    for name, x, y in rows:
        print(f"{' ' if x == y else '≠'} {name:<{first}}  {x:<{second}}  {y}")


def compared(a: Inspection, b: Inspection) -> list[tuple[str, str, str]]:
    """(name, of a, of b) for every fact and every line of both trees; '-' where one has none."""
    shared = min(a.context, b.context)  # comparable at one length only
    left, right = ({**facts_of(info, shared), **flat(info.spec)} for info in (a, b))
    return [(name, shown(left.get(name, "-")), shown(right.get(name, "-"))) for name in dict.fromkeys([*left, *right])]


def flat(spec: Any, name: str = "") -> dict[str, Any]:
    """The spec as path -> value; layers of a stack by kind, with how many there are."""
    from dataclasses import fields, is_dataclass

    found: dict[str, Any] = {}
    for f in fields(spec):
        value, path = getattr(spec, f.name), f"{name}{f.name}"
        if f.name in ("extra", "family", "context") or not f.init:
            continue
        if is_dataclass(value):
            found |= {path: type(value).__name__} | flat(value, f"{path}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            kinds = list(dict.fromkeys(value))
            for k, layer in enumerate(kinds):
                at = path if len(kinds) == 1 else f"{path}[{k}]"
                found |= {at: f"{value.count(layer)} alike"} | flat(layer, f"{at}.")
        else:
            found[path] = value
    return found


def show_text(model: str, text: str) -> None:
    """The text cut into tokens, in colour on a terminal."""
    import sys
    from pathlib import Path

    from pellucid import events
    from pellucid.models import known
    from pellucid.tokenizers import Tokenizer

    tokenizer = Tokenizer.load(known.hub_id(model) if not Path(model).exists() and model.lower() in known.names() else model)
    ids = tokenizer.encode(text)
    events.emit(events.Evaluation("inspect", "tokens", float(len(ids)), {"text": text, "ids": ids}))
    print(tokenizer.show(text, colour=sys.stdout.isatty()))
    print(f"{len(ids)} tokens, {len(text)} characters, {len(text.encode())} bytes")


def shortened(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[:most].rsplit(",", 1)[0] + ", ..."


def shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
