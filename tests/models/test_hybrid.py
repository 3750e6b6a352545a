"""Qwen3-Next and Qwen3.5 beyond the shared suite (test_parity.py): files of multimodal models, layers of real size."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import BASE, DELTA, PART, assert_equal, tokens, written
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

import pellucid
from pellucid.models import save
from pellucid.models.families import find
from pellucid.models.names import targets
from pellucid.nn import GDN, Attn, Rope
from pellucid.nn.build import build
from pellucid.nn.context import open_context
from pellucid.nn.site import Site

EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
        "num_position_embeddings": 16}
SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def drawn(model):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=g))
    model.tie_weights()
    return model.eval()


def qwen3_5():
    text = {**BASE, **DELTA, "rms_norm_eps": 1e-2, "rope_parameters": {**PART, "mrope_section": [2, 1, 1]}}
    return Qwen3_5ForConditionalGeneration._from_config(
        Qwen3_5Config(text_config=text, vision_config=EYES, image_token_id=90, video_token_id=91), attn_implementation="eager")


def gemma3():
    text = {**BASE, "head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForConditionalGeneration._from_config(
        Gemma3Config(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=90), attn_implementation="eager")


@pytest.mark.parametrize(("model", "layout"), [
    (qwen3_5, "model.language_model."), (gemma3, "model.language_model."), (gemma3, "language_model.model.")])
def test_the_text_model_of_a_multimodal_file(model, layout, tmp_path):
    """Its tensors stand under another prefix, the eyes' and a further predictor's are left alone, config.json nests it under
    text_config; what we write is a text model."""
    want_of = drawn(model())
    want_of.save_pretrained(tmp_path / "all")
    tensors = load_file(tmp_path / "all" / "model.safetensors")
    assert any("vis" in name for name in tensors) and any("language_model." in name for name in tensors)
    tensors = {re.sub(r"^(model\.)?language_model\.(model\.)?", layout, name): t for name, t in tensors.items()}
    if model is qwen3_5:
        tensors |= {"mtp.fc.weight": torch.ones(3, 3), "mtp.layers.0.input_layernorm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "all" / "model.safetensors", metadata={"format": "pt"})
    ours, x = pellucid.load(tmp_path / "all"), tokens(2, 30) % 89 + 1
    save(ours, tmp_path / "text")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    with torch.no_grad():
        want = want_of(input_ids=x).logits
        assert_equal(ours(x), want)
        assert_equal(back(input_ids=x).logits, want)


@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5-moe"])
@pytest.mark.parametrize("options", [{"save_original_format": False}, {"max_shard_size": "30KB"}], ids=["fused", "sharded"])
def test_layouts_of_files(name, options, tmp_path):
    """Experts in one tensor or one by one, all in one file or in many; saving writes what the Hub has: fused for Qwen3.5."""
    reference = written(name, tmp_path / "in", **options)
    ours, x = pellucid.load(tmp_path / "in"), tokens(2, 30)
    with torch.no_grad():
        assert_equal(ours(x), reference(input_ids=x).logits)
    save(ours, tmp_path / "out")
    fused = any(key.endswith("mlp.experts.gate_up_proj") for key in load_file(tmp_path / "out" / "model.safetensors"))
    assert fused == (name == "qwen3.5-moe")


def test_what_gemma_3_4b_leaves_unsaid(tmp_path):
    """The fields of google/gemma-3-4b-it's text_config, all of them; 3,880,263,168 parameters in the text model."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    spec = pellucid.models.spec_of({"model_type": "gemma3", "text_config": text})
    assert pellucid.nn.count_parameters(spec) == 3_880_263_168
    kinds = [layer.mixer.window for layer in spec.layers]
    assert kinds == [None if i % 6 == 5 else 1024 for i in range(34)]
    assert {m.rope for m in (layer.mixer for layer in spec.layers)} == {
        Rope(256, 1e4), Rope(256, 1e6, scaling=(("rope_type", "linear"), ("factor", 8.0)))}


def test_counts_of_the_released_models():
    """Qwen3-Next-80B-A3B: its page says 80B in total and 79B without embeddings; three layers of four are linear."""
    fields = Qwen3NextConfig().to_dict() | {"model_type": "qwen3_next"}
    with torch.device("meta"):
        want = theirs.Qwen3NextForCausalLM(Qwen3NextConfig())
    spec = pellucid.models.spec_of(json.loads(json.dumps(fields)))
    assert pellucid.nn.count_parameters(spec) == sum(p.numel() for p in want.parameters())
    assert [isinstance(layer.mixer, Attn) for layer in spec.layers] == [i % 4 == 3 for i in range(48)]


REAL = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}, "mlp_only_layers": [0, 1, 2, 3]}


def filled(spec, reference, number):
    """Our block with the reference's weights, by the family's own table."""
    block = torch.nn.Module()
    block.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(number + 1))
    ours = block.layers[number].mixer = build(spec, Site(2048, 1e-6, "rms_centred")).bfloat16()
    tensors = {name.split(".", 1)[1]: t for name, t in reference.named_parameters(prefix="layer")}
    with torch.no_grad():
        for _, parameter, piece in targets(block, find("qwen3_next").names):
            piece.ours(parameter).copy_(piece.theirs(tensors[piece.name.split(".", 4)[-1]]))
    return ours


def test_half_precision_leaves_the_decay_wide(tmp_path):
    """Its logarithm is an exponent's exponent; the file's own numbers stay."""
    written("qwen3.5", tmp_path)
    mixer = pellucid.load(tmp_path, dtype="bfloat16").layers[0].mixer
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("A_log", "dt_bias"):
        assert torch.equal(getattr(mixer, name), tensors[f"model.layers.0.linear_attn.{name}"])
    assert mixer.out.weight.dtype == mixer.conv.dtype == torch.bfloat16


def test_a_delta_net_of_real_size_in_half_precision():
    """Qwen3-Next's: 16 key and 32 value heads of 128. The two round in different places: 2 % of the norm; states 1 %."""
    torch.manual_seed(0)
    reference = theirs.Qwen3NextGatedDeltaNet(Qwen3NextConfig(**REAL), 0).bfloat16()
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
        ours = filled(GDN(16, 32, 128, 128), reference, 0)
        x = torch.randn(1, 100, 2048).bfloat16()
        want, got = reference(x), ours(x, open_context(x, x.dtype))
    assert got.dtype == torch.bfloat16 and want.std() > 0.1
    assert (got.float() - want.float()).norm() < 0.02 * want.float().norm()


def test_gated_attention_of_real_size_far_beyond_the_trained_context():
    """Positions around one million, where float32 angles are coarse and bfloat16 positions would be useless."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(**REAL)
    config._attn_implementation = "eager"
    reference, at = theirs.Qwen3NextAttention(config, 3).bfloat16(), torch.arange(1_000_000, 1_000_064)[None]
    mask = torch.full((64, 64), -torch.inf, dtype=torch.bfloat16).triu(1)[None, None]
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
        rope = Rope(64, 1e7)
        ours = filled(Attn(16, 2, 256, rope, qk_norm=True, gate=True), reference, 3)
        x = torch.randn(1, 64, 2048).bfloat16()
        want, _ = reference(x, theirs.Qwen3NextRotaryEmbedding(config)(x, at), mask)
        got = ours(x, open_context(x, x.dtype, positions=at))
        near = ours(x, open_context(x, x.dtype))
    assert (got.float() - want.float()).norm() < 0.02 * want.float().norm()
    assert (near.float() - want.float()).norm() < 0.05 * want.float().norm()  # only distances matter, as far as rounding goes


@pytest.mark.parametrize("config", [Qwen3NextConfig, Qwen3_5TextConfig, Qwen3_5MoeTextConfig])
def test_what_hybrids_leave_unsaid(config):
    """A quarter of each head is rotated, every fourth layer sees everything; the sizes as in the released models."""
    theirs = config(num_hidden_layers=9)
    ours = pellucid.models.spec_of({"model_type": config.model_type, "vocab_size": theirs.vocab_size, "hidden_size": theirs.hidden_size,
                                    "num_hidden_layers": 9, "num_attention_heads": theirs.num_attention_heads, "num_key_value_heads": theirs.num_key_value_heads})
    mixers = [layer.mixer for layer in ours.layers]
    attention, delta = mixers[3], mixers[0]
    assert ["full_attention" if mixer == attention else "linear_attention" for mixer in mixers] == theirs.layer_types
    assert attention.head_dim == theirs.head_dim and attention.rope.dim == int(theirs.head_dim * theirs.rope_parameters["partial_rotary_factor"])
    assert attention.rope.dim == attention.head_dim // 4 and attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (delta.k_heads, delta.v_heads, delta.k_dim, delta.v_dim, delta.conv) == tuple(getattr(theirs, f"linear_{name}") for name in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"))
    assert ours.eps == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings


def test_a_multimodal_file_says_outside_what_its_text_model_shares():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 2}
    for tied in (False, True):
        assert pellucid.models.spec_of({"model_type": "gemma3", "tie_word_embeddings": tied, "text_config": text}).tied is tied
