"""Tiny random checkpoints written by transformers. EVERY persistent tensor is redrawn: with norm weights of 1 and biases
of 0, a loader that forgets them would pass."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, **IDS}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.5, 1.5, 2.0], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 7.0]}
DELTA = {"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4}
PART = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "layer_norm_epsilon": 1e-3, **IDS}
MLA = {**BASE, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8,
       "v_head_dim": 14, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 20,
       "first_k_dense_replace": 1}
V3 = {**MLA, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
# every config takes its own copy of a dict: Phi-3 writes into what it is given
CASES: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "qwen3-tied": Qwen3Config(**BASE, head_dim=8, tie_word_embeddings=True,
                              rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3-biases": Qwen3Config(**BASE, head_dim=20, attention_bias=True, rms_norm_eps=1e-5),
    "qwen3-window": Qwen3Config(**{**BASE, "num_hidden_layers": 3}, head_dim=16, use_sliding_window=True, sliding_window=6,
                                max_window_layers=1),
    "llama3": LlamaConfig(**BASE, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama-biases": LlamaConfig(**{**BASE, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True,
                                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama-mqa": LlamaConfig(**{**BASE, "num_key_value_heads": 1}, head_dim=6, hidden_act="gelu_pytorch_tanh"),
    "llama-yarn": LlamaConfig(**BASE, rope_parameters={**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
                                                       "mscale": 0.707, "mscale_all_dim": 1.4}),
    "llama-dynamic": LlamaConfig(**{**BASE, "max_position_embeddings": 32},
                                 rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "llama-longrope": LlamaConfig(**BASE, rope_parameters={**LONG}),
    "deepseek-llm": LlamaConfig(**{**BASE, "num_key_value_heads": 4}, rms_norm_eps=1e-4),
    "qwen1.5": Qwen2Config(**{**BASE, "num_key_value_heads": 4}, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2": Qwen2Config(**BASE, tie_word_embeddings=True, rms_norm_eps=1e-3, sliding_window=5),  # given, but not used
    "qwen2-window": Qwen2Config(**{**BASE, "num_hidden_layers": 3, "num_attention_heads": 6}, use_sliding_window=True,
                                sliding_window=6, max_window_layers=1),
    "qwen2.5-yarn": Qwen2Config(**BASE, rope_parameters={**YARN}),
    "mistral": MistralConfig(**BASE, sliding_window=6, head_dim=10, rms_norm_eps=1e-5),
    "mistral-nemo": MistralConfig(**BASE, sliding_window=None, head_dim=16, hidden_act="gelu",
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "phi3": Phi3Config(**BASE, sliding_window=7, rms_norm_eps=1e-4),
    "phi3.5": Phi3Config(**BASE, original_max_position_embeddings=32, rope_parameters={**LONG}),
    "phi4-mini": Phi3Config(**{**BASE, "hidden_size": 64, "num_key_value_heads": 4}, original_max_position_embeddings=32,
                            tie_word_embeddings=True, rope_parameters={**LONG, "partial_rotary_factor": 0.75}),
    "gpt2": GPT2Config(**GPT2),
    "gpt2-wide": GPT2Config(**{**GPT2, "n_head": 3}, n_inner=72, activation_function="relu",
                            tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**{**BASE, "num_hidden_layers": 3}, head_dim=16, sliding_window=6, query_pre_attn_scalar=24,
                               rms_norm_eps=1e-4, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                               rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                                                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}),
    "gemma3-biases": Gemma3TextConfig(**BASE, head_dim=10, sliding_window=9, tie_word_embeddings=False, attention_bias=True,
                                      layer_types=["full_attention", "sliding_attention"], hidden_activation="silu"),
    "mixtral": MixtralConfig(**BASE, num_local_experts=6, num_experts_per_tok=3, sliding_window=9, rms_norm_eps=1e-4),
    "qwen2-moe": Qwen2MoeConfig(**{**BASE, **MOE, "num_hidden_layers": 4}, shared_expert_intermediate_size=28, mlp_only_layers=[1],
                                use_sliding_window=True, sliding_window=6, max_window_layers=2, rms_norm_eps=1e-4),
    "qwen3-moe": Qwen3MoeConfig(**{**BASE, **MOE, "num_hidden_layers": 3}, head_dim=16, norm_topk_prob=True, decoder_sparse_step=2,
                                tie_word_embeddings=True),
    "qwen3-moe-window": Qwen3MoeConfig(**BASE, **MOE, use_sliding_window=True, sliding_window=6, attention_bias=True),
    "gpt-oss": GptOssConfig(**{**BASE, "intermediate_size": 40}, head_dim=16, sliding_window=6, num_local_experts=6,
                            num_experts_per_tok=2, swiglu_limit=0.6, rms_norm_eps=1e-4,
                            rope_parameters={**YARN, "rope_theta": 150000.0, "truncate": False}),
    "deepseek-v2": DeepseekV2Config(**{**MLA, "n_shared_experts": 2}, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                                    routed_scaling_factor=16.0, rms_norm_eps=1e-3,
                                    rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "deepseek-v2-lite": DeepseekV2Config(**{**MLA, "q_lora_rank": None}, topk_method="greedy", rms_norm_eps=1e-3,
                                         rope_parameters={**YARN, "mscale": 0.5, "mscale_all_dim": 0.9}),
    "deepseek-v3": DeepseekV3Config(**V3, num_mtp_layers=0, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "deepseek-v3-plain": DeepseekV3Config(**{**V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
                                          num_mtp_layers=0, rope_interleave=False, attention_bias=True, tie_word_embeddings=True),
    "deepseek-v3.2": DeepseekV32Config(**V3, index_topk=5, index_head_dim=12, index_n_heads=8,
                                       rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "qwen3-next": Qwen3NextConfig(**{**BASE, **MOE, **DELTA, "num_hidden_layers": 3}, shared_expert_intermediate_size=28, mlp_only_layers=[2],
                                  layer_types=["linear_attention", "full_attention", "linear_attention"], rms_norm_eps=5e-2,
                                  rope_parameters={**PART}),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(**{k: v for k, v in {**BASE, **MOE, **DELTA, "num_hidden_layers": 2}.items() if k != "intermediate_size"},
                                        layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=28,
                                        rms_norm_eps=1e-2, rope_parameters={**PART, "mrope_section": [2, 1, 1]}),
    "qwen3.5": Qwen3_5TextConfig(**{**BASE, **DELTA, "linear_conv_kernel_dim": 3}, tie_word_embeddings=True, attention_bias=True,
                                 layer_types=["linear_attention", "full_attention"] * 2, rms_norm_eps=3e-3,
                                 rope_parameters={**PART, "mrope_section": [2, 1, 1]}),
}


def written(case: str | PreTrainedConfig, folder: Path, **options: object) -> PreTrainedModel:
    """The reference model of a case, or of a config (eager attention, float32), after writing it to `folder`."""
    config = CASES[case] if isinstance(case, str) else case
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    redrawn(model, len(case) if isinstance(case, str) else 0, centred=config.model_type.startswith(("gemma", "qwen3_next", "qwen3_5")))
    model.tie_weights()
    model.save_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def redrawn(model: torch.nn.Module, seed: int, centred: bool = False) -> torch.nn.Module:
    """Every persistent tensor drawn anew. centred: weights of norms are stored less 1, but for those of the gated delta net."""
    g = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=g)
        scale = not (centred and "linear_attn" not in key) and key.endswith("weight") and ("norm" in key or ".ln_" in key)
        tensor.copy_(1 + 0.3 * noise if scale else 0.6 * noise if "conv1d" in key else 0.2 * noise)
    return model


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_equal(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """The tolerance of every parity test: 1e-5 of the largest reference value, and at least 1e-5."""
    limit = 1e-5 * max(1.0, want.abs().max().item())
    worst = (got - want).abs().max().item()
    assert worst <= limit, f"{what}: differs by {worst:.2e}, {limit:.2e} is allowed"
