"""Broken, lying and hostile checkpoints: refused with the culprit's name, and nothing half-written."""

import json
import math
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import written

import pellucid
from pellucid.errors import BadInput, PellucidError
from pellucid.models import save

LAYER = "model.layers.1."


@pytest.fixture
def folder(tmp_path):
    written("qwen3", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def changed(folder, change):
    """Applies `change` to the dict of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refusal(folder) -> str:
    with pytest.raises(BadInput) as caught:
        pellucid.load(folder, dtype="auto")
    assert caught.value.exit_code == 2 and str(caught.value).count("\n") <= 2
    return str(caught.value)


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", LAYER + "self_attn.k_norm.weight",
    LAYER + "self_attn.v_proj.weight", LAYER + "mlp.up_proj.weight", LAYER + "input_layernorm.weight"])
def test_one_tensor_removed_renamed_or_reshaped(folder, name):
    changed(folder, lambda t: t.update({name + "x": t.pop(name)}))
    told = refusal(folder)
    assert f"missing: {name} (1)" in told and f"unused: {name}x (1)" in told
    changed(folder, lambda t: t.pop(name + "x"))
    assert f"missing: {name} (1)" in refusal(folder)
    changed(folder, lambda t: t.update({name: torch.zeros(7, 3)}))
    told = refusal(folder)
    assert f"wrong shape: {name} (7, 3) instead of" in told and "missing" not in told


def test_same_number_of_entries_in_another_shape(folder):
    name = LAYER + "mlp.down_proj.weight"
    changed(folder, lambda t: t.update({name: t[name].T.contiguous()}))
    assert name in refusal(folder)


def test_one_tensor_too_many(folder):
    changed(folder, lambda t: t.update({LAYER + "self_attn.q_proj.bias": torch.zeros(64)}))
    assert f"unused: {LAYER}self_attn.q_proj.bias" in refusal(folder)
    changed(folder, lambda t: t.pop(LAYER + "self_attn.q_proj.bias"))
    changed(folder, lambda t: t.update({LAYER + "self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    pellucid.load(folder)  # a buffer that old files carry


def test_weights_of_another_model(folder, tmp_path):
    written("llama-biases", tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    told = refusal(folder)
    assert "missing" in told and "unused" in told and "wrong shape" in told


@pytest.mark.parametrize("keep", [0, 4, 9, 500, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a":1}', b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'])
def test_a_header_that_lies(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    assert "model.safetensors" in refusal(folder)


def test_a_header_longer_than_the_file(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None])
def test_an_index_that_points_elsewhere(folder, name):
    (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no safetensors file of this folder" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}', "\xff"])
def test_an_unreadable_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refusal(folder)


def test_an_index_that_is_a_folder_and_one_of_an_endless_name(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.mkdir()
    assert "not a readable weight index" in refusal(folder)
    index.rmdir()
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "x" * 300 + ".safetensors"}}))
    assert "is missing" in refusal(folder)


@pytest.mark.parametrize("fields", [{}, {"num_nextn_predict_layers": 1}], ids=["experts", "and a prediction layer"])
def test_a_model_of_millions_of_tensors_is_refused_at_once(fields, tmp_path):
    """196 million tensors of one expert each, of which not one is there."""
    written("deepseek-v3", tmp_path)
    edited(tmp_path, n_routed_experts=2**16, num_hidden_layers=1000, n_group=1, topk_group=1, first_k_dense_replace=0, **fields)
    started = time.monotonic()
    assert "over 250,000 tensors" in refusal(tmp_path)
    assert time.monotonic() - started < 60


def test_a_missing_shard(tmp_path):
    written("qwen3", tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refusal(tmp_path)


@pytest.mark.parametrize("text", [
    "", "not json", "[]", "3", "null", '{"model_type":', "\xff\xfe", "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("field", [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size"])
@pytest.mark.parametrize("value", [0, -4, 3.5, "48", True, [], {}, 2**31 - 1, 10**30])
def test_absurd_sizes(folder, field, value):
    """Refused at once: nothing is allocated for numbers that the file's shapes deny."""
    edited(folder, **{field: value})
    refusal(folder)


@pytest.mark.parametrize("fields", [
    {"rms_norm_eps": "small"}, {"rms_norm_eps": -1.0}, {"rms_norm_eps": math.nan}, {"hidden_act": "swish2"},
    {"hidden_act": 5}, {"max_position_embeddings": "long"}, {"max_position_embeddings": 0},
    {"rope_parameters": [1]}, {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2}},
    {"rope_parameters": {"rope_type": ["yarn"]}}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2}},
    {"rope_parameters": {"rope_type": "yarn", "factor": -2}}, {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": 3}},
    {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
    {"rope_parameters": {"rope_type": "dynamic"}}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7 + [0]}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8,
                         "original_max_position_embeddings": 1}},
    {"rope_parameters": {"rope_type": 3, "rope_theta": 1e4}}, {"rope_parameters": {"rope_theta": "x"}},
    {"rope_parameters": {"rope_theta": -1e4}}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0}},
    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.25},
    {"layer_types": ["full_attention"]}, {"layer_types": ["full_attention", "linear_attention"]}, {"layer_types": 5},
    {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 0},
    {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": "6"},
    {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": None},
    {"dtype": ["bfloat16"]}, {"dtype": 5}, {"model_type": "qwen33"}, {"model_type": None}, {"model_type": ["llama"]},
], ids=lambda fields: json.dumps(fields)[:70])
def test_absurd_fields(folder, fields):
    edited(folder, **fields)
    refusal(folder)


def test_no_checkpoint(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        refusal(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refusal(tmp_path)
    assert "no folder" in refusal("someone/never-existed-9f3")


def test_only_weights_in_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_folder(folder, monkeypatch, kind):
    ours = pellucid.load(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Tokenizer:
        def save(self, where):
            (where / "tokenizer.json").write_text("half")
            raise kind("stopped")

    with pytest.raises(kind):
        save(ours, folder, tokenizer=Tokenizer())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no remains beside it
    with pytest.raises(kind):
        save(ours, folder.parent / "fresh", tokenizer=Tokenizer())
    assert not (folder.parent / "fresh").exists()


def test_a_save_replaces_all_weights(folder):
    (folder / "consolidated.safetensors").write_bytes(b"the same weights under other names, as some Hub folders have")
    save(pellucid.load(folder), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    pellucid.load(folder)


class Tokenizer:
    def save(self, where):
        (where / "tokenizer.json").write_text("new")


def test_what_stands_beside_the_weights_stays(folder):
    """A model that is saved where it came from keeps its tokenizer, its card, its modules; a new tokenizer replaces the old one's files."""
    model = pellucid.load(folder)
    for name in ("tokenizer.json", "vocab.json", "chat_template.jinja", "README.md", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (folder / name).write_text("old")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("old")
    (folder / "cache").symlink_to(folder / "README.md")
    save(model, folder)
    kept = {"1_Pooling", "README.md", "cache", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "vocab.json"}
    assert {p.name for p in folder.iterdir()} == kept and (folder / "1_Pooling" / "config.json").read_text() == "old"
    assert (folder / "README.md").read_text() == (folder / "cache").read_text() == "old" and not (folder / "cache").is_symlink()
    save(model, folder, tokenizer=Tokenizer())
    assert {p.name for p in folder.iterdir()} == kept - {"chat_template.jinja", "vocab.json", "generation_config.json"}
    save(model, folder, tokenizer=Tokenizer(), generation={"eos_token_id": 2})
    assert {p.name for p in folder.iterdir()} == kept - {"chat_template.jinja", "vocab.json"}
    assert (folder / "tokenizer.json").read_text() == "new" and json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_other_things_are_not_replaced_by_a_model(folder, tmp_path):
    model = pellucid.load(folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PellucidError, match=r"notes\.txt"):
        save(model, tmp_path / "notes.txt")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.pdf").write_text("mine")
    with pytest.raises(BadInput, match=r"holds no model, but a\.pdf"):
        save(model, tmp_path / "papers")
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "papers" / "a.pdf").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert pellucid.load(tmp_path / "empty").spec == model.spec


def test_a_config_that_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    for call in (pellucid.load, pellucid.inspect):
        with pytest.raises(BadInput, match=r"config\.json cannot be read"):
            call(tmp_path)


@pytest.mark.parametrize("value", ["fp8", ["fp8"], {"quant_method": None}, 7])
def test_a_strange_quantization_is_no_obstacle_to_looking(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    assert pellucid.inspect(folder).dtype == "float32"
