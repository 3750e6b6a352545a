"""BERT (arXiv 1810.04805): words, token types and learned positions, LayerNorm behind each part, exact GELU, biases.

The base encoder, a masked language model or a classifier, as `architectures` says. Sentence encoders of sentence-transformers
are the base with a pooling of their own: models/embedding.py.
"""

from __future__ import annotations

from typing import Any

from pellucid.models.config import Config, wrong
from pellucid.models.families import family
from pellucid.models.names import BERT
from pellucid.nn.specs import MLP, Attn, EncoderSpec, Layer, Rope
from pellucid.ops import ACTIVATIONS

HEADS = {"BertModel": "", "BertForMaskedLM": "mlm", "BertForPreTraining": "mlm", "BertForSequenceClassification": "classifier"}
USUAL = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
KEPT = ("pad_token_id", "problem_type")
BARE = {ours: tuple(name.removeprefix("bert.") for name in theirs) for ours, theirs in BERT.items() if isinstance(theirs, tuple)}
"""Files of the base model go without the prefix."""


def fields(spec: EncoderSpec) -> dict[str, Any]:
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    labels = {"id2label": dict(enumerate(spec.labels)), "label2id": {name: i for i, name in enumerate(spec.labels)}}
    return {
        "vocab_size": spec.vocab, "hidden_size": spec.dim, "num_hidden_layers": len(spec.layers), "num_attention_heads": mixer.heads,
        "intermediate_size": ffn.hidden, "hidden_act": ffn.act, "max_position_embeddings": spec.context,
        "type_vocab_size": spec.token_types, "layer_norm_eps": spec.eps, **(labels if spec.labels else {}),
    }


def variant(spec: EncoderSpec) -> dict[str, Any]:
    return {} if spec.head else {"names": BARE, "renames": ((r"^bert\.", ""), *RENAMES)}


RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


@family("bert", architecture=lambda spec: next(name for name, head in HEADS.items() if head == spec.head), names=BERT, fields=fields,
        renames=RENAMES, ignored=(r"^cls\.predictions\.decoder\.", r"^cls\.seq_relationship\.", r"^bert\.pooler\."), variant=variant)
def bert(c: Config) -> EncoderSpec:
    for name, usual in USUAL.items():
        if c.get(name, usual) != usual:
            raise wrong(name, c.get(name), f"{usual}: nothing else is supported")
    architectures = c.get("architectures", ["BertModel"])
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in HEADS:
        raise wrong("architectures", architectures, f"one of {', '.join(HEADS)}")
    if c.dim % c.heads:
        raise wrong("hidden_size", c.dim, f"a multiple of num_attention_heads, {c.heads}")
    attn = Attn(c.heads, c.heads, c.dim // c.heads, Rope(0), qkv_bias=True, out_bias=True, causal=False)
    mlp = MLP(c.need("intermediate_size"), c.one_of("hidden_act", "gelu", ACTIVATIONS), bias=True, gated=False)
    head = HEADS[architectures[0]]
    return EncoderSpec(
        c.need("vocab_size"), c.dim, (Layer(attn, mlp, order="post"),) * c.layers, eps=c.number("layer_norm_eps", 1e-12, high=1.0),
        context=c.whole("max_position_embeddings", 512), token_types=c.whole("type_vocab_size", 2), embed_norm=True,
        pooler=head != "mlm", head=head, labels=labels(c) if head == "classifier" else (), family="bert",
        extra=tuple((name, c.get(name)) for name in KEPT if c.get(name) is not None))


def labels(c: Config) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers."""
    names = c.get("id2label")
    if names is None:
        return tuple(f"LABEL_{i}" for i in range(c.whole("num_labels", 2, high=2**20)))
    if not isinstance(names, dict) or set(names) != set(map(str, range(len(names)))) or not names:
        raise wrong("id2label", names, 'names for "0", "1", ... without a gap')
    return tuple(str(names[str(i)]) for i in range(len(names)))
