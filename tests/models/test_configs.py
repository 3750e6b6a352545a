"""What config.json leaves out or says in older words: the same as transformers makes of it."""

import pytest
from tiny_checkpoints import BASE
from transformers import GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from pellucid.errors import BadInput
from pellucid.models import spec_of
from pellucid.models.config import rotary_share
from pellucid.models.families import config_of
from pellucid.models.long_context import with_rope_scaling
from pellucid.nn import Rope, count_parameters

SMALL = {k: v for k, v in BASE.items() if not k.endswith("token_id")}


def sizes(model_type, vocab, dim, layers, hidden, heads, kv_heads, **more):
    return {"model_type": model_type, "vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": hidden,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("fields", [
    {}, {"sliding_window": 7}, {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 7}, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    {"use_sliding_window": True, "max_window_layers": 1}, {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 28},
], ids=str)
def test_which_layers_of_qwen_have_a_window(config, fields):
    fields = {**SMALL, "num_hidden_layers": 30, **fields}
    theirs = config(**fields)
    windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert [layer.mixer.window for layer in spec_of({"model_type": config.model_type, **fields}).layers] == windows


@pytest.mark.parametrize("fields", [{}, {"sliding_window": None}, {"sliding_window": 9}], ids=str)
def test_null_is_not_absence_for_mistrals_window(fields):
    theirs = MistralConfig(**SMALL, **fields)
    assert {layer.mixer.window for layer in spec_of({"model_type": "mistral", **SMALL, **fields}).layers} == {theirs.sliding_window}


@pytest.mark.parametrize("config", [MistralConfig, Phi3Config, Qwen2Config, Qwen3Config])
def test_defaults(config):
    """A config.json that states sizes only."""
    theirs, ours = config(**SMALL), spec_of({"model_type": config.model_type, **SMALL})
    mixer = ours.layers[0].mixer
    assert mixer.head_dim == getattr(theirs, "head_dim", 12) and mixer.rope.theta == theirs.rope_parameters["rope_theta"]
    assert mixer.window == getattr(theirs, "sliding_window", None) and ours.context == BASE["max_position_embeddings"]
    assert (ours.eps, ours.tied, ours.layers[0].ffn.act) == (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.hidden_act)


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
def test_without_a_number_of_key_value_heads_there_are_as_many_as_queries(config):
    fields = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    mixer = spec_of({"model_type": config.model_type, **fields}).layers[0].mixer
    assert mixer.kv_heads == config(**fields).num_key_value_heads == mixer.heads == 4


def test_defaults_of_gpt2():
    theirs = GPT2Config()
    ours = spec_of({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12})
    assert (ours.context, ours.eps, ours.tied) == (theirs.n_positions, theirs.layer_norm_epsilon, theirs.tie_word_embeddings)
    assert (ours.layers[0].ffn.hidden, ours.layers[0].ffn.act) == (4 * 768, theirs.activation_function)
    for fields in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"n_head": 7}, {"n_inner": 0}):
        with pytest.raises(BadInput, match=next(iter(fields)) if "n_head" not in fields else "n_embd"):
            spec_of({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, **fields})


@pytest.mark.parametrize("word", ["su", "yarn", "longrope"])
def test_phi3s_words_for_longrope(word):
    lists = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    theirs = Phi3Config(**SMALL, rope_scaling={"type": "longrope", **lists}, original_max_position_embeddings=32)
    rope = spec_of({"model_type": "phi3", **SMALL, "rope_scaling": {"type": word, **lists},
                    "original_max_position_embeddings": 32}).layers[0].mixer.rope
    assert theirs.rope_parameters["rope_type"] == rope.scaling_dict["rope_type"] == "longrope"
    assert theirs.rope_parameters["original_max_position_embeddings"] == rope.scaling_dict["original_max_position_embeddings"]


@pytest.mark.parametrize(("count", "fields"), [
    (124_439_808, {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}),
    (7_241_732_096, sizes("mistral", 32000, 4096, 32, 14336, 32, 8)),
    (6_910_365_696, sizes("llama", 102400, 4096, 30, 11008, 32, 32)),  # DeepSeek LLM 7B
    (494_032_768, sizes("qwen2", 151936, 896, 24, 4864, 14, 2, tie_word_embeddings=True)),  # Qwen2.5-0.5B
    (7_615_616_512, sizes("qwen2", 152064, 3584, 28, 18944, 28, 4)),  # Qwen2.5-7B
    (3_821_079_552, sizes("phi3", 32064, 3072, 32, 8192, 32, 32)),  # Phi-3-mini
    (999_885_952, sizes("gemma3_text", 262144, 1152, 26, 6912, 4, 1, head_dim=256)),  # Gemma 3 1B
], ids=lambda value: f"{value:,}" if isinstance(value, int) else value["model_type"])
def test_parameters_of_released_models(count, fields):
    assert count_parameters(spec_of(fields)) == count


def test_shares_and_scales_come_back_whole():
    """44 * (30 / 44) is less than 30, and (7 ** -0.5) ** -2 less than 7: what is written must be read as it was."""
    for head in range(2, 300):
        assert all(int(head * rotary_share(Rope(turned), head)) == turned for turned in range(2, head + 1, 2))
    fields = {"model_type": "gemma3_text", **SMALL}
    assert all(config_of(spec_of({**fields, "query_pre_attn_scalar": n}))["query_pre_attn_scalar"] == n for n in range(1, 300))
    spec = spec_of({"model_type": "phi3", **SMALL, "head_dim": 44, "partial_rotary_factor": rotary_share(Rope(30), 44)})
    assert with_rope_scaling(spec, {"rope_type": "linear", "factor": 2.0}).layers[0].mixer.rope.dim == 30
