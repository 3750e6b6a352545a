"""Reading and writing folders: shards, slices, scaled codes, alternatives of names, what may be missing, memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import assert_equal, tokens, written
from transformers import AutoConfig, AutoModelForCausalLM

import pellucid
from pellucid.errors import BadInput
from pellucid.models import save, weights
from pellucid.models.families import find
from pellucid.models.names import Piece, targets
from pellucid.models.weights import Weights
from pellucid.nn import Linear


@pytest.fixture
def folder(tmp_path):
    written("qwen3", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# --- names ------------------------------------------------------------------------------------------------------------


class Stacks(torch.nn.Module):
    """Three parts of two heads each; two experts with a gate and an up part, and their biases."""

    def __init__(self):
        super().__init__()
        self.heads = Linear(5, (4, 6, 2), groups=2)
        self.gate_up = torch.nn.Parameter(torch.randn(2, 6, 5))
        self.gate_up_bias = torch.nn.Parameter(torch.randn(2, 6))
        self.heads.weight.data.normal_()
        self.stacked = {"gate_up": (3, 3), "gate_up_bias": (3, 3)}


def hub_tensors(model, names, have=None) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for _, parameter, piece in targets(model, names, 0, have):
        tensor = found.setdefault(piece.name, torch.full(piece.shape, torch.nan))
        piece.theirs(tensor).copy_(piece.ours(parameter.detach()))
    return found


def test_grouped_rows_stand_together_head_by_head():
    model = Stacks()
    q, k, v = model.heads.weight.detach().split((4, 6, 2))
    found = hub_tensors(model, {
        "heads.weight": ("a[0,2]^grouped", "k[1]"), "gate_up": ("gu^T^interleaved",), "gate_up_bias": ("gub^interleaved",)})
    assert torch.equal(found["a"], torch.cat((q[:2], v[:1], q[2:], v[1:]))) and torch.equal(found["k"], k)
    gate, up = model.gate_up.detach().chunk(2, 1)
    assert found["gu"].shape == (2, 5, 6)
    assert torch.equal(found["gu"][..., ::2], gate.mT) and torch.equal(found["gu"][..., 1::2], up.mT)
    assert torch.equal(found["gub"][:, ::2], model.gate_up_bias[:, :3]) and torch.equal(found["gub"][:, 1::2], model.gate_up_bias[:, 3:])


def test_experts_one_by_one_or_together_and_which_of_both_a_file_has():
    model = Stacks()
    names = {"heads.weight": ("h[0:3]",), "gate_up_bias": ("b",),
             "gate_up": [("x.{e}.gate", "x.{e}.up"), ("fused",)]}
    single = hub_tensors(model, names)
    assert set(single) == {"h", "b", "x.0.gate", "x.0.up", "x.1.gate", "x.1.up"}
    assert torch.equal(single["x.1.up"], model.gate_up[1, 3:])
    fused = hub_tensors(model, names, have={"fused", "h", "b"})
    assert set(fused) == {"h", "b", "fused"} and torch.equal(fused["fused"], model.gate_up)
    for _, parameter, piece in targets(model, names, 0, {"fused"}):
        assert isinstance(piece, Piece) and piece.whole(parameter)


# --- files ------------------------------------------------------------------------------------------------------------


def test_large_models_are_saved_in_shards_that_transformers_reads(folder, tmp_path):
    ours = pellucid.load(folder)
    save(ours, tmp_path / "sharded", shard_bytes=20_000)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and max(f.stat().st_size for f in files[1:]) < 25_000
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
    assert {name: safe_open(tmp_path / "sharded" / file, "pt").get_tensor(name).shape for name, file in index["weight_map"].items()}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", attn_implementation="eager")
    x = tokens(2, 30)
    with torch.no_grad():
        assert_equal(ours(x), theirs(input_ids=x).logits)
        assert torch.equal(ours(x), pellucid.load(tmp_path / "sharded")(x))


def test_a_slice_reads_only_its_rows(folder):
    from contextlib import ExitStack

    name = "model.layers.1.mlp.up_proj.weight"
    with ExitStack() as stack:
        weights = Weights(folder, stack, find("qwen3"))
        whole = load_file(folder / "model.safetensors")[name]
        assert torch.equal(weights.rows(name, 7, 19), whole[7:19])


def test_fp8_tiles_are_multiplied_by_their_scales(folder, tmp_path):
    """DeepSeek-V3's files: e4m3 codes, one scale for each 128 x 128; here with cut tiles at both edges."""
    spec = pellucid.nn.DecoderSpec(96, 144, (pellucid.nn.Layer(
        pellucid.nn.Attn(2, 2, 80, pellucid.nn.Rope(80), qk_norm=True), pellucid.nn.MLP(300)),), family="qwen3")
    model = pellucid.nn.init_weights(pellucid.nn.Decoder(spec))
    save(model, tmp_path / "wide")
    path = tmp_path / "wide" / "model.safetensors"
    tensors, want = load_file(path), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors.pop(name)
        scales = torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) + 0.5
        codes = (w * 20).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        want[name] = torch.stack([torch.stack([codes[i, j].float() * scales[i // 128, j // 128] for j in range(w.shape[1])])
                                  for i in range(0, w.shape[0], 37)])
    save_file(tensors, path)
    read = pellucid.load(tmp_path / "wide")
    seen = 0
    for _, parameter, piece in targets(read, find("qwen3").names, 1):
        if piece.name in want:
            assert torch.equal(piece.ours(parameter.detach())[::37], want[piece.name])
            seen += 1
    assert seen == len(want) == 7
    tensors[name + "_scale_inv"] = tensors[name + "_scale_inv"][:1]
    save_file(tensors, path)
    with pytest.raises(BadInput, match="a scale for each tile"):
        pellucid.load(tmp_path / "wide")


def test_old_buffers_are_passed_over(folder):
    """Llama 2's files hold the frequencies of each layer, GPT-2's and BERT's other tables."""
    want, tensors = pellucid.load(folder), load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for i in range(2)}
    save_file(tensors, folder / "model.safetensors")
    again = pellucid.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), again.parameters(), strict=True))
    save_file({**tensors, "model.layers.0.self_attn.inv_freq_of_mine": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"unused: model\.layers\.0\.self_attn\.inv_freq_of_mine"):
        pellucid.load(folder)


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_auto_is_the_dtype_that_config_json_states(folder, spelling):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps({**config, spelling: "bfloat16"}))
    assert {p.dtype for p in pellucid.load(folder, dtype="auto").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pellucid.load(folder).parameters()} == {torch.float32}
    (folder / "config.json").write_text(json.dumps({**config, spelling: "int3"}))
    with pytest.raises(BadInput, match="int3"):
        pellucid.load(folder, dtype="auto")
    save(pellucid.load(folder, dtype="float16"), folder)
    (folder / "config.json").write_text(json.dumps(config))  # states nothing: as transformers, what the weights have
    assert {p.dtype for p in pellucid.load(folder, dtype="auto").parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["qwen3-tied", "gemma3", "gpt2"])
def test_files_that_contradict_what_config_json_says_of_the_head(name, tmp_path, capsys):
    """A copy of the embedding changes nothing, another head is one of its own, and a head alone is the embedding: as in transformers."""
    written(name, tmp_path / "in")
    file, x = tmp_path / "in" / "model.safetensors", tokens(2, 20)
    tensors = load_file(file)
    embed = next(key for key in tensors if "wte" in key or "embed_tokens" in key)
    other = torch.randn(tensors[embed].shape, generator=torch.Generator().manual_seed(3)) * 0.2
    alone = {key: tensor for key, tensor in tensors.items() if key != embed}
    for changed, tied in (({**tensors, "lm_head.weight": tensors[embed].clone()}, True), ({**tensors, "lm_head.weight": other}, False),
                          ({**alone, "lm_head.weight": other}, True)):
        save_file(changed, file, metadata={"format": "pt"})
        ours = pellucid.load(tmp_path / "in")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "in", attn_implementation="eager")
        assert ours.spec.tied is tied
        with torch.no_grad():
            assert_equal(ours(x), theirs(input_ids=x).logits)
        save(ours, tmp_path / "out")
        with torch.no_grad():
            assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")(input_ids=x).logits, ours(x))


@pytest.mark.parametrize("ids", [{"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": 3}, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))])
@pytest.mark.parametrize("name", ["llama3", "gpt2", "gemma3", "deepseek-v3", "qwen3.5"])
def test_the_ids_of_special_tokens_come_back(name, ids, tmp_path):
    """Else transformers would take the family's own, and generate until another end: Llama's is 2, GPT-2's 50256."""
    written(name, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, **ids}))
    (tmp_path / "in" / "generation_config.json").unlink()
    model = pellucid.load(tmp_path / "in")
    save(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {key: getattr(theirs.config, key) for key in ids} == ids and theirs.generation_config.eos_token_id == ids["eos_token_id"]
    save(model, tmp_path / "again", generation={"eos_token_id": 8})
    assert AutoConfig.from_pretrained(tmp_path / "again").eos_token_id == 8


def test_missing_and_unused_may_be_let_through_but_not_shapes(folder, capsys):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.1.mlp.other.weight"] = gone
    save_file(tensors, path)
    with pytest.raises(BadInput, match="--allow-missing"):
        pellucid.load(folder)
    model = pellucid.load(folder, allow_missing=True)
    up = model.layers[1].ffn.gate_up.weight[80:]
    assert torch.equal(up, pellucid.nn.init_weights(pellucid.nn.Decoder(model.spec)).layers[1].ffn.gate_up.weight[80:])
    assert up.std() > 0.05 and not torch.equal(up, gone)
    assert torch.equal(model.layers[1].ffn.down.weight, tensors["model.layers.1.mlp.down_proj.weight"])
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path)
    with pytest.raises(BadInput, match=r"wrong shape: model.norm.weight \(7,\)"):
        pellucid.load(folder, allow_missing=True)


@pytest.mark.parametrize("mapped_from", [0, 2**28])
def test_weights_are_this_process_own(folder, mapped_from, monkeypatch):
    """A parameter that stands on the file's mapped pages can be trained, and the file stays as it is. Those of small files are copied:
    they begin with a cache line."""
    monkeypatch.setattr(weights, "MAPPED_FROM", mapped_from)
    before = (folder / "model.safetensors").read_bytes()
    model = pellucid.load(folder)
    assert mapped_from == 0 or all(p.data_ptr() % 64 == 0 for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(model.embed.weight, pellucid.load(folder).embed.weight)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of this process")
def test_peak_memory_of_loading(tmp_path):
    layer = pellucid.nn.Layer(pellucid.nn.Attn(8, 8, 64, pellucid.nn.Rope(64)), pellucid.nn.MLP(4096))
    spec = pellucid.nn.DecoderSpec(1024, 512, (layer,) * 16, family="llama")
    save(pellucid.nn.init_weights(pellucid.nn.Decoder(spec)), tmp_path / "model")
    code = """if True:
        import re, sys, pellucid.models, pellucid.nn
        status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        pellucid.nn.Decoder(pellucid.models.spec_of({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8, "vocab_size": 9}))
        before = status("VmRSS")
        model = pellucid.load(sys.argv[1])
        total = sum(float(p.detach().sum()) for p in model.parameters())  # every page touched
        print((status("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    """The published files' layout: blocks and scales by output row, the matrix that they make transposed. transformers decodes too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    written("gpt-oss", tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"hidden_size": 64, "intermediate_size": 32}
    spec = pellucid.models.spec_of(config)
    save(pellucid.nn.init_weights(pellucid.nn.Decoder(spec)), tmp_path / "m")
    tensors, want, g = load_file(path), {}, torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (E, outputs, inputs // 32, 16), dtype=torch.uint8, generator=g)
        scales = torch.randint(120, 130, (E, outputs, inputs // 32), dtype=torch.uint8, generator=g)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        want[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert want[name].shape == (E, inputs, outputs)
    save_file(tensors, path)
    model = pellucid.load(tmp_path / "m")
    for _, parameter, piece in targets(model, find("gpt_oss").names, 2, want):
        if piece.name in want:
            assert torch.equal(piece.ours(parameter.detach()), piece.theirs(want.pop(piece.name) if piece.rows is None else want[piece.name]))
    assert model(tokens(1, 8)).isfinite().all()
    del tensors[f"{name}_scales"]
    save_file(tensors, path)
    with pytest.raises(BadInput, match="scales is missing"):
        pellucid.load(tmp_path / "m")


def test_a_hub_id_offline_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    """huggingface_hub's own layout: refs and snapshots; nothing is asked of the network."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "cache" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    (folder).rename(cache / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert pellucid.load("someone/tiny").spec.dim == 48
    with pytest.raises(BadInput, match="the Hub gave none"):
        pellucid.load("someone/other")
