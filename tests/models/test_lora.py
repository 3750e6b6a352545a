"""Adapters: the formula, what is shared and what is copied, and PEFT's files there and back."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import pellucid
from pellucid import events
from pellucid.errors import BadInput
from pellucid.models.lora import (
    LoraConfig,
    attach,
    left_out,
    load_adapters,
    merge_into,
    nested,
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


# --- experts ----------------------------------------------------------------------------------------------------------


EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)),
    "qwen3": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
        moe_intermediate_size=20, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1, max_position_embeddings=64)),
}
BOTH = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module", params=EXPERTS)
def mixture(request, tmp_path_factory):
    torch.manual_seed(0)
    made = EXPERTS[request.param]()
    with torch.no_grad():
        made.lm_head.weight.mul_(8)  # so that the logits depend on something
    path = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(path)
    return path


def filled(model):
    """Adapters with something in them."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in adapted(model).values():
            for adapter in lora.all:
                adapter.b.copy_(0.3 * torch.randn(adapter.b.shape, generator=g))
    return model


@pytest.mark.parametrize("stacks", [BOTH, BOTH[1:], BOTH[:1]], ids=str)
def test_experts_in_peft_and_back(mixture, tmp_path, stacks):
    """Logits of our adapters in PEFT and of PEFT's here; the gradient of every adapter; and the merged model."""
    peft = pytest.importorskip("peft", reason="optional reference: pip install peft")
    model = pellucid.load(mixture)
    attach(model, LoraConfig(rank=3, alpha=5, targets=("q_proj",), target_parameters=stacks))
    given = pellucid.load(mixture)(TOKENS)
    torch.testing.assert_close(model(TOKENS), given, atol=1e-5, rtol=1e-4)  # at first nothing changes
    filled(model)
    save_adapters(model, tmp_path / "ours", base=str(mixture))
    base = AutoModelForCausalLM.from_pretrained(mixture)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True).eval()
    assert sum("lora_A" in n and "experts" in n for n, _ in theirs.named_parameters()) == 2 * len(stacks)
    logits, expected = model(TOKENS), theirs(TOKENS).logits
    assert (expected - given).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(with_merged(model)(TOKENS), expected, atol=2e-5, rtol=1e-4)

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    places = nested(model)
    for lora in adapted(model).values():
        for adapter in lora.all:
            for letter, ours in (("A", adapter.a.grad), ("B", adapter.b.grad)):
                flat = named.pop(f"base_model.model.{places.get(adapter.source, adapter.source)}.lora_{letter}.weight").grad
                if ours.ndim == 3:
                    ours = ours.flatten(0, 1) if letter == "A" else ours.permute(1, 2, 0).flatten(1)
                assert ours.abs().max() > 1e-3
                torch.testing.assert_close(ours, flat, atol=1e-4, rtol=1e-3)
    assert not named

    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(mixture), peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["v_proj"], target_parameters=[f"experts.{s}" for s in stacks], init_lora_weights=False)).eval()
    made.save_pretrained(tmp_path / "theirs")
    again = pellucid.load(mixture)
    load_adapters(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS), made(TOKENS).logits, atol=2e-5, rtol=1e-4)
    save_adapters(again, tmp_path / "again")
    once_more = pellucid.load(mixture)
    load_adapters(once_more, tmp_path / "again")
    assert torch.equal(once_more(TOKENS), again(TOKENS))


def test_experts_are_shared_copied_and_refused(mixture, folder):
    model = pellucid.load(mixture)
    seen = []
    with events.subscribed(seen.append):
        attach(model, LoraConfig(2, target_parameters=BOTH))
    assert not [e for e in seen if "experts" in getattr(e, "text", "")]  # nothing of theirs is left out
    filled(model)
    plain, merged = without_adapters(model), with_merged(model)
    with torch.no_grad():
        assert torch.equal(plain(TOKENS), pellucid.load(mixture)(TOKENS))
    held = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in held for p in plain.parameters())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("experts" in n for n in trained) == 2 * 2 * 2 and all(".adapters." in n for n in trained)
    with torch.no_grad():
        for lora in adapted(model).values():
            for adapter in lora.all:
                adapter.b.mul_(2)
    merge_into(merged, model)
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), atol=2e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="no stacked matrix"):
        attach(pellucid.load(mixture), LoraConfig(2, target_parameters=("w1",)))
    with pytest.raises(BadInput, match="no experts"):
        attach(pellucid.load(folder), LoraConfig(2, target_parameters=BOTH))
