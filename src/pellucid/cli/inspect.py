"""`pellucid inspect`: what is in a model, from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pellucid.cli.base import Common, Positional


@dataclass(frozen=True)
class Inspect(Common):
    """Parameters, layers, context, cache and arithmetic of a model; its weights are not read.
    查看模型的参数量、层、上下文、缓存与计算量；不读取权重。

    $ pellucid inspect runs/grow/model
    """

    model: Positional[str]
    """Checkpoint: a folder or a Hub id.
    检查点：目录或 Hub id。"""


def inspect(config: Inspect) -> None:
    from pellucid import events
    from pellucid.models import spec_of
    from pellucid.models.hub import local_folder, read_config
    from pellucid.nn import count_parameters, forward_flops

    fields = read_config(local_folder(config.model))
    spec, quantized = spec_of(fields), fields.get("quantization_config") or {}
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    ropes = [layer.mixer.rope for layer in spec.layers if layer.mixer.rope.dim]
    facts = {
        "family": spec.family, "weights": quantized.get("quant_method") or fields.get("dtype") or fields.get("torch_dtype") or "unknown",
        "parameters": count_parameters(spec), "layers": len(spec.layers), "width": spec.dim,
        "heads": mixer.heads, "kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "ffn": ffn.hidden,
        "vocabulary": spec.vocab, "tied": spec.tied, "context": spec.context,
        "ffn_gated": ffn.gated, "activation": ffn.act, "norm": spec.norm, "positions": spec.positions,
        "rope_theta": told(rope.theta for rope in ropes), "rope_dim": told(rope.dim for rope in ropes),
        "rope_type": told(rope.scaling_dict.get("rope_type", "default") for rope in ropes),
        "qk_norm": mixer.qk_norm, "window": told(layer.mixer.window for layer in spec.layers),
        "kv_bytes_per_token_float32": spec.kv_bytes_per_token,
        "forward_flops_per_token_at_context_1": forward_flops(spec, 1),
        f"forward_flops_per_token_at_context_{spec.context}": forward_flops(spec, spec.context),
    }
    events.emit(events.Evaluation("inspect", "parameters", float(count_parameters(spec)), facts))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{name:<{width}}  {value}")


def told(values: Iterable[Any]) -> Any:
    """What all layers agree on, or what each of their kinds says."""
    kinds = list(dict.fromkeys(values))
    return kinds[0] if len(kinds) == 1 else ", ".join(map(str, kinds)) or None
