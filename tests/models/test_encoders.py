"""BERT, CLIP, Marian and torch.nn.Transformer against their references: outputs, padding, gradients, files both ways."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import assert_equal
from tiny_encoders import CASES, padded, redraw, written
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPVisionConfig, MarianConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.marian.modeling_marian import MarianDecoderLayer

import pellucid
from pellucid.errors import BadInput
from pellucid.models import save, spec_of
from pellucid.models.families import family_of
from pellucid.models.names import targets
from pellucid.models.transformer import from_torch, to_torch
from pellucid.nn import DualEncoder, Encoder, EncoderDecoder, KVCache, count_parameters, forward_flops, init_weights
from pellucid.nn.build import build_layer
from pellucid.nn.context import Context
from pellucid.nn.count import image_flops
from pellucid.nn.linear import Linear
from pellucid.nn.site import Site
from pellucid.ops import sinusoids

BERTS = [name for name in CASES if name.startswith("bert")]
CLIPS = [name for name in CASES if name.startswith("clip")]
MARIANS = [name for name in CASES if name.startswith("marian")]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours loaded from its folder, the folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    return written(request.param, folder), pellucid.load(folder), folder


def opened(name, folder):
    theirs = written(name, folder)
    return theirs, pellucid.load(folder)


def batch(ours, seed=0):
    """Inputs of any of the shapes: what ours takes, what theirs takes, and which of the results are real."""
    x, mask = padded(3, 20, [20, 7, 2], seed)
    g = torch.Generator().manual_seed(seed)
    if isinstance(ours, Encoder):
        types = torch.randint(0, ours.spec.token_types, x.shape, generator=g)
        return (x, mask, types), {"input_ids": x, "attention_mask": mask, "token_type_ids": types}, mask.bool()
    if isinstance(ours, DualEncoder):
        x[torch.arange(3), mask.sum(1) - 1] = 95
        x[0, 11] = 95  # a second end: the first one counts (and in old files the first of the largest)
        pixels = torch.randn(2, ours.spec.vision.channels, *(ours.spec.vision.image,) * 2, generator=g)
        return (x, pixels, mask), {"input_ids": x, "attention_mask": mask, "pixel_values": pixels}, slice(None)
    y, target_mask = padded(3, 9, [9, 4, 2], seed + 1)
    return ((x, y, mask, target_mask), {"input_ids": x, "attention_mask": mask, "decoder_input_ids": y,
                                        "decoder_attention_mask": target_mask}, target_mask.bool())


def result(ours, args):
    """The last thing that ours computes: logits where there is a head."""
    out = ours(*args)
    return ours.logits(out) if isinstance(ours, Encoder) and ours.spec.head else out


def reference(theirs, kw):
    out = theirs(**kw)
    return out.logits_per_image if "logits_per_image" in out else out.logits if "logits" in out else out.last_hidden_state


def test_outputs_of_padded_batches(pair):
    theirs, ours, _ = pair
    args, kw, real = batch(ours)
    with torch.no_grad():
        got, want = result(ours, args), reference(theirs, kw)
        real = slice(None) if got.dim() == 2 else real
        assert want.std() > 0.5  # the reference says something
        assert_equal(got[real], want[real])


def test_every_row_alone_equals_its_row_of_the_batch(pair):
    theirs, ours, _ = pair
    args, kw, _real = batch(ours)
    with torch.no_grad():
        want = reference(theirs, kw)
        for row in range(3):
            n = int(args[-1 if isinstance(ours, DualEncoder) else 2 if isinstance(ours, EncoderDecoder) else 1][row].sum())
            if isinstance(ours, Encoder):
                got = result(ours, (args[0][row : row + 1, :n], None, args[2][row : row + 1, :n]))[0]
                assert_equal(got, want[row] if got.dim() == 1 else want[row, :n])
            elif isinstance(ours, DualEncoder):
                assert_equal(ours(args[0][row : row + 1, :n], args[1])[:, 0], want[:, row])
            else:
                m = int(args[3][row].sum())
                assert_equal(ours(args[0][row : row + 1, :n], args[1][row : row + 1, :m])[0], want[row, :m])


def test_the_gradient_of_every_parameter(pair):
    """A key bias moves all scores of a query alike: softmax does not see it, and its gradient is zero but for rounding."""
    theirs, ours, _ = pair
    args, kw, real = batch(ours, seed=3)
    got, want = result(ours, args), reference(theirs, kw)
    real = slice(None) if got.dim() == 2 else real
    weights = torch.randn(want[real].shape, generator=torch.Generator().manual_seed(1))
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    grads = dict(zip(named, torch.autograd.grad((want[real] * weights).sum(), list(named.values()), allow_unused=True), strict=True))
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    mine = dict(zip(mine, torch.autograd.grad((got[real] * weights).sum(), list(mine.values()), allow_unused=True), strict=True))
    seen = set()
    for name, parameter, piece in targets(ours, family_of(ours.spec).names):
        if not parameter.requires_grad:
            continue
        theirs_name = piece.name if piece.name in grads else piece.name.replace("encoder.embed_tokens", "shared")
        seen.add(theirs_name)
        if grads[theirs_name] is None:  # a pooler that the head does not read
            assert mine[name] is None
            continue
        want_grad, got_grad = grads[theirs_name], piece.ours(mine[name])
        scale = want_grad.abs().max()
        if theirs_name.endswith(("k_proj.bias", "key.bias")):
            assert scale < 1e-3 and got_grad.abs().max() < 1e-3
            continue
        assert scale > 0, f"{piece.name}: a gradient of zero proves nothing"
        assert (got_grad - want_grad).abs().max() < 5e-5 * scale, piece.name
    assert seen == set(grads)


def test_what_we_write_transformers_opens(pair, tmp_path):
    theirs, ours, folder = pair
    ours = pellucid.load(folder)
    with torch.no_grad():  # other numbers than the file's, so that nothing can come from there
        for p in ours.parameters():
            p.mul_(torch.empty_like(p).uniform_(0.8, 1.2, generator=torch.Generator().manual_seed(5)))
    save(ours, tmp_path / "new", shard_bytes=60_000)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    back, info = type(theirs).from_pretrained(tmp_path / "new", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    args, kw, real = batch(ours)
    with torch.no_grad():
        got, want = result(ours, args), reference(back.eval(), kw)
        real = slice(None) if got.dim() == 2 else real
        assert_equal(got[real], want[real])
    again = pellucid.load(tmp_path / "new")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True)) and again.spec == ours.spec
    before, after = theirs.config.to_dict(), back.config.to_dict()
    for field in ("architectures", "id2label", "text_config", "vision_config", "projection_dim", "vocab_size", "type_vocab_size",
                  "pad_token_id", "eos_token_id", "decoder_start_token_id", "decoder_vocab_size", "share_encoder_decoder_embeddings",
                  "scale_embedding", "activation_function", "hidden_act", "max_position_embeddings", "layer_norm_eps"):
        a, b = before.get(field), after.get(field)
        if isinstance(a, dict):
            a, b = ({k: v for k, v in d.items() if k not in ("dtype", "projection_dim")} for d in (a, b))
        assert a == b, field


def test_counts_from_the_spec(pair):
    theirs, ours, _ = pair
    count = count_parameters(ours.spec)
    with torch.device("meta"):
        assert count == sum(p.numel() for p in type(ours)(ours.spec).parameters())
    if isinstance(ours, EncoderDecoder):  # the reference counts its two tables of sinusoids, and its bias is no parameter
        count += 2 * ours.spec.context * ours.spec.dim - ours.logits_bias.numel()
    assert count == theirs.num_parameters()


@pytest.mark.parametrize("name", ["bert", "bert-mlm"])
def test_flops_equal_the_counter_of_torch(name, tmp_path):
    _, ours = opened(name, tmp_path)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = ours(torch.full((1, 24), 5))
        if name == "bert-mlm":
            ours.logits(hidden)
    assert counter.get_total_flops() == 24 * forward_flops(ours.spec, 24)


def test_flops_of_two_sides_equal_the_counter_of_torch(tmp_path):
    _, marian = opened("marian", tmp_path / "a")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        marian(torch.full((1, 12), 5), torch.full((1, 12), 5))
    assert counter.get_total_flops() == 12 * forward_flops(marian.spec, 12)
    _, clip = opened("clip", tmp_path / "b")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clip.encode_image(torch.zeros(1, 3, clip.spec.vision.image, clip.spec.vision.image))
    assert counter.get_total_flops() == image_flops(clip.spec)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clip.encode_text(torch.full((1, 8), clip.spec.pool_at))
    once = 2 * clip.spec.text.dim * clip.spec.dim
    assert counter.get_total_flops() == 8 * forward_flops(clip.spec, 8) + once


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(pair, dtype):
    theirs, ours, folder = pair
    narrow = pellucid.load(folder, dtype=dtype)
    assert {p.dtype for p in narrow.parameters()} == {getattr(torch, dtype)}
    args, kw, real = batch(ours)
    with torch.no_grad():
        got, want = result(narrow, args), reference(theirs, kw)
        assert got.dtype == getattr(torch, dtype)
        real = slice(None) if got.dim() == 2 else real
        assert (got[real].float() - want[real]).norm() < 0.05 * want[real].norm()


def test_missing_and_unused_tensors_are_named(pair, tmp_path):
    """Also those that no output could tell: key biases are mathematically dead."""
    _, _ours, folder = pair
    shutil.copytree(folder, tmp_path / "new")
    tensors = load_file(folder / "model.safetensors")
    dead = next(name for name in tensors if name.endswith(("k_proj.bias", "key.bias")))
    save_file({k: v for k, v in tensors.items() if k != dead}, tmp_path / "new/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput) as caught:
        pellucid.load(tmp_path / "new")
    assert f"missing: {dead} (1)" in str(caught.value)
    save_file({**tensors, dead.replace("bias", "bias_too"): torch.zeros(3)}, tmp_path / "new/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput) as caught:
        pellucid.load(tmp_path / "new")
    assert f"unused: {dead}_too (1)" in str(caught.value)


# --- BERT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BERTS)
def test_older_files_of_bert(name, tmp_path):
    """gamma and beta, a prefix where there is none today and none where there is one, what other heads leave, position_ids."""
    _theirs, ours = opened(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for key, t in tensors.items()}
    turned = {key.removeprefix("bert.") if key.startswith("bert.") else f"bert.{key}" if name == "bert" else key: t for key, t in old.items()}
    turned["embeddings.position_ids" if name != "bert" else "bert.embeddings.position_ids"] = torch.arange(64)[None]
    if name == "bert-mlm":
        extra = {"cls.seq_relationship.weight": torch.zeros(2, 48), "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
                 "bert.pooler.dense.weight": torch.zeros(48, 48)}
        for layout in (old, turned):
            layout.update(extra if layout is old else {key.removeprefix("bert."): t for key, t in extra.items()})
    _args, _kw, _real = batch(ours)
    for layout in (old, turned):
        save_file({key: t.clone() for key, t in layout.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again = pellucid.load(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_pooled_output_and_types_that_are_not_given(tmp_path):
    theirs, ours = opened("bert", tmp_path)
    x, mask = padded(3, 20, [20, 7, 1])
    with torch.no_grad():
        want = theirs(input_ids=x, attention_mask=mask)
        hidden = ours(x, mask)
        assert_equal(hidden[mask.bool()], want.last_hidden_state[mask.bool()])
        assert_equal(ours.pooled(hidden), want.pooler_output)
    with pytest.raises(ValueError, match="no head"):
        ours.logits(hidden)
    with pytest.raises(BadInput, match="65 tokens"):
        ours(torch.ones(1, 65, dtype=torch.int64))


def test_padding_on_the_left_counts_as_columns(tmp_path):
    """As in the reference: absolute positions are counted from the left end, real or not."""
    theirs, ours = opened("bert", tmp_path)
    x, mask = (t.flip(1) for t in padded(3, 20, [20, 7, 1]))
    with torch.no_grad():
        want = theirs(input_ids=x, attention_mask=mask).last_hidden_state
        assert_equal(ours(x, mask)[mask.bool()], want[mask.bool()])
        assert ours(x, torch.zeros_like(mask)).isfinite().all()  # nothing real: numbers that nobody may use, but numbers


@pytest.mark.parametrize("name", ["bert", "bert-mlm"])
def test_packed_documents_are_as_if_alone(name, tmp_path):
    _, ours = opened(name, tmp_path)
    parts = [torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 9)]
    documents = torch.tensor([[i for i, part in enumerate(parts) for _ in range(part.shape[1])]])
    positions = torch.cat([torch.arange(part.shape[1])[None] for part in parts], 1)
    with torch.no_grad():
        packed = ours(torch.cat(parts, 1), positions=positions, documents=documents)
        assert_equal(packed, torch.cat([ours(part) for part in parts], 1))


@pytest.mark.parametrize(("fields", "names"), [
    ({"position_embedding_type": "relative_key"}, "position_embedding_type"), ({"is_decoder": True}, "is_decoder"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"), ({"architectures": ["BertForQuestionAnswering"]}, "architectures"),
    ({"num_attention_heads": 7}, "hidden_size"), ({"hidden_act": "mish"}, "hidden_act"), ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "2": "b"}}, "id2label"),
    ({"type_vocab_size": 0}, "type_vocab_size"), ({"hidden_size": 0}, "hidden_size")])
def test_configs_that_are_refused(fields, names, tmp_path):
    written("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(BadInput, match=names):
        spec_of({**config, **fields})


def test_classes_without_names():
    config = json.loads(BertConfig(**{k: v for k, v in CASES["bert"][1].to_dict().items() if k != "id2label"}).to_json_string(use_diff=False))
    config = {**config, "architectures": ["BertForSequenceClassification"], "num_labels": 3, "id2label": None}
    assert spec_of(config).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
def test_both_towers_of_clip(name, tmp_path):
    theirs, ours = opened(name, tmp_path)
    (x, pixels, mask), _, _ = batch(ours)
    with torch.no_grad():
        text = theirs.get_text_features(input_ids=x, attention_mask=mask)
        assert_equal(ours.encode_text(x, mask), text.pooler_output)
        assert_equal(ours.text(x, mask)[mask.bool()], text.last_hidden_state[mask.bool()])
        image = theirs.get_image_features(pixel_values=pixels)
        assert_equal(ours.encode_image(pixels), image.pooler_output)
        assert_equal(ours.vision(pixels), image.last_hidden_state)


def test_where_a_text_is_read(tmp_path):
    """At its first end token, not at the last, nor at the largest id; in old files at the largest id."""
    theirs, ours = opened("clip", tmp_path / "new")
    x = torch.tensor([[94, 7, 95, 8, 95], [94, 95, 5, 6, 7]])
    with torch.no_grad():
        assert ours.ends(x).tolist() == [2, 1]
        assert_equal(ours.encode_text(x), theirs.get_text_features(input_ids=x).pooler_output)
    with pytest.raises(BadInput, match="end token"):
        ours.encode_text(torch.tensor([[94, 7, 8]]))
    _, old = opened("clip-old", tmp_path / "old")
    assert old.ends(torch.tensor([[94, 7, 2, 95, 2], [2, 3, 4, 9, 5]])).tolist() == [3, 3]


def test_older_configs_of_clip(tmp_path):
    """Fields left out are the class's defaults; `text_config_dict` of old files wins over `text_config`."""
    for defaults, spec in ((CLIPTextConfig(), spec_of({"model_type": "clip"}).text), (CLIPVisionConfig(), spec_of({"model_type": "clip"}).vision)):
        assert (spec.dim, len(spec.layers), spec.layers[0].mixer.heads, spec.layers[0].ffn.hidden, spec.layers[0].ffn.act, spec.eps) == (
            defaults.hidden_size, defaults.num_hidden_layers, defaults.num_attention_heads, defaults.intermediate_size,
            defaults.hidden_act, defaults.layer_norm_eps)
    whole = spec_of({"model_type": "clip"})
    assert (whole.pool_at, whole.text.vocab, whole.text.context, whole.vision.image, whole.vision.patch, whole.dim) == (49407, 49408, 77, 224, 32, 512)
    old = spec_of({"model_type": "clip", "text_config": {"hidden_size": 512, "eos_token_id": 2}, "text_config_dict": {"hidden_size": 256}})
    assert old.text.dim == 256 and old.pool_at == 2


@pytest.mark.parametrize("fields", [
    {"text_config": [1]}, {"text_config": {"num_attention_heads": 7}}, {"vision_config": {"image_size": [224, 224]}},
    {"vision_config": {"patch_size": 300}}, {"text_config": {"eos_token_id": [1, 2]}}, {"projection_dim": -1}])
def test_configs_of_clip_that_are_refused(fields):
    with pytest.raises(BadInput):
        spec_of({"model_type": "clip", **fields})


def test_pictures_of_another_size_are_refused(tmp_path):
    _, ours = opened("clip", tmp_path)
    with pytest.raises(ValueError, match="reads"):
        ours.encode_image(torch.zeros(1, 3, 18, 16))


# --- the original Transformer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MARIANS)
@pytest.mark.parametrize("cuts", [[12], [5, 1, 6], [1] * 12], ids=["whole", "chunks", "tokens"])
def test_cached_decoding(name, cuts, tmp_path):
    """The source's keys and values are made in the first pass only: later ones go without the memory."""
    theirs, ours = opened(name, tmp_path)
    x, mask = padded(3, 20, [20, 7, 2])
    y = padded(3, 12, [12] * 3, 1)[0]
    cache = KVCache(ours.spec, 3, 12)
    with torch.no_grad():
        memory = ours.encode(x, mask)
        got = [ours.logits(ours.hidden(part, None if i else memory, mask, cache=cache)) for i, part in enumerate(y.split(cuts, 1))]
        assert_equal(torch.cat(got, 1), theirs(input_ids=x, attention_mask=mask, decoder_input_ids=y).logits)
        cache.keep(torch.tensor([2, 0]))
        assert cache.states[0]["memory_k"].shape[0] == 2
    with pytest.raises(ValueError, match="encoder's output"):
        ours.hidden(y, None, mask)


def test_packed_translations_are_as_if_alone(tmp_path):
    _, ours = opened("marian", tmp_path)
    sources, written_ = ([torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in sizes] for sizes in ((5, 9, 2), (3, 1, 8)))

    def packed(parts):
        ids = torch.tensor([[i for i, part in enumerate(parts) for _ in range(part.shape[1])]])
        return torch.cat(parts, 1), torch.cat([torch.arange(part.shape[1])[None] for part in parts], 1), ids

    (source, source_positions, source_documents), (target, positions, documents) = packed(sources), packed(written_)
    with torch.no_grad():
        got = ours(source, target, source_positions=source_positions, positions=positions, source_documents=source_documents, documents=documents)
        assert_equal(got, torch.cat([ours(a, b) for a, b in zip(sources, written_, strict=True)], 1))


def test_older_files_of_marian(tmp_path):
    """Tables of sinusoids and copies of the embedding, which files from before safetensors hold."""
    _, ours = opened("marian", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.shared.weight"]
    copies = {f"model.{side}.embed_tokens.weight": table.clone() for side in ("encoder", "decoder")} | {"lm_head.weight": table.clone()}
    positions = {f"model.{side}.embed_positions.weight": torch.zeros(64, 48) for side in ("encoder", "decoder")}
    save_file({**tensors, **copies, **positions}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = pellucid.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_sinusoids_by_hand_and_far_out():
    """Interleaved as in the paper, in halves as in Marian; exact to float32 where its own angles would not be."""
    got = sinusoids(torch.tensor([[0, 1, 500]]), 6)
    for row, p in enumerate((0, 1, 500)):
        want = [f(p / 10000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        assert got[0, row].tolist() == pytest.approx(want, abs=1e-7)
    assert torch.equal(sinusoids(torch.tensor([500]), 6, interleaved=False), got[0, 2:, [0, 2, 4, 1, 3, 5]])


TORCH_CASES = {"paper": {}, "pre-norm": {"norm_first": True}, "gelu": {"activation": "gelu", "layer_norm_eps": 1e-3}}


class Model2017(torch.nn.Module):
    """`torch.nn.Transformer` with what it lacks, as everybody writes it around it."""

    def __init__(self, kind: str):
        super().__init__()
        self.transformer = torch.nn.Transformer(48, 4, 2, 3, 80, dropout=0.0, batch_first=True, **TORCH_CASES[kind])
        self.source, self.target, self.head = torch.nn.Embedding(90, 48), torch.nn.Embedding(70, 48), torch.nn.Linear(48, 70)
        redraw(self, 4)

    def forward(self, x, y, x_mask, y_mask):
        table = torch.tensor([[f(p / 10000 ** (2 * i / 48)) for i in range(24) for f in (math.sin, math.cos)] for p in range(32)])
        a, b = (e(t) * 48**0.5 + table[: t.shape[1]] for e, t in ((self.source, x), (self.target, y)))
        causal = torch.nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        hidden = self.transformer(a, b, tgt_mask=causal, src_key_padding_mask=(1.0 - x_mask) * -1e9, tgt_key_padding_mask=(1.0 - y_mask) * -1e9,
                                  memory_key_padding_mask=(1.0 - x_mask) * -1e9)
        return self.head(hidden)

    def ours(self, kind: str) -> EncoderDecoder:
        options = TORCH_CASES[kind]
        return from_torch(self.transformer.state_dict(), self.source.weight, 4, target_embedding=self.target.weight, head=self.head.weight,
                          head_bias=self.head.bias, act=options.get("activation", "relu"), norm_first=options.get("norm_first", False),
                          eps=options.get("layer_norm_eps", 1e-5))


@pytest.mark.parametrize("kind", TORCH_CASES)
def test_torch_transformer(kind, tmp_path):
    """The second judge: other sinusoids, other names, two more norms, three parts in one matrix."""
    theirs = Model2017(kind).train()  # without dropout the same as eval, but by the plain path, without fused kernels
    ours = theirs.ours(kind)
    (x, x_mask), (y, y_mask) = padded(3, 20, [20, 7, 2]), padded(3, 9, [9, 4, 2], 1)
    real = y_mask.bool()
    want = theirs(x, y, x_mask.float(), y_mask.float())
    got = ours.train()(x, y, x_mask, y_mask)
    assert want.std() > 0.5
    assert_equal(got[real], want[real])
    loss = torch.randn(want[real].shape, generator=torch.Generator().manual_seed(0))
    (want[real] * loss).sum().backward()
    (got[real] * loss).sum().backward()
    assert_equal(ours.decoder.layers[2].cross.kv.weight.grad, theirs.transformer.decoder.layers[2].multihead_attn.in_proj_weight.grad[48:])
    assert_equal(ours.encoder.norm.weight.grad, theirs.transformer.encoder.norm.weight.grad)
    assert_equal(ours.embed.weight.grad, theirs.source.weight.grad)
    state = to_torch(ours)
    want_state = theirs.transformer.state_dict()
    assert state.keys() == want_state.keys() and all(torch.equal(state[name], want_state[name]) for name in state)
    save(ours, tmp_path / "model")
    again = pellucid.load(tmp_path / "model")
    assert again.spec == ours.spec and count_parameters(ours.spec) == sum(p.numel() for p in theirs.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_a_torch_transformer_with_one_embedding():
    theirs = Model2017("paper")
    ours = from_torch(theirs.transformer.state_dict(), theirs.source.weight, 4)
    assert ours.target_embed is None and ours.head is None and ours.head_weight is ours.embed.weight
    assert ours(torch.tensor([[1, 2]]), torch.tensor([[3]])).shape == (1, 1, 90)


def test_states_that_are_no_torch_transformer():
    theirs = Model2017("paper")
    state, table = theirs.transformer.state_dict(), theirs.source.weight
    for wrong in ({**state, "encoder.layers.0.linear3.weight": table}, {f"transformer.{k}": v for k, v in state.items()},
                  {k: v for k, v in state.items() if k != "decoder.layers.1.norm3.bias"}, {**state, "encoder.norm.weight": torch.ones(5)}):
        with pytest.raises(BadInput, match=r"torch\.nn\.Transformer"):
            from_torch(wrong, table, 4)
    with pytest.raises(BadInput, match="multiple"):
        from_torch(state, table, 5)


# --- real dimensions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "clip", "marian"])
def test_one_layer_at_real_dimensions(kind, tmp_path):
    """bert-base's encoder layer over its whole context, ViT-B/32's, and the base Transformer's decoder layer with its
    cross-attention: equal in float32, and in bfloat16 as close to it as the reference is."""
    torch.manual_seed(0)
    B, T = 2, 512 if kind == "bert" else 50 if kind == "clip" else 200
    memory = torch.randn(B, 300, 512)
    if kind == "bert":
        config = BertConfig(num_hidden_layers=1, vocab_size=8)
        config._attn_implementation = "eager"
        layer, D, call = BertModel(config).encoder.layer[0], 768, lambda m, x, dtype: m(x)
        spec = spec_of({**json.loads(config.to_json_string(use_diff=False)), "architectures": ["BertModel"]})
        stem, names = "layers.0.", "encoder.layer.0."
    elif kind == "clip":
        config = CLIPVisionConfig()
        config._attn_implementation = "eager"
        layer, D, call = CLIPEncoderLayer(config), 768, lambda m, x, dtype: m(x, None)
        spec, stem, names = spec_of({"model_type": "clip"}), "vision.layers.0.", "vision_model.encoder.layers.0."
    else:
        config = MarianConfig(d_model=512, decoder_ffn_dim=2048, decoder_attention_heads=8, encoder_layers=1, decoder_layers=1, activation_function="relu")
        config._attn_implementation = "eager"
        causal = torch.full((T, T), -1e30).triu(1)[None, None]
        layer, D = MarianDecoderLayer(config, layer_idx=0), 512
        call = lambda m, x, dtype: m(x, causal.to(dtype), encoder_hidden_states=memory.to(dtype))
        spec, stem, names = spec_of(json.loads(config.to_json_string(use_diff=False))), "decoder.layers.0.", "model.decoder.layers.0."
    redraw(layer.eval())
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.2 if p.dim() > 1 else 1)
    part = {"bert": spec, "clip": getattr(spec, "vision", None), "marian": spec}[kind]
    one = (part.decoder if kind == "marian" else part.layers)[0]
    ours = build_layer(one, Site(D, part.eps, "layer"))
    state = {names + key: tensor for key, tensor in layer.state_dict().items()}
    wrapper = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([ours])})
    with torch.no_grad():
        for _, parameter, piece in targets(wrapper, {key.replace(stem.replace("0", "{i}"), "layers.{i}."): value for key, value in family_of(spec).names.items()}):
            piece.ours(parameter).copy_(piece.theirs(state[piece.name]))
        x = torch.randn(B, T, D)
        first = lambda out: out[0] if isinstance(out, tuple) else out
        context = lambda dtype: Context(torch.arange(T)[None], dtype, memory=memory.to(dtype))
        want = first(call(layer, x, torch.float32))
        assert_equal(ours(x, context(torch.float32)), want)
        narrow = first(call(layer.bfloat16(), x.bfloat16(), torch.bfloat16)).float()
        mine = ours.bfloat16()(x.bfloat16(), context(torch.bfloat16)).float()
        assert (mine - want).norm() < 1.2 * (narrow - want).norm() and (narrow - want).norm() < 0.02 * want.norm()


# --- weights from nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, "transformer"])
def test_initial_weights_reach_every_parameter(name, tmp_path):
    ours = Model2017("paper").ours("paper") if name == "transformer" else opened(name, tmp_path)[1]
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(torch.nan)
    init_weights(ours, seed=1)
    assert all(p.isfinite().all() for p in ours.parameters())
    deep = [m.weight.std() * m.weight.shape[1] ** 0.5 for n, m in ours.named_modules() if isinstance(m, Linear) and n.endswith(".down")]
    assert all(0.3 < d < 0.75 for d in deep)  # the matrices that write into the stream are smaller: 1 / sqrt(2 layers)


