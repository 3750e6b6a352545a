"""What config.json leaves out or says in older words: the same as transformers makes of it."""

import pytest
from tiny_checkpoints import BASE
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from pellucid.models import spec_of

SMALL = {k: v for k, v in BASE.items() if not k.endswith("token_id")}


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


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Qwen3Config])
def test_defaults(config):
    """A config.json that states sizes only."""
    theirs, ours = config(**SMALL), spec_of({"model_type": config.model_type, **SMALL})
    mixer = ours.layers[0].mixer
    assert mixer.head_dim == getattr(theirs, "head_dim", 12) and mixer.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (ours.eps, ours.tied, ours.layers[0].ffn.act) == (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.hidden_act)
