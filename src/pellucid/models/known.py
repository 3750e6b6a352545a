"""Well-known models by name: what their config.json says of the architecture, so that `pellucid inspect deepseek-v3` needs neither
network nor files. Only public facts: the fields that decide a number, in the words of each family's own files.

    name -> (Hub id, parameters, fields)

Parameters: unique ones (a tied head counts once), without layers of multi-token prediction.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pellucid.errors import BadInput, nearest

Fields = dict[str, Any]


def sizes(
    model_type: str, architecture: str, vocab: int, dim: int, layers: int, hidden: int, heads: int, kv_heads: int, context: int,
    eps: float = 1e-6, theta: float = 1e4, tied: bool = False, dtype: str = "bfloat16", **more: Any,
) -> Fields:
    """What the decoders of Llama's line call the same."""
    return {
        "model_type": model_type, "architectures": [architecture], "vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": layers,
        "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": context,
        "rms_norm_eps": eps, "rope_theta": theta, "tie_word_embeddings": tied, "hidden_act": "silu", "torch_dtype": dtype, **more}


def llama(vocab: int, dim: int, layers: int, hidden: int, heads: int, kv_heads: int, context: int, **more: Any) -> Fields:
    return sizes("llama", "LlamaForCausalLM", vocab, dim, layers, hidden, heads, kv_heads, context, **{"eps": 1e-5, **more})


def llama3(dim: int, layers: int, hidden: int, heads: int, kv_heads: int, factor: float, **more: Any) -> Fields:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return llama(128256, dim, layers, hidden, heads, kv_heads, 131072, theta=5e5, rope_scaling=scaling, **more)


def qwen2(vocab: int, dim: int, layers: int, hidden: int, heads: int, kv_heads: int, context: int = 32768, **more: Any) -> Fields:
    return sizes("qwen2", "Qwen2ForCausalLM", vocab, dim, layers, hidden, heads, kv_heads, context, theta=1e6,
                 use_sliding_window=False, sliding_window=context, max_window_layers=layers, **more)


def qwen2_moe(dim: int, layers: int, hidden: int, heads: int, kv_heads: int, experts: tuple[int, int, int, int], **more: Any) -> Fields:
    """experts: how many, how many at a time, their width, the shared one's."""
    count, top_k, width, shared = experts
    return sizes("qwen2_moe", "Qwen2MoeForCausalLM", 151936, dim, layers, hidden, heads, kv_heads, theta=1e6, num_experts=count,
                 num_experts_per_tok=top_k, moe_intermediate_size=width, shared_expert_intermediate_size=shared, norm_topk_prob=False,
                 decoder_sparse_step=1, mlp_only_layers=[], **more)


def qwen3(dim: int, layers: int, hidden: int, heads: int, kv_heads: int = 8, **more: Any) -> Fields:
    return sizes("qwen3", "Qwen3ForCausalLM", 151936, dim, layers, hidden, heads, kv_heads, 40960, theta=1e6, head_dim=128, **more)


def qwen3_moe(dim: int, layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> Fields:
    return sizes("qwen3_moe", "Qwen3MoeForCausalLM", 151936, dim, layers, hidden, heads, kv_heads, 40960, theta=1e6, head_dim=128,
                 num_experts=128, num_experts_per_tok=8, moe_intermediate_size=width, norm_topk_prob=True, decoder_sparse_step=1,
                 mlp_only_layers=[])


def gpt2(dim: int, layers: int, heads: int) -> Fields:
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": dim, "n_layer": layers, "n_head": heads,
            "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def gemma3(dim: int, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, scale: int, **more: Any) -> Fields:
    return {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262208, "hidden_size": dim,
            "num_hidden_layers": layers, "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "query_pre_attn_scalar": scale, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 1024, "sliding_window_pattern": 6, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "torch_dtype": "bfloat16", **more}


def gpt_oss(layers: int, experts: int) -> Fields:
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096,
            "truncate": False}
    return sizes("gpt_oss", "GptOssForCausalLM", 201088, 2880, layers, 2880, 64, 8, 131072, eps=1e-5, theta=150000, head_dim=64,
                 attention_bias=True, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * (layers // 2),
                 num_local_experts=experts, num_experts_per_tok=4, swiglu_limit=7.0, rope_scaling=yarn,
                 quantization_config={"quant_method": "mxfp4"})


def deepseek(model_type: str, architecture: str, vocab: int, dim: int, layers: int, hidden: int, heads: int, mscale: float, **more: Any) -> Fields:
    yarn = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale,
            "original_max_position_embeddings": 4096}
    return sizes(model_type, architecture, vocab, dim, layers, hidden, heads, heads, 163840, rope_scaling=yarn, kv_lora_rank=512,
                 qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_layer_freq=1, attention_bias=False, **more)


def deepseek_v3(model_type: str = "deepseek_v3", architecture: str = "DeepseekV3ForCausalLM", **more: Any) -> Fields:
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return deepseek(model_type, architecture, 129280, 7168, 61, 18432, 128, 1.0, q_lora_rank=1536, n_routed_experts=256,
                    num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048, first_k_dense_replace=3, n_group=8,
                    topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
                    num_nextn_predict_layers=1, quantization_config=fp8, **more)


PHI4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826, 3.059592084,
    3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372,
    10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884,
    32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77]

BERT: Fields = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
                "layer_norm_eps": 1e-12}

KNOWN: Mapping[str, tuple[str, int, Fields]] = {
    "gpt2": ("openai-community/gpt2", 124_439_808, gpt2(768, 12, 12)),
    "gpt2-medium": ("openai-community/gpt2-medium", 354_823_168, gpt2(1024, 24, 16)),
    "gpt2-large": ("openai-community/gpt2-large", 774_030_080, gpt2(1280, 36, 20)),
    "gpt2-xl": ("openai-community/gpt2-xl", 1_557_611_200, gpt2(1600, 48, 25)),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", 6_738_415_616, llama(32000, 4096, 32, 11008, 32, 32, 4096, dtype="float16")),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", 13_015_864_320, llama(32000, 5120, 40, 13824, 40, 40, 4096, dtype="float16")),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", 68_976_648_192, llama(32000, 8192, 80, 28672, 64, 8, 4096, dtype="float16")),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, llama(128256, 4096, 32, 14336, 32, 8, 8192, theta=5e5)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 8_030_261_248, llama3(4096, 32, 14336, 32, 8, 8.0)),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", 70_553_706_496, llama3(8192, 80, 28672, 64, 8, 8.0)),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", 405_853_388_800, llama3(16384, 126, 53248, 128, 8, 8.0)),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", 1_235_814_400, llama3(2048, 16, 8192, 32, 8, 32.0, tied=True, head_dim=64)),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 3_212_749_824, llama3(3072, 28, 8192, 24, 8, 32.0, tied=True, head_dim=128)),
    "deepseek-llm-7b": ("deepseek-ai/deepseek-llm-7b-base", 6_910_365_696, llama(102400, 4096, 30, 11008, 32, 32, 4096, eps=1e-6)),
    "deepseek-llm-67b": ("deepseek-ai/deepseek-llm-67b-base", 67_425_001_472, llama(102400, 8192, 95, 22016, 64, 8, 4096, eps=1e-6)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", 7_241_732_096, sizes(
        "mistral", "MistralForCausalLM", 32000, 4096, 32, 14336, 32, 8, 32768, eps=1e-5, sliding_window=4096)),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, sizes(
        "mixtral", "MixtralForCausalLM", 32000, 4096, 32, 14336, 32, 8, 32768, eps=1e-5, theta=1e6, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=None)),
    "mixtral-8x22b": ("mistralai/Mixtral-8x22B-v0.1", 140_620_634_112, sizes(
        "mixtral", "MixtralForCausalLM", 32000, 6144, 56, 16384, 48, 8, 65536, eps=1e-5, theta=1e6, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=None)),
    "qwen-7b": ("Qwen/Qwen-7B", 7_721_324_544, {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "kv_channels": 128, "intermediate_size": 22016, "seq_length": 8192, "max_position_embeddings": 32768,
        "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True,
        "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False}),
    "qwen1.5-moe-a2.7b": ("Qwen/Qwen1.5-MoE-A2.7B", 14_315_784_192, qwen2_moe(2048, 24, 5632, 16, 16, (60, 4, 1408, 5632), context=8192)),
    "qwen2-57b-a14b": ("Qwen/Qwen2-57B-A14B", 57_408_658_944, qwen2_moe(3584, 28, 18944, 28, 4, (64, 8, 2560, 20480), context=131072)),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", 494_032_768, qwen2(151936, 896, 24, 4864, 14, 2, tied=True)),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", 1_543_714_304, qwen2(151936, 1536, 28, 8960, 12, 2, 131072, tied=True)),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", 3_085_938_688, qwen2(151936, 2048, 36, 11008, 16, 2, tied=True)),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", 7_615_616_512, qwen2(152064, 3584, 28, 18944, 28, 4, 131072)),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B", 14_770_033_664, qwen2(152064, 5120, 48, 13824, 40, 8, 131072, eps=1e-5)),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B", 32_763_876_352, qwen2(152064, 5120, 64, 27648, 40, 8, 131072, eps=1e-5)),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", 72_706_203_648, qwen2(152064, 8192, 80, 29568, 64, 8, 131072, eps=1e-5)),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", 596_049_920, qwen3(1024, 28, 3072, 16, tied=True)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 1_720_574_976, qwen3(2048, 28, 6144, 16, tied=True)),
    "qwen3-4b": ("Qwen/Qwen3-4B", 4_022_468_096, qwen3(2560, 36, 9728, 32, tied=True)),
    "qwen3-8b": ("Qwen/Qwen3-8B", 8_190_735_360, qwen3(4096, 36, 12288, 32)),
    "qwen3-14b": ("Qwen/Qwen3-14B", 14_768_307_200, qwen3(5120, 40, 17408, 40)),
    "qwen3-32b": ("Qwen/Qwen3-32B", 32_762_123_264, qwen3(5120, 64, 25600, 64)),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", 30_532_122_624, qwen3_moe(2048, 48, 6144, 32, 4, 768)),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", 235_093_634_560, qwen3_moe(4096, 94, 12288, 64, 4, 1536)),
    "qwen3-next-80b-a3b": ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79_674_391_296, sizes(
        "qwen3_next", "Qwen3NextForCausalLM", 151936, 2048, 48, 5120, 16, 2, 262144, theta=1e7, head_dim=256, partial_rotary_factor=0.25,
        full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])),
    "deepseek-v2-lite": ("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224, deepseek(
        "deepseek_v2", "DeepseekV2ForCausalLM", 102400, 2048, 27, 10944, 16, 0.707, q_lora_rank=None, n_routed_experts=64,
        num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408, first_k_dense_replace=1, n_group=1, topk_group=1,
        topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0)),
    "deepseek-v2": ("deepseek-ai/DeepSeek-V2", 235_741_434_880, deepseek(
        "deepseek_v2", "DeepseekV2ForCausalLM", 102400, 5120, 60, 12288, 128, 0.707, q_lora_rank=1536, n_routed_experts=160,
        num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1536, first_k_dense_replace=1, n_group=8, topk_group=3,
        topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=16.0)),
    "deepseek-v3": ("deepseek-ai/DeepSeek-V3", 671_026_419_200, deepseek_v3()),
    "deepseek-r1": ("deepseek-ai/DeepSeek-R1", 671_026_419_200, deepseek_v3()),
    "deepseek-v3.2": ("deepseek-ai/DeepSeek-V3.2-Exp", 671_877_944_064, deepseek_v3(
        "deepseek_v32", "DeepseekV32ForCausalLM", index_n_heads=64, index_head_dim=128, index_topk=2048)),
    "gpt-oss-20b": ("openai/gpt-oss-20b", 20_914_757_184, gpt_oss(24, 32)),
    "gpt-oss-120b": ("openai/gpt-oss-120b", 116_829_156_672, gpt_oss(36, 128)),
    "gemma-3-1b": ("google/gemma-3-1b-it", 999_885_952, gemma3(
        1152, 26, 6912, 4, 1, 256, 256, vocab_size=262144, sliding_window=512, max_position_embeddings=32768, rope_scaling=None)),
    "gemma-3-4b": ("google/gemma-3-4b-it", 3_880_263_168, gemma3(2560, 34, 10240, 8, 4, 256, 256)),
    "gemma-3-12b": ("google/gemma-3-12b-it", 11_766_034_176, gemma3(3840, 48, 15360, 16, 8, 256, 256)),
    "gemma-3-27b": ("google/gemma-3-27b-it", 27_009_346_304, gemma3(5376, 62, 21504, 32, 16, 128, 168)),
    "phi-3-mini": ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, sizes(
        "phi3", "Phi3ForCausalLM", 32064, 3072, 32, 8192, 32, 32, 4096, eps=1e-5, original_max_position_embeddings=4096,
        sliding_window=2047, rope_scaling=None)),
    "phi-4": ("microsoft/phi-4", 14_659_507_200, sizes(
        "phi3", "Phi3ForCausalLM", 100352, 5120, 40, 17920, 40, 10, 16384, eps=1e-5, theta=250000, sliding_window=None,
        original_max_position_embeddings=16384, rope_scaling=None)),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", 3_836_021_760, sizes(
        "phi3", "Phi3ForCausalLM", 200064, 3072, 32, 8192, 24, 8, 131072, eps=1e-5, tied=True, partial_rotary_factor=0.75,
        original_max_position_embeddings=4096, sliding_window=262144,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": PHI4_LONG})),
    "bert-base": ("google-bert/bert-base-uncased", 109_514_298, {
        **BERT, "architectures": ["BertForMaskedLM"], "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072}),
    "bert-large": ("google-bert/bert-large-uncased", 335_174_458, {
        **BERT, "architectures": ["BertForMaskedLM"], "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096}),
    "all-minilm-l6-v2": ("sentence-transformers/all-MiniLM-L6-v2", 22_713_216, {
        **BERT, "architectures": ["BertModel"], "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536}),
    "clip-vit-base-patch32": ("openai/clip-vit-base-patch32", 151_277_313, {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 512,
        "text_config": {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 2},
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                          "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}}),
    "clip-vit-large-patch14": ("openai/clip-vit-large-patch14", 427_616_513, {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768,
        "text_config": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 2},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                          "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu"}}),
}


def names() -> list[str]:
    return sorted(KNOWN)


def find_config(name: str) -> Fields:
    """The config.json of a well-known model, by its name here (upper or lower case) or its Hub id. BadInput names the nearest."""
    wanted = name.lower()
    for known, (hub_id, _, fields) in KNOWN.items():
        if wanted in (known, hub_id.lower()):
            return deepcopy(fields)
    raise BadInput(f"there is no well-known model {name!r}{nearest(wanted, names())}", next=f"known: {', '.join(names())}")


def hub_id(name: str) -> str:
    """Where a well-known model's files are, of which its tokenizer is one."""
    return KNOWN[name.lower()][0]


def nearest_name(name: str) -> str | None:
    close = difflib.get_close_matches(name.lower(), names(), n=1)
    return close[0] if close else None
