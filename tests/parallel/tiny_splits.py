"""Tiny checkpoints of several families with random weights, made and saved by transformers, with a tokenizer of ours beside them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

VOCAB = 280
COMMON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.3, pad_token_id=None,
              bos_token_id=None, eos_token_id=None)
ATTENTION = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
LATENT = dict(num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
              intermediate_size=64, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
              first_k_dense_replace=1)

# family -> (config, model of transformers, fields)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", ATTENTION),
    "llama-one-kv": ("LlamaConfig", "LlamaForCausalLM", {**ATTENTION, "num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 281}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", ATTENTION),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**ATTENTION, "head_dim": 8}),
    "qwen3-wide": ("Qwen3Config", "Qwen3ForCausalLM", {**ATTENTION, "head_dim": 32, "intermediate_size": 128}),  # groups of 32 columns in four parts
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**ATTENTION, "head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2,
                                                           "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen2-moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**ATTENTION, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                                           "shared_expert_intermediate_size": 16}),
    "deepseek-v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**ATTENTION, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "qwen3-next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {
        **ATTENTION, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
        "layer_types": ["linear_attention", "full_attention"]}),
}


@functools.cache
def tokenizer():
    from pellucid.tokenizers import patterns, train_bpe

    return train_bpe(["user assistant think\nuser\n\nassistant\n hello world, hello worlds: 12 + 30 = 42"] * 3, VOCAB, patterns.QWEN_PATTERN)


def checkpoint(family: str, folder: Path, **more) -> Path:
    import transformers

    config_class, model_class, fields = FAMILIES[family]
    torch.manual_seed(7)
    if family == "gpt2":
        fields = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)
    config = getattr(transformers, config_class)(**{**COMMON, **fields, **more})
    model = getattr(transformers, model_class)(config).eval()
    if family == "gpt2":
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(0, 0.3) if "ln" not in name else None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "e_score" in name:
                p.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer().save(folder)
    return folder


def write_adapter(base: Path, folder: Path, **options) -> None:
    """A LoRA adapter of PEFT's for the checkpoint `base`, with random numbers: PEFT begins with B = 0, which changes nothing."""
    import peft
    import transformers

    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(len(str(options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
