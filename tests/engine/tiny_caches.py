"""Tiny checkpoints of transformers, one for each kind of layer that keeps entries, and what the engine makes of a sequence."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)

import pellucid
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request

DTYPES = ("f32", "bf16", "fp8", "int8")
BASE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CASES = {"gqa": Qwen3Config(**BASE, head_dim=16),
         "mla": DeepseekV3Config(**{**BASE, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 10,
                                    "qk_rope_head_dim": 8, "v_head_dim": 14, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 20,
                                    "first_k_dense_replace": 1}),
         "window": MistralConfig(**BASE, head_dim=16, sliding_window=9)}
MIXED = {"gemma3": Gemma3TextConfig(**{**BASE, "num_hidden_layers": 7}, head_dim=16, query_pre_attn_scalar=8, sliding_window=9,
                                    layer_types=[*["sliding_attention"] * 5, "full_attention", "sliding_attention"]),
         "gpt-oss": GptOssConfig(**BASE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9, rope_parameters=None,
                                 layer_types=["sliding_attention", "full_attention"]),
         "qwen2-window": Qwen2Config(**{**BASE, "num_hidden_layers": 3}, use_sliding_window=True, sliding_window=9, max_window_layers=1)}
OTHERS = {"qwen3.5": Qwen3_5TextConfig(
    **{**BASE, "num_hidden_layers": 4}, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=12, linear_conv_kernel_dim=4, layer_types=["linear_attention"] * 3 + ["full_attention"])}


def checkpoint(name: str, folder: Path):
    """(ours, transformers') with the same random weights, whose distributions are neither flat nor certain."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config((CASES | MIXED | OTHERS)[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
            elif "norm" in key:
                p.uniform_(0.5, 1.5)
        theirs.get_output_embeddings().weight.normal_(0, 1)
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder)
    return pellucid.load(folder), theirs


def run(engine: Engine, requests: list[Request]) -> None:
    for r in requests:
        engine.add(r)
    for _ in range(3000):
        if not engine.busy:
            break
        engine.step()
    engine.cache.check()
    assert not engine.busy and engine.cache.available() == engine.cache.blocks


def greedy(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The first prompt, and when it is in the cache the others beside it."""
    requests = [Request(p, SamplingParams(max_tokens=new)) for p in prompts]
    engine.add(requests[0])
    while requests[0].generated == 0:
        engine.step()
    run(engine, requests[1:])
    return [r.output for r in requests]


def forced(engine: Engine, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T) -> of each token behind the first (B, T - 1): its log-probability, and the most probable token in its place."""
    scored = [Request(row, SamplingParams(max_tokens=1, prompt_logprobs=1)) for row in ids.tolist()]
    run(engine, scored)
    return torch.tensor([r.prompt_logprobs for r in scored]), torch.tensor([[top[0][0] for top in r.prompt_tops] for r in scored])
