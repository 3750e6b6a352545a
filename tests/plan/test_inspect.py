"""The inspector: counts against built models and published figures, two models side by side, what it cannot read."""

import json

import pytest
import torch
from small_models import hybrid_spec

import pellucid
from pellucid.__main__ import main
from pellucid.errors import BadInput
from pellucid.models import known, save
from pellucid.models.hub import shape_of, spec_of
from pellucid.nn import Decoder, forward_flops, init_weights
from pellucid.nn.count import mixing_flops
from pellucid.plan.inspect import decoder_parts
from pellucid.plan.tree import tree


@pytest.mark.parametrize("name", known.names())
def test_parts_add_up_to_the_model_built_from_the_same_spec(name):
    spec = spec_of(known.find_config(name))
    with torch.device("meta"):
        model = shape_of(spec)(spec)
    info = pellucid.inspect(name)
    assert info.parameters + info.ahead_parameters == sum(p.numel() for p in model.parameters())


def test_published_figures():
    """Section "numbers" of the model cards: Llama-3.1-8B and its cache (32 layers x 2 x 8 heads x 128 x 2 bytes)."""
    llama = pellucid.inspect("Llama-3.1-8B")
    assert llama.parameters == llama.active_parameters == 8_030_261_248
    assert llama.kv_bytes_per_token == 131_072 and llama.as_dict()["context"] == 131_072
    assert llama.active_without_embeddings == 8_030_261_248 - 2 * 128256 * 4096
    assert pellucid.inspect("llama-3.1-8b", cache_dtype="float32").kv_bytes_per_token == 2 * 131_072
    for codes in ("fp8", "int8"):  # a byte an entry, and a scale of two for each of 8 heads
        assert pellucid.inspect("llama-3.1-8b", cache_dtype=codes).kv_bytes_per_token == 32 * 2 * 8 * (128 + 2)
    matrices = llama.parameters - 128256 * 4096 - 65 * 4096  # the embedding is looked up, norms are no products
    assert llama.flops_per_token == 2 * matrices + 4 * 32 * 32 * 128
    assert llama.training_flops_per_token == 3 * llama.flops_per_token
    assert llama.flops(1000) - llama.flops_per_token == 999 * 4 * 32 * 32 * 128
    assert llama.flops(77) == forward_flops(llama.spec, 77)


def test_figures_of_sparse_models():
    """Qwen3-30B-A3B's model card; DeepSeek-V3: 671B, of which 37B are active, and 70 KB of cache a token (arXiv 2505.09343)."""
    qwen, deepseek = pellucid.inspect("qwen3-30b-a3b"), pellucid.inspect("deepseek-v3")
    assert (qwen.parameters, qwen.active_parameters, qwen.kv_bytes_per_token) == (30_532_122_624, 3_353_032_704, 98_304)
    assert deepseek.kv_bytes_per_token == 70_272 and deepseek.ahead_parameters > 11e9
    assert round(deepseek.parameters / 1e9) == 671 and round(deepseek.active_parameters / 1e9) == 38
    assert pellucid.inspect("qwen2.5-72b").kv_bytes_per_token == 327_680


def test_what_a_token_costs_beside_its_matrices():
    """DeepSeek-V3.2: 128 heads on latents of 512 + 64 entries, of 2048 keys at most; the indexer's 64 heads of 128 read them all.
    Qwen3-Next: 12 layers of 16 heads of 256, and 36 delta nets, each with 32 memories of 128 x 128 that are worked on four times."""
    sparse, hybrid = pellucid.inspect("deepseek-v3.2"), pellucid.inspect("qwen3-next-80b-a3b")
    index = 61 * 2 * 64 * 128
    assert sparse.flops(101) - sparse.flops(100) == index + 61 * 2 * 128 * (2 * 512 + 64)
    assert sparse.flops(5001) - sparse.flops(5000) == index
    assert hybrid.flops(2) - hybrid.flops(1) == 12 * 4 * 16 * 256
    assert sum(mixing_flops(layer.mixer, 1) for layer in hybrid.spec.layers) == 12 * 4 * 16 * 256 + 36 * 4 * 2 * 32 * 128 * 128


def test_a_hybrid_keeps_what_its_layers_keep():
    spec = hybrid_spec()
    parts = {part.name: part for part in decoder_parts(spec)}
    with torch.device("meta"):
        model = Decoder(spec)
    assert sum(p.parameters for p in parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["experts"].active * 3 == parts["experts"].parameters  # 2 of 6
    assert parts["experts"].parameters == 2 * 6 * 3 * 48 * 20 and parts["router"].parameters == 2 * 6 * 48


def test_folder_with_files_and_tokenizer(tmp_path, capsys):
    spec = spec_of(known.find_config("qwen3-0.6b") | {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 50, "intermediate_size": 24})
    save(init_weights(Decoder(spec)).bfloat16(), tmp_path / "m")
    info = pellucid.inspect(tmp_path / "m")
    assert info.stored == {"BF16": info.parameters} and info.dtype == "bfloat16" and "error" in info.tokenizer
    assert main(["inspect", str(tmp_path / "m"), "--json"]) == 0
    (event,) = [e for e in map(json.loads, capsys.readouterr().out.splitlines()) if e["kind"] == "evaluation"]
    assert event["details"]["parameters"] == info.parameters and event["details"]["spec"]["dim"] == 16


def test_two_models_side_by_side(capsys):
    assert main(["inspect", "--compare", "llama-3.1-8b", "llama-3.1-405b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("≠ dim ") and "4,096" in line and "16,384" in line for line in lines)
    assert any(line.startswith("  layers.mixer.kv_heads") for line in lines)
    assert main(["inspect", "--compare", "llama-3.1-8b", "llama-3.1-8b"]) == 0
    assert "≠" not in capsys.readouterr().out


def test_models_of_two_contexts_are_compared_at_the_shorter(capsys):
    assert main(["inspect", "--compare", "qwen3-8b", "llama-3.1-8b"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FLOPs a token at context" in line]
    assert "40,960" in line and f"{pellucid.inspect('qwen3-8b').flops(40_960):,}" in line and f"{pellucid.inspect('llama-3.1-8b').flops(40_960):,}" in line


def test_what_an_encoder_is_made_of(capsys):
    """bert-base: 109,514,298 parameters, of which 23,835,648 are its three embeddings and 622,650 its head (less the tied matrix)."""
    bert = pellucid.inspect("bert-base")
    assert bert.parameters - bert.active_without_embeddings == (30522 + 512 + 2) * 768 + 768 * 768 + 3 * 768 + 30522
    assert main(["inspect", "bert-base"]) == 0
    assert "cache" not in capsys.readouterr().out  # it keeps nothing


def test_the_tokenizer_of_a_well_known_model_is_sought_on_the_hub(capsys):
    assert main(["inspect", "qwen3-8b", "--text", "hi"]) == 2
    assert "Qwen/Qwen3-8B" in capsys.readouterr().err


def test_the_tree_says_equal_layers_once():
    lines = tree(hybrid_spec())
    assert sum("Attn" in line for line in lines) == 1 and any("layers 0, 2" in line for line in lines)


@pytest.mark.parametrize(("argv", "says"), [
    ([], "needs one model"), (["a", "--compare", "b", "c"], "needs one model"), (["--compare", "qwen3-8b", "qwen3-4b", "--text", "x"], "not by two"), (["llama-3.1-8bb"], "llama-3.1-8b"),
    (["llama-3.1-8b", "--cache-dtype", "int3"], "int3")])
def test_refusals(argv, says, capsys):
    assert main(["inspect", *argv]) == 2
    assert says in capsys.readouterr().err


def test_find_config_names_the_nearest():
    with pytest.raises(BadInput, match=r"qwen3-0\.6b"):
        known.find_config("qwen3-0.6")
