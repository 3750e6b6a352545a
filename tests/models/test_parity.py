"""Every family against transformers: logits, loss, every gradient, cache, greedy tokens, from its files and into them."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CASES, assert_equal, tokens, written
from transformers import AutoModelForCausalLM

import pellucid
from pellucid.cli.inspect import Inspect, inspect
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.models import save
from pellucid.models.families import find
from pellucid.models.names import targets
from pellucid.nn import KVCache, count_parameters
from pellucid.ops import chunked_cross_entropy


@pytest.fixture(scope="module", params=CASES)
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = written(request.param, folder)
    return theirs, pellucid.load(folder), folder


@pytest.fixture
def pair(opened):
    """(transformers' model, ours loaded from its folder, the folder)"""
    with torch.no_grad():
        opened[0](input_ids=tokens(1, 1))  # dynamic NTK keeps the frequencies of the longest sequence until a short one comes
    return opened


def test_logits_within_and_beyond_the_original_context(pair):
    theirs, ours, _ = pair
    x = tokens(2, 100)
    with torch.no_grad():
        want = theirs(input_ids=x).logits
        assert want.std() > 0.5  # the reference says something
        assert_equal(ours(x), want)
        assert_equal(ours(x[:1, :1]), theirs(input_ids=x[:1, :1]).logits)


def test_left_padding(pair):
    theirs, ours, _ = pair
    x, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        want = theirs(input_ids=x, attention_mask=mask, position_ids=positions).logits
        assert_equal(ours(x, mask=mask)[mask.bool()], want[mask.bool()])
        for row in range(3):  # and equal to the sequence by itself
            assert_equal(ours(x[row : row + 1, mask[row] == 1])[0], want[row, mask[row] == 1])


@pytest.mark.parametrize("cuts", [[24], [7, 1, 9, 7], [1] * 24], ids=["whole", "chunks", "tokens"])
def test_cache(pair, cuts):
    theirs, ours, _ = pair
    x = tokens(2, 24)
    cache = KVCache(ours.spec, 2, 24)
    with torch.no_grad():
        got = torch.cat([ours(part, cache=cache) for part in x.split(cuts, 1)], 1)
        assert_equal(got, theirs(input_ids=x).logits)
    assert sum(t[:, :, :24].nbytes for entries in cache.entries for t in entries) == 2 * 24 * ours.spec.kv_bytes_per_token


def test_left_padding_with_a_cache_in_chunks(pair):
    """Rows of 30, 21 and 3 tokens in chunks that begin inside and outside of the padding."""
    theirs, ours, _ = pair
    x, first = tokens(3, 30, seed=5), torch.tensor([0, 9, 27])
    mask = (torch.arange(30)[None] >= first[:, None]).long()
    cache = KVCache(ours.spec, 3, 30, first=first)
    with torch.no_grad():
        got = torch.cat([ours(part, cache=cache) for part in x.split([7, 1, 12, 1, 1, 8], 1)], 1)
        want = theirs(input_ids=x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
        assert_equal(got[mask.bool()], want[mask.bool()])


def test_loss_and_the_gradient_of_every_parameter(pair):
    theirs, ours, _ = pair
    x = tokens(2, 70)
    labels = x.clone()
    labels[0, :9] = -100
    loss = theirs(input_ids=x, labels=labels).loss
    grads = dict(zip(dict(theirs.named_parameters()), torch.autograd.grad(loss, list(theirs.parameters()), allow_unused=True), strict=True))
    shifted = labels[:, 1:].flatten()
    total = chunked_cross_entropy(ours.hidden(x)[:, :-1].flatten(0, 1), ours.head_weight, shifted, 50)
    mean = total / (shifted != -100).sum()
    assert_equal(mean, loss, "loss")
    parameters = {name: p for name, p in ours.named_parameters() if p.requires_grad}  # no selection bias of a router
    mine = dict(zip(parameters, torch.autograd.grad(mean, list(parameters.values()), allow_unused=True), strict=True))
    seen = set()
    for name, _, piece in targets(ours, find(ours.spec.family).names, len(ours.spec.layers), grads):
        if name not in mine:
            assert piece.name not in grads
            continue
        seen.add(piece.name)
        if "indexer" in piece.name:  # what it chooses passes no gradient
            assert mine[name] is None and grads[piece.name] is None
            continue
        want = piece.theirs(grads[piece.name])
        assert want.abs().max() > 0, f"{piece.name}: a gradient of zero proves nothing"
        worst = (piece.ours(mine[name]) - want).abs().max() / want.abs().max()
        # sums of decays: the reference takes differences of rounded totals, and is further from float64 than we are
        assert worst < (1e-4 if "linear_attn" in piece.name else 2e-5), f"{piece.name}: {worst:.1e}"
    assert seen == set(grads)


def test_greedy_tokens_in_a_padded_batch(pair):
    theirs, ours, _ = pair
    lengths, most = (9, 4, 1), 20
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in lengths]
    x, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        x[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = torch.tensor(prompt), 1
    want = theirs.generate(x, attention_mask=mask, max_new_tokens=most, do_sample=False)[:, 9:].tolist()
    samples = [Sample(p, SamplingParams(max_tokens=most), 0) for p in prompts]
    run_all(ours, samples, eos=[2])
    for sample, theirs_ids in zip(samples, want, strict=True):
        end = theirs_ids.index(2) + 1 if 2 in theirs_ids else most
        assert sample.tokens == theirs_ids[:end]


def test_transformers_opens_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    with torch.no_grad():  # other numbers than the file's, so that nothing can come from there
        for p in ours.parameters():
            p.mul_(torch.empty_like(p).uniform_(0.8, 1.2, generator=torch.Generator().manual_seed(5)))
        save(ours, tmp_path / "new", generation={"eos_token_id": 2, "pad_token_id": 0})
        back, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "new", attn_implementation="eager", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert type(back) is type(theirs)
        x = tokens(2, 60)
        assert_equal(ours(x), back(input_ids=x).logits)
        again = pellucid.load(tmp_path / "new")
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
        assert again.spec == ours.spec
    before, after = theirs.config.to_dict(), back.config.to_dict()
    for field in ("rope_parameters", "layer_types", "sliding_window", "head_dim", "attention_bias", "mlp_bias",
                  "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "vocab_size", "eos_token_id", "hidden_act",
                  "original_max_position_embeddings", "n_positions", "query_pre_attn_scalar", "hidden_activation", "activation_function", "layer_norm_epsilon",
                  "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
                  "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "mlp_layer_types", "topk_method", "routed_scaling_factor",
                  "rope_interleave", "num_nextn_predict_layers", "index_topk", "index_head_dim", "index_n_heads",
                  "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
                  "num_experts", "shared_expert_intermediate_size", "norm_topk_prob"):
        assert field not in before or before[field] == after.get(field), field


def test_older_spelling_of_the_config(pair, tmp_path, request):
    """rope_theta beside rope_scaling, torch_dtype: what most files on the Hub say."""
    theirs, _, folder = pair
    name = request.node.callspec.params["opened"]
    fields = json.loads((folder / "config.json").read_text())
    fields["torch_dtype"] = fields.pop("dtype")
    rope = fields.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        fields |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
                   "sliding_window_pattern": fields["layer_types"].index("full_attention") + 1}
        rope = rope["full_attention"]
    if rope:
        fields |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    if "linear_attention" in fields.get("layer_types", ()):
        fields["full_attention_interval"] = fields["layer_types"].index("full_attention") + 1
    if name != "gemma3-biases":  # a pattern ends in the layer without a window
        fields.pop("layer_types", None)
    assert pellucid.models.spec_of(fields) == pellucid.models.spec_of(json.loads((folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    x = tokens(1, 50)
    with torch.no_grad():
        assert_equal(pellucid.load(tmp_path, dtype="auto")(x), theirs(input_ids=x).logits)


def test_counts_from_the_spec(pair, capsys):
    theirs, ours, folder = pair
    count = count_parameters(ours.spec)
    stored = sum(b.numel() for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias"))  # a buffer there
    assert count == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() + stored
    inspect(Inspect(str(folder)))
    assert re.search(rf"^parameters +{count:,}$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_files_of_the_base_model_lack_its_prefix(name, tmp_path):
    """GPT-2's own files call it h.0.attn.c_attn.weight, and carry the causal mask as a buffer."""
    theirs = written(name, tmp_path)
    tensors = {key.split(".", 1)[1]: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2 if name == "gpt2" else 0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    x = tokens(2, 40)
    with torch.no_grad():
        assert_equal(pellucid.load(tmp_path)(x), theirs(input_ids=x).logits)


@pytest.mark.parametrize("name", ["qwen3-biases", "llama3", "phi3", "gpt2"])
def test_shards(name, tmp_path):
    theirs = written(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    x = tokens(2, 40)
    with torch.no_grad():
        assert_equal(pellucid.load(tmp_path)(x), theirs(input_ids=x).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "phi4-mini"])
def test_half_precision_files(name, dtype, tmp_path):
    """The same numbers as transformers has after reading the file, and close logits when computing in that dtype."""
    written(name, tmp_path).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    wide, narrow = pellucid.load(tmp_path), pellucid.load(tmp_path, dtype="auto")
    assert wide.embed.weight.dtype == torch.float32 and narrow.embed.weight.dtype == getattr(torch, dtype)
    x = tokens(2, 40)
    with torch.no_grad():
        want = theirs(input_ids=x).logits
        assert_equal(wide(x), want)
        assert (narrow(x).float() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope", "phi3.5"])
@pytest.mark.parametrize("length", [31, 32, 33, 34])
def test_lengths_at_the_borders_of_rotations(name, length, tmp_path):
    """The frequencies change when the 33rd token comes, for the whole sequence."""
    theirs = written(name, tmp_path)
    x = tokens(2, length)
    with torch.no_grad():
        theirs(input_ids=x[:, :1])
        assert_equal(pellucid.load(tmp_path)(x), theirs(input_ids=x).logits)
