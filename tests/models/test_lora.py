"""Adapters: the formula, what is shared and what is copied, and PEFT's files there and back."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import pellucid
from pellucid import events
from pellucid.errors import BadInput
from pellucid.models.lora import (
    LoraConfig,
    attach,
    left_out,
    load_adapters,
    merge_into,
    save_adapters,
    with_merged,
    without_adapters,
)
from pellucid.nn.lora import adapted

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, max_position_embeddings=64)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def trained(folder, **choices):
    """Adapters with something in them."""
    model = pellucid.load(folder)
    attach(model, LoraConfig(rank=4, alpha=6, **choices))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in adapted(model).values():
            for adapter in lora.adapters:
                adapter.b.copy_(0.3 * torch.randn(adapter.b.shape, generator=g))
    return model


def test_at_first_nothing_changes_and_only_adapters_learn(folder):
    model, given = pellucid.load(folder), pellucid.load(folder)
    attach(model, LoraConfig())
    torch.testing.assert_close(model(TOKENS), given(TOKENS), atol=1e-6, rtol=0)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"a", "b"}
    model(TOKENS).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with pytest.raises(BadInput, match="already"):
        attach(model, LoraConfig())


def test_the_formula_by_the_hubs_names(folder, tmp_path):
    """W + (alpha / r) B A on every named matrix of the Hub's file, in a transformers model that knows nothing of adapters."""
    model = trained(folder, targets=("q_proj", "v_proj", "down_proj"))
    theirs = LlamaForCausalLM.from_pretrained(folder)
    changed = 0
    with torch.no_grad():
        for lora in adapted(model).values():
            for a in lora.adapters:
                theirs.get_submodule(a.source).weight += 6 / 4 * (a.b @ a.a)
                changed += 1
        expected = theirs(TOKENS).logits
        assert changed == 6 and (expected - pellucid.load(folder)(TOKENS)).abs().max() > 0.01
        torch.testing.assert_close(model(TOKENS), expected, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(with_merged(model)(TOKENS), expected, atol=2e-6, rtol=1e-4)
    pellucid.save(with_merged(model), tmp_path / "merged")
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits, expected, atol=2e-6, rtol=1e-4)


def test_without_adapters_is_the_given_model_over_the_same_tensors(folder):
    model = trained(folder)
    plain = without_adapters(model)
    assert torch.equal(plain(TOKENS), pellucid.load(folder)(TOKENS))
    ours = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in ours for p in plain.parameters())
    merged = with_merged(model)
    with torch.no_grad():
        for lora in adapted(model).values():
            for a in lora.adapters:
                a.b.mul_(2)
    before = merged(TOKENS)
    merge_into(merged, model)
    assert not torch.equal(before, merged(TOKENS))
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj")], ids=str)
def test_files_there_and_back(folder, tmp_path, targets):
    model = trained(folder, targets=targets)
    save_adapters(model, tmp_path / "adapter", base=str(folder))
    again = pellucid.load(folder)
    load_adapters(again, tmp_path / "adapter")
    assert torch.equal(again(TOKENS), model(TOKENS))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == 4 and fields["lora_alpha"] == 6
    assert fields["target_modules"] == sorted(targets or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj")], ids=str)
def test_peft_opens_ours_and_we_open_pefts(folder, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="optional reference: pip install peft")
    model = trained(folder, targets=targets)
    save_adapters(model, tmp_path / "ours", base=str(folder))
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-6, rtol=1e-4)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets or ("k_proj", "down_proj")), init_lora_weights=False)
    made = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), config).eval()
    made.save_pretrained(tmp_path / "theirs")
    ours = pellucid.load(folder)
    load_adapters(ours, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), made(TOKENS).logits, atol=2e-6, rtol=1e-4)
        assert (ours(TOKENS) - pellucid.load(folder)(TOKENS)).abs().max() > 0.01


def test_what_does_not_fit_is_refused(folder, tmp_path):
    model = pellucid.load(folder)
    with pytest.raises(BadInput, match="q_porj"):
        attach(model, LoraConfig(targets=("q_porj",)))
    with pytest.raises(BadInput, match="rank"):
        LoraConfig(rank=0)
    with pytest.raises(BadInput, match="no adapters"):
        save_adapters(model, tmp_path / "none")
    with pytest.raises(BadInput, match="no LoRA adapter"):
        load_adapters(model, tmp_path)
    save_adapters(trained(folder), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"use_dora": True}))
    with pytest.raises(BadInput, match="use_dora"):
        load_adapters(model, tmp_path / "adapter")
    file.write_text(json.dumps(fields))
    other = pellucid.load(folder)
    attach(other, LoraConfig(rank=4, targets=("q_proj",)))
    with pytest.raises(BadInput, match="another model"):
        load_adapters(other, tmp_path / "adapter")


def test_transposed_matrices_as_peft_has_them(tmp_path):
    """GPT-2 stores its matrices transposed (Conv1D), q, k and v as one."""
    peft = pytest.importorskip("peft", reason="optional reference: pip install peft")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = trained(tmp_path / "gpt2")
    assert {a.source.rpartition(".")[2] for lora in adapted(model).values() for a in lora.all} == {"c_attn", "c_proj", "c_fc"}
    save_adapters(model, tmp_path / "ours", base=str(tmp_path / "gpt2"))
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-6, rtol=1e-4)
        assert (model(TOKENS) - pellucid.load(tmp_path / "gpt2")(TOKENS)).abs().max() > 0.01
        torch.testing.assert_close(with_merged(model)(TOKENS), model(TOKENS), atol=2e-6, rtol=1e-4)
    made = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)).eval()
    made.save_pretrained(tmp_path / "theirs")
    ours = pellucid.load(tmp_path / "gpt2")
    load_adapters(ours, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), made(TOKENS).logits, atol=2e-6, rtol=1e-4)


def test_what_gets_no_adapter_is_told_or_refused_by_name(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
                           num_local_experts=4, max_position_embeddings=64)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    model, seen = pellucid.load(tmp_path / "moe"), []
    refused = left_out(model)
    assert {"w1", "w2", "w3"} <= refused.keys() and all("stacked" in refused[name] for name in ("w1", "w2", "w3"))
    with pytest.raises(BadInput, match="w1 has no adapters here") as error:
        attach(model, LoraConfig(targets=("q_proj", "w1")))
    assert "stacked" in str(error.value)
    with events.subscribed(seen.append):
        attach(model, LoraConfig())
    assert any("w2: the matrices of experts are stacked" in e.text and e.level == "warning" for e in seen)
    assert left_out(pellucid.load(tmp_path / "moe")) == refused
