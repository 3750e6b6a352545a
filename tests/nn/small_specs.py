"""Small specs that together use every field of the blocks, and models of them with nothing left at its default."""

from __future__ import annotations

import torch

from pellucid.nn import GDN, MLA, MLP, Attn, Decoder, DecoderSpec, Layer, Rope
from pellucid.nn.specs import DualChunk, Streaming

LLAMA3 = (("rope_type", "llama3"), ("factor", 4.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
          ("original_max_position_embeddings", 16))
YARN = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 16))
ROPE = Rope(8)


def spec(*mixers: Attn, mlp: MLP | None = None, **fields: object) -> DecoderSpec:
    layers = tuple(Layer(mixer, mlp or MLP(40)) for mixer in mixers)
    return DecoderSpec(**{"vocab": 61, "dim": 24, "layers": layers, "context": 256, **fields})


SPECS = {
    "qwen3": spec(*(Attn(4, 2, 8, ROPE, qk_norm=True),) * 2, tied=True),
    "llama": spec(*(Attn(2, 2, 8, Rope(8, scaling=LLAMA3), qkv_bias=True, out_bias=True),) * 2, mlp=MLP(20, bias=True)),
    "mqa": spec(*(Attn(4, 1, 6, Rope(6, 500.0), qkv_bias=True),) * 2, mlp=MLP(30, "gelu"), eps=1e-3),
    "window": spec(Attn(4, 2, 8, ROPE, window=5), Attn(4, 2, 8, ROPE), Attn(2, 1, 8, ROPE, qk_norm=True, window=2)),
    "gpt2": spec(*(Attn(3, 3, 8, Rope(0), qkv_bias=True, out_bias=True),) * 2, mlp=MLP(20, "gelu_new", True, gated=False),
                 norm="layer", positions="learned"),
    "gemma3": DecoderSpec(61, 24, tuple(
        Layer(Attn(4, 2, 8, Rope(8, theta), qk_norm=True, window=window, scale=0.2), MLP(20, "gelu_pytorch_tanh"), order="sandwich")
        for theta, window in ((1e4, 5), (1e6, None))), tied=True, context=256, norm="rms_centred", embed_scale=24**0.5),
    "gemma3-full": spec(Attn(4, 2, 8, ROPE, qk_norm=True, scale=0.2), norm="rms_centred", embed_scale=3.0),
    "yarn": spec(*(Attn(4, 2, 8, Rope(6, scaling=YARN, attention_factor=1.3)),) * 2, mlp=MLP(20, gated=False)),
    "mla": spec(*(MLA(4, 10, 6, 10, 7, Rope(8, interleaved=True, scaling=YARN, attention_factor=1.2), scale=0.4, bias=True, eps=1e-3),) * 2),
    "mla-plain": spec(*(MLA(3, None, 9, 4, 10, Rope(6)),) * 2, eps=1e-3),
    "delta": spec(GDN(2, 4, 8, 6), Attn(4, 2, 16, Rope(4), qk_norm=True, gate=True), GDN(2, 2, 4, 10, conv=3), norm="rms_centred", eps=1e-2),
    "delta-only": spec(*(GDN(1, 3, 6, 8),) * 2, eps=1e-3),
    "streaming": spec(Attn(4, 2, 8, ROPE, qk_norm=True, reach=Streaming(2, 9)), Attn(2, 1, 12, Rope(8, interleaved=True), qkv_bias=True,
                                                                                    reach=Streaming(0, 5))),
    "dual-chunk": spec(Attn(4, 2, 8, ROPE, qk_norm=True, reach=DualChunk(16, 5)), Attn(2, 1, 12, Rope(8), gate=True, reach=DualChunk(9, 0))),
    "interleaved": spec(*(Attn(2, 2, 8, Rope(8, interleaved=True)),) * 2, family="llama"),
}


def built(name: str, seed: int = 0) -> Decoder:
    model = Decoder(SPECS[name])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.3 * noise if "norm" in key else 0.3 * noise)
    return model.eval()


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, want.abs().max().item())
    worst = (got - want).abs().max().item()
    assert worst <= limit, f"differs by {worst:.2e}, {limit:.2e} is allowed"
