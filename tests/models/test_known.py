"""Well-known models: our count of each from its config.json alone, the published one, and transformers' of the same config."""

from dataclasses import replace

import pytest
import torch
import transformers

from pellucid.errors import BadInput
from pellucid.models import known, spec_of
from pellucid.models.hub import blank
from pellucid.nn import count_parameters
from pellucid.nn.count import cache_entries, count, mtp_parameters


@pytest.mark.parametrize("name", known.names())
def test_parameters(name):
    """The published number, from the spec; and the model built on the meta device has as many."""
    _, published, fields = known.KNOWN[name]
    spec = spec_of(fields)
    if getattr(spec, "mtp", ()):
        spec = replace(spec, mtp=())
    assert count_parameters(spec) == published
    assert sum(p.numel() for p in blank(spec).parameters()) == published


@pytest.mark.parametrize("name", [name for name in known.names() if name != "qwen-7b"])  # which transformers does not have
def test_transformers_counts_the_same(name):
    _, published, fields = known.KNOWN[name]
    architecture = getattr(transformers, fields["architectures"][0])
    fields = {k: v for k, v in known.find_config(name).items() if k not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = architecture(architecture.config_class(**fields))
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))  # buffers there
    assert model.num_parameters() + biases == published


def test_deepseek_v3_as_published():
    """671B, of which 37B are active, with the head and without the embedding's rows (arXiv 2412.19437); the layer that predicts a
    further token has 11.5B of its own beside its joining matrix (README_WEIGHTS.md); 70,272 bytes of cache (arXiv 2505.09343)."""
    spec = spec_of(known.find_config("deepseek-v3"))
    assert round(count_parameters(replace(spec, mtp=())) / 1e9) == 671
    assert round((mtp_parameters(spec) - 2 * spec.dim**2) / 1e9, 1) == 11.5
    active = sum(count(part, spec.dim).active_matrices for layer in spec.layers for part in (layer.mixer, layer.ffn))
    assert round((active + spec.vocab * spec.dim) / 1e9) == 37
    assert 2 * sum(cache_entries(layer.mixer) for layer in spec.layers) == 70_272


@pytest.mark.parametrize(("name", "size"), [("llama-3.1-8b", 131_072), ("qwen3-30b-a3b", 98_304), ("qwen2.5-72b", 327_680)])
def test_cache_bytes_as_published(name, size):
    """In bfloat16, a token."""
    assert 2 * sum(cache_entries(layer.mixer) for layer in spec_of(known.find_config(name)).layers) == size


def test_names():
    assert known.find_config("DeepSeek-V3") == known.find_config("deepseek-ai/DeepSeek-V3")
    assert known.nearest_name("deepseek-v33") == "deepseek-v3"
    with pytest.raises(BadInput, match="did you mean 'qwen3-8b'"):
        known.find_config("qwen3-8")
    known.find_config("gpt2")["n_layer"] = 0  # a copy
    assert known.find_config("gpt2")["n_layer"] == 12
