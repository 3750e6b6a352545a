"""A decoder with attention, linear attention, a dense and a sparse feed-forward."""

from pellucid.nn import GDN, MLP, Attn, DecoderSpec, Layer, MoE, Rope


def hybrid_spec() -> DecoderSpec:
    moe = MoE(6, 2, 20, shared=28, shared_gate=True, renormalize=True)
    full = Layer(Attn(4, 2, 32, Rope(8), qk_norm=True, gate=True), moe)
    linear = Layer(GDN(2, 4, 8, 12), MLP(30))
    return DecoderSpec(96, 48, (full, linear, full, linear), norm="rms_centred")
