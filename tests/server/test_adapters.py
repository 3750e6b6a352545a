"""LoRA adapters written by PEFT: our logits are PEFT's; requests of several adapters in one batch; loading while the server runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import pellucid
from pellucid.engine.adapters import applied, read_adapter
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.params import SamplingParams
from pellucid.engine.request import Request
from pellucid.errors import BadInput
from pellucid.server import running_server
from pellucid.tokenizers import train_bpe

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ATTENTION, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION},
    "second": {"r": 3, "lora_alpha": 30, "target_modules": ALL, "use_rslora": True, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}}}


def write_adapter(model: Any, folder: Path, **options: Any) -> None:
    """Random ones: PEFT begins with B = 0, which changes nothing."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(len(str(options)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    wrapped.save_pretrained(folder)
    wrapped.unload()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a tiny Qwen3 of transformers; adapters/first, adapters/second, later/third: PEFT's."""
    root = tmp_path_factory.mktemp("lora")
    config = transformers.Qwen3Config(vocab_size=480, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(1)
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(root / "base")
    train_bpe(["one two three four five six seven eight nine ten " * 20, "".join(map(chr, range(32, 700)))], 480).save(root / "base")
    for name, options in ADAPTERS.items():
        write_adapter(model, root / "adapters" / name, **options)
    return root


def reference(folders: Path, name: str, ids: list[int], tokens: int) -> list[int]:
    model = transformers.Qwen3ForCausalLM.from_pretrained(folders / "base")
    if name:
        model = peft.PeftModel.from_pretrained(model, folders / "adapters" / name)
    return model.generate(input_ids=torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids):].tolist()


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_pefts(folders: Path, name: str):
    ids = torch.arange(3, 40)[None]
    wrapped = peft.PeftModel.from_pretrained(transformers.Qwen3ForCausalLM.from_pretrained(folders / "base"), folders / "adapters" / name)
    model = pellucid.load(folders / "base")
    with torch.inference_mode():
        expected, plain = wrapped(input_ids=ids).logits, model(ids)
        with applied(model, read_adapter(folders / "adapters" / name, model)):
            found = model(ids)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (found - plain).abs().max() > 0.1, "the adapter changes something"
        torch.testing.assert_close(model(ids), plain, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_next"])
def test_other_layouts_of_rows(tmp_path: Path, kind: str):
    """GPT-2 keeps matrices transposed and q, k, v in one; Qwen3-Next interleaves queries and gates head by head."""
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64)
        options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    else:
        config = transformers.Qwen3NextConfig(vocab_size=96, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
                                              linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12, linear_conv_kernel_dim=4,
                                              num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=20, intermediate_size=40)
        options = {"target_modules": ["q_proj", "in_proj_qkvz", "out_proj"]}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "base")
    write_adapter(theirs, tmp_path / "adapter", r=4, lora_alpha=8, **options)
    ids = torch.arange(3, 20)[None]
    wrapped = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    model = pellucid.load(tmp_path / "base")
    with torch.inference_mode():
        with applied(model, read_adapter(tmp_path / "adapter", model)):
            torch.testing.assert_close(model(ids), wrapped(input_ids=ids).logits, atol=3e-5, rtol=1e-4)


def test_one_batch_of_several_adapters(folders: Path):
    """Token by token what PEFT gives each alone, with chunks, with the prefix cache, and cached prefixes kept apart."""
    model = pellucid.load(folders / "base")
    adapters = {"": None, **{name: read_adapter(folders / "adapters" / name, model) for name in ADAPTERS}}
    prompts = [list(range(5, 30)), list(range(5, 12)), [9, 8, 7] * 9]
    expected = {(name, i): reference(folders, name, ids, 12) for name in adapters for i, ids in enumerate(prompts)}
    for config in (EngineConfig(), EngineConfig(chunk=7, prefix="radix", cache_tokens=512)):
        engine = Engine(model, config=config)
        for _ in range(2):  # the second time prefixes are found
            requests = {(name, i): Request(list(ids), SamplingParams(max_tokens=12), namespace=name, adapter=adapter)
                        for name, adapter in adapters.items() for i, ids in enumerate(prompts)}
            for request in requests.values():
                engine.add(request)
            while engine.busy:
                engine.step()
            assert {key: r.output for key, r in requests.items()} == expected
        assert engine.totals["hit_tokens"] > 0


@pytest.fixture(scope="module")
def url(folders: Path) -> Iterator[str]:
    with running_server(pellucid.LLM(folders / "base"), "base", adapters=folders / "adapters") as url:
        yield url


def complete(url: str, model: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": model, "prompt": list(range(5, 30)), "max_tokens": 12, "temperature": 0, **more}, timeout=60)


def test_adapters_are_models_of_their_own(url: str, folders: Path):
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [("base", None), ("first", "base"), ("second", "base")]
    tokenizer = pellucid.Tokenizer.load(folders / "base")
    expected = {name: tokenizer.decode(reference(folders, name.replace("base", ""), list(range(5, 30)), 12)) for name in ("base", "first", "second")}
    assert len(set(expected.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda name: complete(url, name, ignore_eos=True).json(), [*expected] * 2))
    assert [a["choices"][0]["text"] for a in answers] == [*expected.values()] * 2 and answers[1]["model"] == "first"


def test_loading_and_unloading_while_it_runs(url: str, folders: Path):
    def post(what: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{url}/v1/{what}_lora_adapter", json=body)

    assert complete(url, "third").status_code == 404
    assert post("load", lora_name="third", lora_path="second").status_code == 200
    assert complete(url, "third").json()["choices"][0]["text"] == complete(url, "second").json()["choices"][0]["text"]
    assert 'adapter="third"' in httpx.get(f"{url}/metrics").text
    assert post("unload", lora_name="third").status_code == 200 and complete(url, "third").status_code == 404
    assert post("load", lora_name="third", lora_path="first").status_code == 200
    assert complete(url, "third").json()["choices"][0]["text"] == complete(url, "first").json()["choices"][0]["text"], "no prefix of the other version is found"
    for what, body, status in (("load", {"lora_name": "third", "lora_path": "first"}, 400), ("load", {"lora_name": "x", "lora_path": "../base"}, 400),
                               ("load", {"lora_name": "x", "lora_path": "/etc"}, 400), ("load", {"lora_name": "x", "lora_path": "nowhere"}, 400),
                               ("load", {"lora_name": "x", "lora_path": "a\0b"}, 400),
                               ("load", {"lora_name": "x", "lora_path": "a" * 3000}, 400), ("unload", {"lora_name": "base"}, 400), ("unload", {"lora_name": "no"}, 404), ("load", {}, 400)):
        answer = post(what, **body)
        assert answer.status_code == status and answer.json()["error"]["message"], (what, body)
    assert "among the adapters" in post("load", lora_name="x", lora_path="../base").json()["error"]["message"], "it is not even read"


def test_no_folder_no_loading(folders: Path):
    with running_server(pellucid.LLM(folders / "base"), "base") as url:
        assert httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(folders / "adapters" / "first")}).status_code == 403


@pytest.mark.parametrize(("change", "says"), [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "no LoRA")])
def test_what_is_refused(folders: Path, tmp_path: Path, change: dict[str, Any], says: str):
    import shutil

    shutil.copytree(folders / "adapters" / "first", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=says):
        read_adapter(tmp_path / "a", pellucid.load(folders / "base"))


def test_an_adapter_of_another_model(folders: Path, tmp_path: Path):
    other = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                                                                   num_key_value_heads=2, head_dim=16))
    write_adapter(other, tmp_path / "other", r=2, target_modules=ATTENTION)
    write_adapter(other, tmp_path / "head", r=2, target_modules=["lm_head"])
    model = pellucid.load(folders / "base")
    with pytest.raises(BadInput, match="model that it was trained on"):
        try:
            read_adapter(tmp_path / "other", model)
        except BadInput as error:
            raise BadInput(str(error)) from error
    with pytest.raises(BadInput, match="does not fit"):
        read_adapter(tmp_path / "head", model)
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(BadInput, match="no readable"):
        read_adapter(tmp_path / "other", model)
