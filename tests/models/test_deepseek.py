"""DeepSeek beyond the common suite: multi-token prediction against transformers, files as DeepSeek publishes them (FP8 tiles, the layer
behind the last), real dimensions, packed rows of the indexer, what config.json may not say."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CASES, assert_equal, redrawn, tokens, written
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3MoE,
    DeepseekV3RotaryEmbedding,
)

import pellucid
from pellucid.data.packing import Packed
from pellucid.errors import BadInput
from pellucid.models import spec_of
from pellucid.models.config import Config
from pellucid.models.deepseek import latent
from pellucid.models.families import config_of
from pellucid.nn import KVCache, Routing, count_parameters, init_weights, prediction_loss, prediction_spec
from pellucid.nn.build import build
from pellucid.nn.context import open_context
from pellucid.nn.count import mtp_parameters
from pellucid.nn.site import Site
from pellucid.ops import latent_attention_absorbed, latent_attention_expanded
from pellucid.train import language_loss

# --- multi-token prediction -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2])
def predicting(request, tmp_path_factory):
    """(transformers' model, its MtpModel of one or two layers, ours from one folder under DeepSeek's names)"""
    folder, depth = tmp_path_factory.mktemp("mtp"), request.param
    config = deepcopy(CASES["deepseek-v3"])
    config.num_mtp_layers = depth
    theirs = written(config, folder)
    mtp = MtpModel(theirs, depth).eval()
    redrawn(mtp.layers, seed=9)  # embedding and head are the model's own
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in mtp.layers.state_dict().items():
        number, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        prefix = f"model.layers.{theirs.config.num_hidden_layers + int(number)}"
        if rest == "mlp.experts.gate_up_proj":
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                tensors |= {f"{prefix}.mlp.experts.{e}.{x}_proj.weight": t.contiguous() for x, t in (("gate", gate), ("up", up))}
        elif rest == "mlp.experts.down_proj":
            tensors |= {f"{prefix}.mlp.experts.{e}.down_proj.weight": t.contiguous() for e, t in enumerate(tensor)}
        else:
            tensors[f"{prefix}.{rest}"] = tensor
    # the official files repeat these two
    tensors[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return theirs, mtp, pellucid.load(folder)


def their_predictions(theirs, mtp, x):
    """Logits of each depth, for whole sequences."""
    hidden, found = theirs.model(input_ids=x).last_hidden_state, []
    for k in range(len(mtp.layers)):
        positions = torch.arange(k + 1, x.shape[1])[None]
        cache = MtpCache(config=theirs.config.get_mtp_config())
        hidden = mtp.forward_layer(k, hidden[:, :-1], positions, cache, input_ids=x[:, k + 1 :])
        found.append(mtp._project_to_logits(hidden))
    return found


def test_predictions_of_further_tokens(predicting):
    theirs, mtp, ours = predicting
    x = tokens(2, 60)
    with torch.no_grad():
        want = their_predictions(theirs, mtp, x)
        got = [ours.logits(h) for h in ours.predict_all(x, ours.hidden(x))]
    assert len(got) == len(want) == len(mtp.layers) and want[0].std() > 0.5
    for a, b in zip(got, want, strict=True):
        assert_equal(a, b)


def test_predictions_have_gradients(predicting):
    """Of every parameter of the layers, of the embedding and of the head, equal to transformers'."""
    theirs, mtp, ours = predicting
    x, labels = tokens(2, 40), tokens(2, 40, seed=1)
    states = ours.predict_all(x, ours.hidden(x))
    loss = prediction_loss(states, ours.head_weight, labels, weight=0.5)
    want = sum(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, k:].flatten(), reduction="sum")
               for k, logits in enumerate(their_predictions(theirs, mtp, x), 1)) * 0.5 / len(states)
    assert_equal(loss, want)
    loss.backward()
    want.backward()
    layer, reference = ours.mtp[0], mtp.layers[0]
    pairs = [(ours.embed, theirs.model.embed_tokens), (ours.head, theirs.lm_head), (layer.norm_embedded, reference.enorm),
             (layer.norm_hidden, reference.hnorm), (layer.join, reference.eh_proj), (layer.norm, reference.post_norm),
             (layer.block.mixer.kv_b, reference.mtp_block.self_attn.kv_b_proj), (ours.layers[0].mixer.o, theirs.model.layers[0].self_attn.o_proj)]
    for mine, other in pairs:
        g, w = mine.weight.grad, other.weight.grad
        assert w.abs().max() > 0 and (g - w).abs().max() < 2e-5 * w.abs().max()
    for model in (ours, theirs, mtp):
        model.zero_grad()


def test_predictions_with_a_cache(predicting):
    """Token by token and in chunks, as in speculative decoding: each depth has a cache of its own."""
    _, _, ours = predicting
    x = tokens(2, 30)
    with torch.no_grad():
        hidden = ours.hidden(x)
        for k, want in enumerate(ours.predict_all(x, hidden), 1):
            cache = KVCache(prediction_spec(ours.spec, k), 2, 30)
            got, at = [], 0
            for n in (9, 1, 1, 4, 30 - k - 15):
                part = ours.predict(k, x[:, k + at : k + at + n], hidden[:, at : at + n], cache=cache)
                got.append(part)
                at += n
            hidden = torch.cat(got, 1)
            assert_equal(hidden, want)


def test_predictions_in_padded_and_packed_rows(predicting):
    """Equal to each sequence by itself; places whose further token belongs to another document count for nothing."""
    _, _, ours = predicting
    x, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0
    lengths = (9, 4, 7)
    documents = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor(lengths))[None].expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = tokens(2, 20, seed=3)
    with torch.no_grad():
        padded = ours.predict_all(x, ours.hidden(x, mask=mask), mask=mask)
        alone = ours.predict_all(x[:1, 7:], ours.hidden(x[:1, 7:]))
        for got, want in zip(padded, alone, strict=True):
            assert_equal(got[0, 7:], want[0])
        packed = ours.predict_all(x, ours.hidden(x, positions, documents), positions, documents)
        total, start = 0.0, 0
        for n in lengths:
            piece = x[:, start : start + n]
            alone = ours.predict_all(piece, ours.hidden(piece))
            for k, (got, want) in enumerate(zip(packed, alone, strict=True), 1):
                assert_equal(got[:, start : start + n - k], want)
            total += prediction_loss(alone, ours.head_weight, labels[:, start : start + n])
            start += n
        assert_equal(prediction_loss(packed, ours.head_weight, labels, documents), total)


def test_the_loss_by_hand():
    """One depth, three tokens, a vocabulary of two: the second state predicts the third label, one label does not count."""
    states = [torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])]
    head, labels = torch.eye(2), torch.tensor([[0, 1, -100]])
    logp = torch.log_softmax(torch.tensor([1.0, 0.0]), 0)[1]
    assert torch.allclose(prediction_loss(states, head, labels, weight=0.3), -0.3 * logp)
    assert torch.allclose(prediction_loss([*states, states[0][:, :1]], head, torch.tensor([[0, 1, 1]]), weight=0.3),
                          -0.15 * (logp + torch.log_softmax(torch.tensor([0.0, 3.0]), 0)[1] + logp))


def test_training_adds_their_loss(predicting):
    """In training only; two documents in a row."""
    _, _, ours = predicting
    x, labels = tokens(2, 20), tokens(2, 20, seed=1)
    labels[:, 8] = labels[0, :3] = -100
    documents = (torch.arange(20) > 8).long().expand(2, -1)
    positions = torch.cat((torch.arange(9), torch.arange(11))).expand(2, -1)
    rows = Packed(x, labels, positions, documents)
    plain, count = language_loss(ours, rows)
    both, same = language_loss(ours.train(), rows)
    ours.eval()
    states = ours.predict_all(x, ours.hidden(x, positions, documents), positions, documents)
    assert same == count == 35
    assert_equal(both - plain, prediction_loss(states, ours.head_weight, labels, documents, 0.3))


def test_they_learn_to_predict():
    """Sequences that count on in steps: after a few steps of training the layer knows the token after the next."""
    spec = replace(spec_of(CASES["deepseek-v3"].to_dict() | {"num_nextn_predict_layers": 1}), vocab=16)
    model = init_weights(pellucid.nn.Decoder(spec), 1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    g = torch.Generator().manual_seed(0)

    def batch():
        x = (torch.randint(16, (16, 1), generator=g) + torch.randint(1, 4, (16, 1), generator=g) * torch.arange(17)) % 16
        return Packed(x[:, :-1], x[:, 1:], torch.arange(16).expand(16, -1), torch.zeros(16, 16, dtype=torch.int64))

    for _ in range(60):
        optimizer.zero_grad()
        loss, count = language_loss(model, batch())
        (loss / count).backward()
        optimizer.step()
    rows = batch()
    with torch.no_grad():
        state = model.eval().predict_all(rows.tokens, model.hidden(rows.tokens))[0]
    right = (model.logits(state).argmax(-1) == rows.labels[:, 1:])[:, 2:]
    assert right.float().mean() > 0.9


def test_counts_of_layers_that_predict(predicting):
    _, mtp, ours = predicting
    experts = sum(b.numel() for n, b in mtp.layers.named_buffers() if n.endswith("e_score_correction_bias"))
    assert mtp_parameters(ours.spec) == sum(p.numel() for p in mtp.layers.parameters()) + experts
    assert count_parameters(ours.spec) == sum(p.numel() for p in ours.parameters())


def test_a_config_that_states_layers_which_the_file_lacks(tmp_path):
    """transformers writes num_nextn_predict_layers, and not the layers."""
    config = deepcopy(CASES["deepseek-v3"])
    config.num_mtp_layers = 1
    theirs = written(config, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, x = pellucid.load(tmp_path), tokens(1, 20)
    assert ours.spec.mtp == () and len(spec_of(fields).mtp) == 1
    with torch.no_grad():
        assert_equal(ours(x), theirs(input_ids=x).logits)


def test_transformers_reads_the_layer_that_we_write(tmp_path):
    """With DeepSeek-V3's own 61 layers, of which it knows that the next one predicts."""
    fields = {**CASES["deepseek-v3"].to_dict(), "hidden_size": 16, "num_hidden_layers": 61, "first_k_dense_replace": 60, "intermediate_size": 24,
              "num_nextn_predict_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 8}
    ours = init_weights(pellucid.nn.Decoder(spec_of(fields))).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    pellucid.save(ours, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    mtp, x = MtpModel.from_pretrained(theirs), tokens(1, 12)
    with torch.no_grad():
        assert_equal(ours(x), theirs(input_ids=x).logits)
        assert_equal(ours.logits(ours.predict_all(x, ours.hidden(x))[0]), their_predictions(theirs, mtp, x)[0])
        again = pellucid.load(tmp_path / "model")
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


# --- files as DeepSeek publishes them ---------------------------------------------------------------------------------


def fp8_tiles(weight, side=128):
    """codes, scales: one scale a tile, the largest entry at e4m3's largest number."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // side), -(-weight.shape[1] // side))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
            scales[i, j] = weight[rows, columns].abs().max() / 448
            codes[rows, columns] = (weight[rows, columns] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def test_fp8_weights(tmp_path):
    """All matrices but embedding, head and router as codes beside scales of 128 x 128 tiles, cut at the edges."""
    config = deepcopy(CASES["deepseek-v3"])
    config.hidden_size, config.intermediate_size, config.q_lora_rank, config.moe_intermediate_size = 160, 300, 129, 136
    theirs = written(config, tmp_path / "wide")
    tensors, coded, known = load_file(tmp_path / "wide" / "model.safetensors"), {}, {}
    for name, t in tensors.items():
        known[name] = t
        if t.dim() == 2 and not any(word in name for word in ("embed", "lm_head", "mlp.gate.")):
            codes, scales = fp8_tiles(t)
            coded |= {name: codes, f"{name}_scale_inv": scales}
            known[name] = torch.cat([torch.cat([codes[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float() * scales[i, j]
                                                for j in range(scales.shape[1])], 1) for i in range(scales.shape[0])])
        else:
            coded[name] = t
    assert sum(name.endswith("_scale_inv") for name in coded) == 40 and coded["model.layers.0.mlp.gate_proj.weight_scale_inv"].shape == (3, 2)
    (tmp_path / "fp8").mkdir()
    save_file(coded, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "wide" / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(fields))
    save_file(known, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})  # what the codes stand for
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", attn_implementation="eager")
    x = tokens(2, 30)
    with torch.no_grad():
        assert_equal(pellucid.load(tmp_path / "fp8")(x), theirs(input_ids=x).logits)
        assert (pellucid.load(tmp_path / "fp8", dtype="bfloat16")(x).float() - theirs(input_ids=x).logits).abs().mean() < 0.1


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "deepseek-v3.2"])
def test_fused_experts_in_several_files(name, tmp_path):
    theirs = written(name, tmp_path, save_original_format=False, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert any(key.endswith("mlp.experts.gate_up_proj") for file in tmp_path.glob("*.safetensors") for key in load_file(file))
    x = tokens(2, 40)
    with torch.no_grad():
        assert_equal(pellucid.load(tmp_path)(x), theirs(input_ids=x).logits)


def test_half_precision_leaves_what_must_stay_wide(tmp_path):
    """The selection bias decides between scores that differ by less than bfloat16 resolves; so does the indexer's weighing."""
    theirs = written("deepseek-v3.2", tmp_path / "wide")
    half = deepcopy(theirs).to(torch.bfloat16)
    for layer, wide in zip(half.model.layers, theirs.model.layers, strict=True):
        layer.self_attn.indexer.weights_proj.weight.data = wide.self_attn.indexer.weights_proj.weight.data
    half.model.layers[1].mlp.gate.e_score_correction_bias.data = theirs.model.layers[1].mlp.gate.e_score_correction_bias.data
    half.save_pretrained(tmp_path / "half")
    ours, x = pellucid.load(tmp_path / "half", dtype="bfloat16"), tokens(2, 40)
    assert torch.equal(ours.layers[1].ffn.router.select_bias, theirs.model.layers[1].mlp.gate.e_score_correction_bias)
    assert torch.equal(ours.layers[0].mixer.indexer.weights.weight, theirs.model.layers[0].self_attn.indexer.weights_proj.weight)
    assert ours.layers[0].mixer.o.weight.dtype == torch.bfloat16
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32, attn_implementation="eager")(input_ids=x).logits
        assert_equal(pellucid.load(tmp_path / "half")(x), want)
        routing = Routing()
        assert ours.hidden(x, routing=routing).isfinite().all()
        assert [logits.dtype for logits in routing.logits] == [torch.float32]  # the router computes in it


# --- the two forms, and the indexer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "deepseek-v3-plain"])
def test_absorbed_and_expanded_are_one_function(name, monkeypatch):
    """The whole model with either form forced: prefill, chunks and single tokens."""
    ours, x = pellucid.nn.Decoder(spec_of(CASES[name].to_dict())), tokens(2, 40)
    redrawn(ours, seed=4).eval()
    found = []
    for form in (latent_attention_expanded, latent_attention_absorbed):
        monkeypatch.setattr("pellucid.nn.latent_attention.latent_attention", form)
        cache = KVCache(ours.spec, 2, 40)
        with torch.no_grad():
            found += [ours(x), torch.cat([ours(part, cache=cache) for part in x.split([20, 1, 9, *[1] * 10], 1)], 1)]
    for other in found[1:]:
        assert_equal(other, found[0])


def test_packed_rows_of_the_indexer():
    """Each document chooses among its own keys."""
    ours = redrawn(pellucid.nn.Decoder(spec_of(CASES["deepseek-v3.2"].to_dict())), seed=4).eval()
    x, lengths = tokens(2, 40), (17, 3, 20)
    documents = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor(lengths))[None].expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        together, start = ours(x, positions=positions, documents=documents), 0
        for n in lengths:
            assert_equal(together[:, start : start + n], ours(x[:, start : start + n]))
            start += n


def test_the_indexer_hides_keys():
    """With `top_k` of the whole length the model is V3; with less it is not, and a step reads no other key than the chosen."""
    spec = spec_of(CASES["deepseek-v3.2"].to_dict())
    sparse, x = redrawn(pellucid.nn.Decoder(spec), seed=4).eval(), tokens(1, 30)
    mixer = spec.layers[0].mixer
    layers = tuple(replace(layer, mixer=replace(mixer, indexer=replace(mixer.indexer, top_k=30))) for layer in spec.layers)
    dense = pellucid.nn.Decoder(replace(spec, layers=layers)).eval()
    dense.load_state_dict(sparse.state_dict())
    plain = pellucid.nn.Decoder(replace(spec, layers=tuple(replace(layer, mixer=replace(mixer, indexer=None)) for layer in layers))).eval()
    plain.load_state_dict({k: v for k, v in sparse.state_dict().items() if "indexer" not in k})
    with torch.no_grad():
        assert torch.equal(dense(x), plain(x))
        k = mixer.indexer.top_k
        assert_equal(sparse(x)[:, :k], plain(x)[:, :k])
        assert (sparse(x)[:, k:] - plain(x)[:, k:]).abs().amax(-1).min() > 1e-3
    cache, seen = KVCache(spec, 1, 30), []
    with torch.no_grad():
        sparse(x[:, :29], cache=cache)
        import pellucid.nn.latent_attention as module

        whole = module.latent_attention
        try:
            module.latent_attention = lambda q, qr, c, *a, **kw: seen.append(c.shape[2]) or whole(q, qr, c, *a, **kw)
            sparse(x[:, 29:], cache=cache)
        finally:
            module.latent_attention = whole
    assert seen == [k] * len(layers)


# --- real dimensions --------------------------------------------------------------------------------------------------

REAL = {"hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 163840, "n_routed_experts": 8,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "num_hidden_layers": 1, "vocab_size": 32,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096}}


def real_config():
    config = DeepseekV3Config(**REAL)
    config._attn_implementation = "eager"
    return config


@torch.no_grad()
def drawn(module, dtype):
    """Weights of a trained model's size; buffers stay float32."""
    module.to(dtype).to_empty(device="cpu")
    for name, p in module.named_parameters():
        if "norm" in name:
            p.normal_(1, 0.3)
        else:
            p.normal_(0, p.shape[-1] ** -0.5)
    for buffer in module.buffers():
        buffer.data = 0.1 * torch.randn(buffer.shape)
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_at_real_dimensions(dtype):
    """D 7168, 128 heads, ranks 1536 and 512, around position 100,000 of a YaRN context of 4096 x 40."""
    torch.manual_seed(0)
    config = real_config()
    with torch.device("meta"):
        theirs = DeepseekV3Attention(config, 0)
        ours = build(replace(latent(Config(REAL))), Site(7168, 1e-6, "rms"))
    drawn(theirs, dtype)
    for mine, name in (("q_a", "q_a_proj"), ("q_norm", "q_a_layernorm"), ("q_b", "q_b_proj"), ("kv_a", "kv_a_proj_with_mqa"),
                       ("kv_norm", "kv_a_layernorm"), ("kv_b", "kv_b_proj"), ("o", "o_proj")):
        getattr(ours, mine).weight = getattr(theirs, name).weight
    x = torch.randn(1, 12, 7168).to(dtype)
    positions = (torch.arange(12) * 37 + 100_000)[None]
    cos_sin = DeepseekV3RotaryEmbedding(config)(x, positions)
    hidden = torch.full((12, 12), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    with torch.no_grad():
        want = theirs(x, cos_sin, hidden)[0]
        got = ours(x, open_context(torch.zeros(1, 12), dtype, positions))
        last = ours(x[:, -1:], step_behind(ours, x, positions, dtype))
    assert want.float().std() > 0.05
    if dtype == torch.float32:
        assert_equal(got, want)
        assert_equal(last, want[:, -1:])
    else:
        assert (got.float() - want.float()).norm() < 0.01 * want.float().norm()
        assert (last.float() - want[:, -1:].float()).norm() < 0.02 * want[:, -1:].float().norm()


def step_behind(block, x, positions, dtype):
    """The context of the last token behind a cache of the others."""
    spec = replace(spec_of({**REAL, "model_type": "deepseek_v3", "intermediate_size": 8}), layers=())
    cache = KVCache(replace(spec, layers=(pellucid.nn.Layer(block.spec, None),)), 1, 12, dtype=dtype)
    block(x[:, :-1], open_context(torch.zeros(1, 11), dtype, positions[:, :-1], cache=cache))
    cache.advance(11)
    return open_context(torch.zeros(1, 1), dtype, positions[:, -1:], cache=cache)


def test_experts_at_real_dimensions():
    """D 7168, experts of 2048, one shared; eight of them, in four groups."""
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs = DeepseekV3MoE(real_config())
        moe = spec_of({**REAL, "model_type": "deepseek_v3", "intermediate_size": 8}).layers[0].ffn
        ours = build(moe, Site(7168, 1e-6, "rms"))
    drawn(theirs, torch.bfloat16)
    share_experts(ours, theirs)
    x = torch.randn(1, 16, 7168).bfloat16()
    with torch.no_grad():
        want, got = theirs(x).float(), ours(x).float()
    assert want.std() > 0.05 and (got - want).norm() < 0.01 * want.norm()


def share_experts(ours, theirs):
    """Our block computes with the reference's own tensors."""
    ours.router.weight = theirs.gate.weight
    ours.router.select_bias = torch.nn.Parameter(theirs.gate.e_score_correction_bias, requires_grad=False)
    for name in ("gate_up", "down"):
        ours.experts[name].weight = getattr(theirs.experts, f"{name}_proj")
    gate, up, down = (getattr(theirs.shared_experts, f"{x}_proj").weight for x in ("gate", "up", "down"))
    ours.shared.gate_up.weight, ours.shared.down.weight = torch.nn.Parameter(torch.cat((gate, up))), down


# --- config.json ------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize(("model_type", "fields", "word"), [
    ("deepseek_v2", {"topk_method": "greedier", "num_experts_per_tok": 2}, "topk_method"),
    ("deepseek_v2", {}, "num_experts_per_tok"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "num_experts_per_tok": 2}, "n_group"),
    ("deepseek_v3", {"n_group": 3}, "groups"),
    ("deepseek_v3", {"n_group": 2, "topk_group": 4}, "groups"),
    ("deepseek_v3", {"n_routed_experts": 4}, "8 of 4 experts"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "rotate"),
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank"),
    ("deepseek_v3", {"hidden_act": "softsign"}, "hidden_act"),
    ("deepseek_v3", {"aux_loss_alpha": "small"}, "aux_loss_alpha"),
    ("deepseek_v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank"),
    ("deepseek_v32", {"index_head_dim": 32}, "index_head_dim"),
    ("deepseek_v32", {"index_topk": 0}, "index_topk"),
    ("deepseek_v32", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
])
def test_what_is_refused(model_type, fields, word):
    with pytest.raises(BadInput, match=word):
        spec_of({"model_type": model_type, **SIZES, **fields})


@pytest.mark.parametrize("config", [DeepseekV2Config, DeepseekV3Config, DeepseekV32Config])
def test_what_config_leaves_out(config):
    """A config.json that states sizes only is read as transformers reads it."""
    fields = {**SIZES, **({"num_experts_per_tok": 2} if config is DeepseekV2Config else {})}
    theirs, ours = config(**fields), spec_of({"model_type": config.model_type, **fields})
    mla, moe = ours.layers[-1].mixer, ours.layers[-1].ffn
    assert (mla.q_rank, mla.kv_rank, mla.nope, mla.rope.dim, mla.v_dim, mla.bias) == (
        theirs.q_lora_rank, theirs.kv_lora_rank, theirs.qk_nope_head_dim, theirs.qk_rope_head_dim, theirs.v_head_dim, theirs.attention_bias)
    assert (moe.experts, moe.top_k, moe.hidden, moe.shared, moe.scale, moe.renormalize) == (
        theirs.n_routed_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size,
        theirs.n_shared_experts * theirs.moe_intermediate_size, theirs.routed_scaling_factor, theirs.norm_topk_prob)
    assert (moe.groups, moe.top_groups) == (theirs.n_group or 1, theirs.topk_group or 1)
    assert (ours.context, ours.eps, ours.tied) == (theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert [layer.ffn == moe for layer in ours.layers] == [i >= theirs.first_k_dense_replace for i in range(4)]
    if config is DeepseekV32Config:
        assert (mla.indexer.heads, mla.indexer.dim, mla.indexer.top_k) == (theirs.index_n_heads, theirs.index_head_dim, theirs.index_topk)
    else:
        assert spec_of({"model_type": config.model_type, **fields, "q_lora_rank": None}).layers[0].mixer.q_rank is None


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_the_balance_loss_that_config_states(model_type):
    """`aux_loss_alpha`, within each sequence unless `seq_aux` is false; none where the file says nothing, as in the reference."""
    def of(**fields):
        spec = spec_of({"model_type": model_type, **SIZES, "num_experts_per_tok": 2, **fields})
        assert spec_of(config_of(spec)).layers[-1].ffn.aux_loss == spec.layers[-1].ffn.aux_loss
        return spec.layers[-1].ffn.aux_loss, spec.layers[-1].ffn.balance

    assert of() == (0.0, "sequence")
    assert of(aux_loss_alpha=0.003) == (0.003, "sequence") and of(aux_loss_alpha=0.003, seq_aux=False) == (0.003, "switch")


def test_which_layers_are_sparse():
    def kinds(**fields):
        spec = spec_of({"model_type": "deepseek_v3", **SIZES, "num_hidden_layers": 7, **fields})
        return "".join(type(layer.ffn).__name__[1] for layer in spec.layers)

    assert kinds() == "LLLoooo"
    assert kinds(first_k_dense_replace=0) == "ooooooo"
    assert kinds(first_k_dense_replace=1, moe_layer_freq=2) == "LLoLoLo"
    assert kinds(first_k_dense_replace=9) == "LLLLLLL"


@pytest.mark.parametrize(("rope", "factor"), [
    ({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.36889**2),  # V3
    ({"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}, 1.26080**2),  # V2
    ({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0}, 1.0),
    ({"type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0}, 1.0),
    ({"type": "yarn", "factor": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    (None, 1.0),
], ids=str)
def test_the_second_temperature(rope, factor):
    rope = rope and {**rope, "original_max_position_embeddings": 32}
    scale = spec_of({"model_type": "deepseek_v3", **SIZES, "rope_scaling": rope}).layers[0].mixer.scale
    assert scale == pytest.approx(192**-0.5 * factor, rel=1e-5)
    theirs = DeepseekV3Attention(DeepseekV3Config(**SIZES, rope_scaling=rope), 0)
    assert scale == pytest.approx(theirs.scaling, rel=1e-6)


def test_the_reference_is_what_it_says():
    """The trap of transformers' own spelling: it writes head_dim = qk_rope_head_dim, which is no width of a head."""
    theirs = DeepseekV3ForCausalLM(CASES["deepseek-v3"])
    fields = theirs.config.to_dict()
    assert fields["head_dim"] == fields["qk_rope_head_dim"] == spec_of(fields).layers[0].mixer.rope.dim
