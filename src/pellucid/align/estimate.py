"""What a step of the online loop will hold in memory, from shapes alone: told before the run, not by the machine in it.

Weights, gradients and optimizer states are exact. The activations of a micro-batch count what autograd keeps of every layer;
the logits never exist as one tensor (chunked log-probabilities), so the vocabulary adds one chunk. Rollout and update follow
one another: the larger of the two counts.
"""

from __future__ import annotations

from typing import Any

from pellucid.align.online import OnlineConfig
from pellucid.nn import Attn, Decoder, DecoderSpec
from pellucid.nn.count import cache_entries

MOST_ROWS = 512  # of a batch of the sampler
CHUNK = 2**20  # numbers of a chunk of logits, about


def memory(model: Decoder, config: OnlineConfig, prompt: int) -> dict[str, int]:
    """Bytes by part. prompt: tokens of the longest prompt."""
    cfg, spec = config.objective, model.spec
    weights = [p for p in dict.fromkeys(model.parameters())]
    size = sum(p.numel() * p.element_size() for p in weights)
    count = sum(p.numel() for p in weights if p.requires_grad)
    matrices = sum(p.numel() for p in weights if p.requires_grad and p.ndim == 2 and p is not model.embed.weight)
    states = 4 * (2 * count - (matrices if config.optim.name == "muon" else 0))
    learned = size + 4 * count + states
    longest = prompt + config.max_tokens
    dtype = (model.compute_dtype or model.embed.weight.dtype).itemsize
    rows = min(MOST_ROWS, config.prompts * config.group)
    cache = rows * longest * sum(cache_entries(layer.mixer) for layer in spec.layers) * dtype
    tokens = min(config.micro_rows * 2, config.prompts * config.group) * longest  # a row holds twice the longest completion
    kept = tokens * activation_numbers(spec) * dtype + 3 * CHUNK * 4
    parts = {"weights": size, "gradients": 4 * count, "optimizer": states,
             "reference": size if cfg.needs_reference else 0, "critic": learned if cfg.advantage == "gae" else 0,
             "rollout (cache)": cache + (size if dtype != model.embed.weight.element_size() else 0), "update (activations)": kept}
    steady = sum(v for k, v in parts.items() if "(" not in k)
    return {k: v for k, v in parts.items() if v} | {"peak": steady + max(parts["rollout (cache)"], kept)}


def activation_numbers(spec: DecoderSpec) -> int:
    """Numbers that autograd keeps for one token: inputs of every product, norm, rotation and gate."""
    D, total = spec.dim, 0
    for layer in spec.layers:
        mixer, ffn = layer.mixer, layer.ffn
        if isinstance(mixer, Attn):
            q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
            total += (3 + mixer.qk_norm) * (q + kv) + kv + q
        else:
            total += 8 * D
        hidden: Any = getattr(ffn, "hidden", 4 * D)
        active = getattr(ffn, "top_k", 1) or 1
        total += 4 * hidden * active + 6 * D
    return total + 2 * D
