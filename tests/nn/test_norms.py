"""Where norms and scaled embeddings round in half precision, against the modules of transformers: in float32 all of these are equal."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from pellucid.models import spec_of
from pellucid.nn import Decoder
from pellucid.nn.site import Site
from pellucid.ops import qkv_heads
from pellucid.ops.heads import qkv_heads_reference

SIZES = {"vocab_size": 32, "hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 48,
         "num_key_value_heads": 1, "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64}
FAMILIES = {"llama": LlamaRMSNorm, "gpt_oss": GptOssRMSNorm, "gemma3_text": Gemma3RMSNorm, "qwen3_next": Qwen3NextRMSNorm}


def drawn(shape, dtype, spread=1.0, seed=0):
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def reference(kind, dim, eps, weight):
    norm = kind(dim, eps=eps).to(weight.dtype)
    norm.weight = torch.nn.Parameter(weight)
    return norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_familys_norm_rounds_where_its_reference_does(family, dtype):
    """Statistics may differ in their last bit, so a few results round the other way; rounding elsewhere, every tenth would at least."""
    spec = spec_of({"model_type": family, **SIZES})
    ours = Site(96, 1e-5, spec.norm).new_norm().to(dtype)
    x, weight = drawn((64, 96), dtype, 3.0), drawn(96, dtype, 0.3, 1) + (family in ("llama", "gpt_oss"))
    ours.weight = torch.nn.Parameter(weight)
    same = {name: (reference(kind, 96, 1e-5, weight)(x) == ours(x)).float().mean() for name, kind in FAMILIES.items()}
    assert same[family] > 0.99
    alike = {"gemma3_text", "qwen3_next"} if family in ("gemma3_text", "qwen3_next") else {family}
    assert all(share < 0.9 for name, share in same.items() if name not in alike), same


@pytest.mark.parametrize("call", [qkv_heads, qkv_heads_reference])
@torch.no_grad()
def test_centred_norms_of_heads_are_applied_in_float32(call):
    """Gemma 3 and Qwen3-Next: 1 + w, rounded to bfloat16, would be off by up to 0.4% in the same entry of every head."""
    dtype, site = torch.bfloat16, Site(96, 1e-6, "rms_centred")
    norms = [site.head_norm(48).to(dtype) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight = torch.nn.Parameter(drawn(48, dtype, 0.3, i))
    qkv, cos = drawn((2, 40, 4, 48), dtype, 3.0, 5), torch.ones(1, 40, 48, dtype=dtype)
    q, k, v = call(qkv, 2, cos, torch.zeros_like(cos), tuple(norm.scale for norm in norms), 1e-6)
    for got, part, norm in ((q, qkv[:, :, :2], norms[0]), (k, qkv[:, :, 2:3], norms[1])):
        want = reference(Gemma3RMSNorm, 48, 1e-6, norm.weight)(part).transpose(1, 2)
        assert (got == want).float().mean() > 0.99
    assert torch.equal(v, qkv[:, :, 3:].transpose(1, 2))


@torch.no_grad()
def test_gemmas_embedding_is_scaled_by_a_rounded_factor():
    spec = spec_of({"model_type": "gemma3_text", **SIZES})
    model, x = Decoder(spec), torch.arange(32)[None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        theirs = Gemma3TextScaledWordEmbedding(32, 96, 0, embed_scale=96**0.5)
        theirs.weight = torch.nn.Parameter(drawn((32, 96), torch.float32))
        model.embed.weight = torch.nn.Parameter(theirs.weight.to(dtype))
        assert torch.equal(model.embedded(x), theirs.to(dtype)(x))
