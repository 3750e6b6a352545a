"""What a step of the online loop will hold in memory, from shapes alone: told before the run, not by the machine in it.

Weights, gradients and optimizer states are exact. The activations of a micro-batch count what autograd keeps of every layer;
the logits never exist as one tensor (chunked log-probabilities), so the vocabulary adds one chunk. Rollout and update follow
one another, so that the larger of the two counts, unless the one runs beside the other. Measured on a CPU, a step of a million
parameters grew by 240 MiB from 4 to 32 rows in a micro-batch, 241 MiB by this estimate; the process has some 200 to 300 MiB beside
its tensors.
"""

from __future__ import annotations

from typing import Any

from pellucid.align.online_config import OnlineConfig
from pellucid.align.rows import LONGEST
from pellucid.nn import Attn, Decoder, DecoderSpec
from pellucid.nn.context import branching
from pellucid.nn.count import cache_entries
from pellucid.nn.lora import adapted

MOST_ROWS = 512  # of a batch of the sampler
CHUNK = 2**20  # numbers of a chunk of logits, about


def memory(model: Decoder, config: OnlineConfig, prompt: int) -> dict[str, int]:
    """Bytes by part, of a step of the online loop. prompt: tokens of the longest prompt."""
    cfg, longest = config.objective, prompt + config.max_tokens
    row = max(2 * longest, min(8 * longest, LONGEST)) if branching(model.spec) is None else 2 * longest  # one row at least
    tokens = min(max(config.micro_rows * 2 * longest, row), config.prompts * config.group * longest)
    parts = learning(model, config.optim.name, tokens)
    learned = parts["weights"] + parts["gradients"] + parts["optimizer"]
    dtype = (model.compute_dtype or model.embed.weight.dtype).itemsize
    rows = min(MOST_ROWS, config.prompts * config.group)
    parts["rollout (cache)"] = rows * longest * sum(cache_entries(layer.mixer) for layer in model.spec.layers) * dtype
    if dtype != model.embed.weight.element_size() or adapted(model):
        parts["rollout (cache)"] += parts["weights"]  # a copy cast to the dtype of the computation, or with the adapters merged in
    elif config.overlap and config.lag:
        parts["sampler"] = parts["weights"]  # a copy of the weights that the step began with
    if config.overlap and config.lag:
        parts["rollout"] = parts.pop("rollout (cache)")  # beside the update, not before it
    parts["reference"] = parts["weights"] if cfg.needs_reference and not adapted(model) else 0
    parts["critic"] = learned if cfg.advantage == "gae" else 0
    return with_peak(parts)


def learning(model: Decoder, optimizer: str, tokens: int) -> dict[str, int]:
    """Bytes of one update with so many tokens in a micro-batch."""
    weights = list(dict.fromkeys(model.parameters()))
    count = sum(p.numel() for p in weights if p.requires_grad)
    matrices = sum(p.numel() for p in weights if p.requires_grad and p.ndim == 2 and p is not model.embed.weight)
    dtype = (model.compute_dtype or model.embed.weight.dtype).itemsize
    return {"weights": sum(p.numel() * p.element_size() for p in weights), "gradients": 4 * count,
            "optimizer": 4 * (2 * count - (matrices if optimizer == "muon" else 0)),
            "update (activations)": tokens * activation_numbers(model.spec) * dtype + 3 * CHUNK * 4}


def with_peak(parts: dict[str, int]) -> dict[str, int]:
    """Parts in brackets follow one another in time: the largest of them counts."""
    passing = max(size for name, size in parts.items() if "(" in name)
    return {name: size for name, size in parts.items() if size} | {"peak": passing + sum(s for name, s in parts.items() if "(" not in name)}


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
