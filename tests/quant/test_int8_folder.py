"""INT8 folders: what is written, what is read back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pellucid.engine import LLM, SamplingParams
from pellucid.engine.opening import open_model
from pellucid.errors import BadInput
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.quant import compress, is_quantized, quantize, stored_bytes
from pellucid.runtime import Choice
from pellucid.tokenizers import train_bpe


def model_of(family: str, tied: bool) -> Decoder:
    attn = Attn(4, 2, 8, Rope(8), qk_norm=family == "qwen3", qkv_bias=family == "llama", out_bias=family == "llama")
    spec = DecoderSpec(400, 32, (Layer(attn, MLP(48)),) * 2, tied=tied, context=64, family=family)
    return init_weights(Decoder(spec), seed=3).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_quantizing_the_folder_and_the_model_are_the_same(tmp_path: Path, family: str, tied: bool):
    model = model_of(family, tied)
    save(model, tmp_path / "float")
    told = compress(tmp_path / "float", tmp_path / "int8")
    small, opened = quantize(model), open_model(tmp_path / "int8")
    assert is_quantized(opened)
    tokens = torch.randint(0, 400, (3, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened(tokens), small(tokens)), "bit for bit"
    assert told.size == stored_bytes(small) == stored_bytes(opened)
    on_disk = (tmp_path / "int8" / "model.safetensors").stat().st_size
    assert told.size < on_disk < told.size + 10_000 and on_disk < 0.4 * (tmp_path / "float" / "model.safetensors").stat().st_size
    as_float = load(tmp_path / "int8")
    assert not is_quantized(as_float)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(as_float.layers[0].modules(), small.layers[0].modules()) if hasattr(a, "weight"))


def test_what_the_file_holds(tmp_path: Path):
    model = model_of("qwen3", tied=True)
    save(model, tmp_path / "float", generation={"eos_token_id": 3})
    compress(tmp_path / "float", tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    q = "model.layers.1.self_attn.q_proj.weight"
    assert tensors[q].dtype == torch.int8 and tensors[q].shape == (32, 32)
    assert tensors[f"{q}_scale"].shape == (32, 1) and tensors[f"{q}_scale"].dtype == torch.float32
    assert "model.embed_tokens.weight_scale" in tensors and "lm_head.weight" not in tensors
    assert tensors["model.norm.weight"].dtype == torch.float32
    w = model.layers[1].mixer.qkv.weight[:32].detach()
    assert ((tensors[q].float() * tensors[f"{q}_scale"] - w).abs() <= tensors[f"{q}_scale"] * 0.5001).all()
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "pellucid-int8"
    assert json.loads((tmp_path / "int8" / "generation_config.json").read_text())["eos_token_id"] == 3


def test_llm_runs_the_folder_with_its_tokenizer(tmp_path: Path):
    tokenizer = train_bpe(["one two three four " * 50, "hello world " * 50, "".join(map(chr, range(32, 400)))], 400)
    model = model_of("qwen3", tied=True)
    save(model, tmp_path / "float", tokenizer=tokenizer)
    compress(tmp_path / "float", tmp_path / "int8")
    llm = LLM(tmp_path / "int8")
    assert is_quantized(llm.model)
    out = llm.generate(["hello", "one two"], SamplingParams(max_tokens=4))
    assert [len(o.outputs[0].token_ids) > 0 for o in out] == [True, True]


def test_shards_and_a_tied_head_in_the_file(tmp_path: Path):
    """transformers writes large models in several files, and some tied ones with their head."""
    model = model_of("qwen3", tied=True)
    save(model, tmp_path / "float")
    folder = tmp_path / "float"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in parts.items():
        extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if "00001" in file else {}
        save_file({n: tensors[n] for n in held} | extra, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, h in parts.items() for n in h}}))
    compress(folder, tmp_path / "int8")
    assert not (tmp_path / "int8" / "model.safetensors.index.json").exists()
    tokens = torch.arange(9)[None]
    assert torch.equal(open_model(tmp_path / "int8")(tokens), quantize(model)(tokens))


def test_damaged_scales_are_refused(tmp_path: Path):
    save(model_of("qwen3", tied=True), tmp_path / "float")
    compress(tmp_path / "float", tmp_path / "int8")
    path = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    for change in ("missing", "flat", "other rows"):
        broken = dict(tensors)
        scale = broken.pop(f"{name}_scale")
        if change != "missing":
            broken[f"{name}_scale"] = scale.flatten() if change == "flat" else scale[:1].clone()
        save_file(broken, path)
        with pytest.raises(BadInput, match=r"down_proj.weight"):
            load(tmp_path / "int8")


def test_folders_that_are_refused(tmp_path: Path):
    save(model_of("qwen3", tied=True), tmp_path / "float")
    with pytest.raises(BadInput, match="source itself"):
        compress(tmp_path / "float", tmp_path / "float")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(BadInput, match="something else than a model"):
        compress(tmp_path / "float", tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").exists()
    compress(tmp_path / "float", tmp_path / "int8")
    compress(tmp_path / "float", tmp_path / "int8")
    with pytest.raises(BadInput, match="quantized already"):
        compress(tmp_path / "int8", tmp_path / "again")
    with pytest.raises(BadInput, match="no readable config"):
        compress(tmp_path / "nothing", tmp_path / "x")
    (tmp_path / "float" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BadInput, match="not a whole safetensors"):
        compress(tmp_path / "float", tmp_path / "x")
    assert not (tmp_path / "x").exists(), "nothing half-written"


def test_int8_on_a_gpu_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(model_of("qwen3", tied=True), tmp_path / "float")
    compress(tmp_path / "float", tmp_path / "int8")
    monkeypatch.setattr("pellucid.engine.opening.choose_device", lambda name: Choice(torch.device(name), "a GPU is here"))
    with pytest.raises(BadInput, match="do not run on cuda"):
        open_model(tmp_path / "int8", device="cuda")


def test_an_int8_model_is_not_saved_as_half_a_float_model(tmp_path: Path):
    with pytest.raises(BadInput, match="cannot be saved as a float checkpoint"):
        save(quantize(model_of("qwen3", tied=True)), tmp_path / "half")
    assert not (tmp_path / "half").exists()
