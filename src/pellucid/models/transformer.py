"""The original Transformer (arXiv 1706.03762), by two roads that differ on purpose:

    marian        checkpoints of MarianMT (Helsinki-NLP/opus-mt-*): sines in the first half of a position, cosines in the second;
                  a bias on the logits
    transformer   the state of a `torch.nn.Transformer`, with its embeddings: sines and cosines in turn, as in the paper; one more
                  norm behind each stack. On disk it has a model_type of its own, for which transformers has no class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.models.config import Config, wrong
from pellucid.models.families import family, family_of
from pellucid.models.names import MARIAN, TORCH, targets
from pellucid.models.weights import assemble, planned
from pellucid.nn import EncoderDecoder
from pellucid.nn.specs import MLP, Attn, EncoderDecoderSpec, Layer, Rope
from pellucid.ops import ACTIVATIONS

KEPT = ("bos_token_id", "pad_token_id", "forced_eos_token_id", "bad_words_ids", "num_beams", "max_length")
SIDES = ("encoder", "decoder")


def side(heads: int, dim: int, hidden: int, act: str, count: int, decoder: bool, order: str = "post") -> tuple[Layer, ...]:
    """The layers of one side."""
    attn = Attn(heads, heads, dim // heads, Rope(0), qkv_bias=True, out_bias=True, causal=decoder)
    cross = Attn(heads, heads, dim // heads, Rope(0), qkv_bias=True, out_bias=True, causal=False) if decoder else None
    return (Layer(attn, MLP(hidden, act, bias=True, gated=False), order, cross),) * count


def sides(c: Config, order: str = "post") -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    dim, act = c.need("d_model", high=2**20), c.one_of("activation_function", "gelu", ACTIVATIONS)
    both = []
    for name in SIDES:
        heads = c.need(f"{name}_attention_heads", high=2**12)
        if dim % heads or dim % 2:
            raise wrong("d_model", dim, f"even, and a multiple of {name}_attention_heads, {heads}")
        hidden, count = c.need(f"{name}_ffn_dim"), c.need(f"{name}_layers", high=1000)
        both.append(side(heads, dim, hidden, act, count, name == "decoder", order))
    return both[0], both[1]


def side_fields(spec: EncoderDecoderSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"vocab_size": spec.vocab, "d_model": spec.dim, "activation_function": spec.decoder[0].ffn.act}
    for name, layers in zip(SIDES, (spec.encoder, spec.decoder), strict=True):
        found |= {f"{name}_layers": len(layers), f"{name}_attention_heads": layers[0].mixer.heads,
                  f"{name}_ffn_dim": layers[0].ffn.hidden}
    return {**found, "max_position_embeddings": spec.context, "decoder_start_token_id": spec.start, "eos_token_id": spec.end,
            "tie_word_embeddings": spec.tied, "is_encoder_decoder": True}


# --- Marian -----------------------------------------------------------------------------------------------------------


def marian_fields(spec: EncoderDecoderSpec) -> dict[str, Any]:
    return {
        **side_fields(spec), "scale_embedding": spec.embed_scale != 1, "share_encoder_decoder_embeddings": not spec.target_vocab,
        "decoder_vocab_size": spec.target_vocab or spec.vocab, "pad_token_id": dict(spec.extra).get("pad_token_id", spec.start),
    }


def marian_variant(spec: EncoderDecoderSpec) -> dict[str, Any]:
    return {"names": {**MARIAN, "embed.weight": ("model.encoder.embed_tokens.weight",)}, "ignored": POSITIONS} if spec.target_vocab else {}


POSITIONS = (r"embed_positions\.weight$",)


@family("marian", architecture="MarianMTModel", names=MARIAN, fields=marian_fields, variant=marian_variant,
        ignored=(*POSITIONS, r"^model\.(en|de)coder\.embed_tokens\.weight$"))
def marian(c: Config) -> EncoderDecoderSpec:
    encoder, decoder = sides(c)
    dim, vocab, shared = c.need("d_model"), c.need("vocab_size"), bool(c.get("share_encoder_decoder_embeddings", True))
    return EncoderDecoderSpec(
        vocab, dim, encoder, decoder, context=c.whole("max_position_embeddings", 1024),
        embed_scale=dim**0.5 if c.get("scale_embedding", False) else 1.0,
        target_vocab=0 if shared else c.whole("decoder_vocab_size", vocab, high=2**24), tied=bool(c.get("tie_word_embeddings", True)),
        logits_bias=True, start=c.whole("decoder_start_token_id", 58100, low=0), end=c.whole("eos_token_id", 0, low=0),
        family="marian", extra=tuple((name, c.get(name)) for name in KEPT if c.get(name) is not None))


# --- torch.nn.Transformer ---------------------------------------------------------------------------------------------


def torch_fields(spec: EncoderDecoderSpec) -> dict[str, Any]:
    return {
        **side_fields(spec), "layer_norm_eps": spec.eps, "embedding_scale": spec.embed_scale, "norm_first": spec.encoder[0].order == "pre",
        "target_vocab_size": spec.target_vocab or None, "logits_bias": spec.logits_bias,
    }


@family("transformer", architecture="Transformer", names=TORCH, fields=torch_fields)
def transformer(c: Config) -> EncoderDecoderSpec:
    encoder, decoder = sides(c, "pre" if c.get("norm_first", False) else "post")
    dim = c.need("d_model")
    return EncoderDecoderSpec(
        c.need("vocab_size"), dim, encoder, decoder, eps=c.number("layer_norm_eps", 1e-5, high=1.0),
        context=c.whole("max_position_embeddings", 5000), positions="sinusoid-pairs",
        embed_scale=c.number("embedding_scale", dim**0.5), final_norm=True, target_vocab=c.whole("target_vocab_size", 0),
        tied=bool(c.get("tie_word_embeddings", True)), logits_bias=bool(c.get("logits_bias", False)),
        start=c.whole("decoder_start_token_id", 0, low=0), end=c.whole("eos_token_id", 0, low=0), family="transformer")


@torch.no_grad()
def from_torch(
    state: Mapping[str, Tensor], embedding: Tensor, heads: int, *, target_embedding: Tensor | None = None,
    head: Tensor | None = None, head_bias: Tensor | None = None, act: str = "relu", norm_first: bool = False, eps: float = 1e-5,
    embed_scale: float | None = None, context: int = 5000, start: int = 0, end: int = 0,
) -> EncoderDecoder:
    """An `EncoderDecoder` with the weights of a `torch.nn.Transformer`, which holds no embeddings and no head itself.

    state: its `state_dict()`.   embedding, target_embedding, head: (V, D) matrices; a missing target embedding is the source's,
    a missing head the target's embedding.   act, norm_first, eps, heads: as it was built.
    embed_scale: of the embeddings; default sqrt(D), as in the paper.
    """
    given = {"embedding.weight": embedding, "target_embedding.weight": target_embedding, "head.weight": head,
             "head.bias": None if head_bias is None else head_bias[None]}
    tensors: dict[str, Tensor] = {**split_cross(state), **{name: tensor for name, tensor in given.items() if tensor is not None}}
    dim = embedding.shape[1]
    if dim % heads or dim % 2:
        raise BadInput(f"embeddings of width {dim}, {heads} heads", "the width must be even and a multiple of the number of heads")
    encoder, decoder = (
        side(heads, dim, hidden_of(tensors, name), act, 1 + max((int(n.split(".")[2]) for n in state if n.startswith(f"{name}.layers.")),
             default=0), name == "decoder", "pre" if norm_first else "post") for name in SIDES)
    spec = EncoderDecoderSpec(
        len(embedding), dim, encoder, decoder, eps=eps, context=context, positions="sinusoid-pairs",
        embed_scale=dim**0.5 if embed_scale is None else embed_scale, final_norm=True,
        target_vocab=0 if target_embedding is None else len(target_embedding), tied=head is None,
        logits_bias=head_bias is not None, start=start, end=end, family="transformer")
    model = EncoderDecoder(spec).to(embedding.dtype)
    pieces = [(parameter, piece) for _, parameter, piece in targets(model, TORCH)]
    wanted = {piece.name: piece.shape for _, piece in pieces}
    wrong_ones = sorted(name for name in wanted.keys() | tensors.keys()
                        if name not in tensors or name not in wanted or tuple(tensors[name].shape) != wanted[name])
    if wrong_ones:
        raise BadInput("this state does not fit torch.nn.Transformer", f"missing, unknown or of another shape: {', '.join(wrong_ones[:8])}",
                       "give the state_dict() of a Transformer with biases, without the prefix of the module around it")
    for parameter, piece in pieces:
        piece.ours(parameter).copy_(piece.theirs(tensors[piece.name]))
    return model.eval()


def to_torch(model: EncoderDecoder) -> dict[str, Tensor]:
    """The inverse: a state for `torch.nn.Transformer.load_state_dict`; embeddings and head stay where they are."""
    if not model.spec.final_norm:
        raise BadInput("this model has no norm behind its stacks", "torch.nn.Transformer always has one")
    tensors = {name: assemble(parts) for name, parts in planned(model, family_of(model.spec), 0).items()}
    state = {}
    for name, tensor in tensors.items():
        if ".multihead_attn." in name and "_proj." in name and "out_proj" not in name:
            stem, leaf = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
            state[f"{stem}.in_proj_{leaf}"] = torch.cat([tensors[f"{stem}.{x}_proj.{leaf}"] for x in "qkv"])
        elif name.startswith(SIDES):
            state[name] = tensor
    return state


def split_cross(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`multihead_attn.in_proj_weight` (3D, D) becomes q_proj, k_proj and v_proj: only q is of the decoder's own tokens."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, found, leaf = name.partition(".multihead_attn.in_proj_")
        if found:
            tensors |= {f"{stem}.multihead_attn.{x}_proj.{leaf}": part for x, part in zip("qkv", tensor.chunk(3))}
        else:
            tensors[name] = tensor
    return tensors


def hidden_of(tensors: Mapping[str, Tensor], name: str) -> int:
    first = f"{name}.layers.0.linear1.weight"
    if first not in tensors:
        raise BadInput("this state does not fit torch.nn.Transformer", f"it has no {first}",
                       "give its state_dict(), without the prefix of the module around it")
    return len(tensors[first])
