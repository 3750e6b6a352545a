"""Tiny random checkpoints written by transformers. EVERY persistent tensor is redrawn: with norm weights of 1 and biases
of 0, a loader that forgets them would pass."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
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
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "layer_norm_epsilon": 1e-3, **IDS}
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
    "qwen3-next-dense": Qwen3NextConfig(**{**BASE, **DELTA}, mlp_only_layers=[0, 1, 2, 3], rms_norm_eps=1e-2, rope_parameters={**PART}),
    "qwen3.5": Qwen3_5TextConfig(**{**BASE, **DELTA, "linear_conv_kernel_dim": 3}, tie_word_embeddings=True, attention_bias=True,
                                 layer_types=["linear_attention", "full_attention"] * 2, rms_norm_eps=3e-3,
                                 rope_parameters={**PART, "mrope_section": [2, 1, 1]}),
}


def written(name: str, folder: Path, **options: object) -> PreTrainedModel:
    """The reference model of a case (eager attention, float32), after writing it to `folder`."""
    config = CASES[name]
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    g = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=g)
            centred = config.model_type.startswith(("gemma", "qwen3_next", "qwen3_5")) and "linear_attn" not in key
            scale = not centred and key.endswith("weight") and ("norm" in key or ".ln_" in key)
            tensor.copy_(1 + 0.3 * noise if scale else 0.6 * noise if "conv1d" in key else 0.2 * noise)
    model.tie_weights()
    model.save_pretrained(folder, **options)
    return model.eval()


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_equal(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """The tolerance of every parity test: 1e-5 of the largest reference value, and at least 1e-5."""
    limit = 1e-5 * max(1.0, want.abs().max().item())
    worst = (got - want).abs().max().item()
    assert worst <= limit, f"{what}: differs by {worst:.2e}, {limit:.2e} is allowed"
