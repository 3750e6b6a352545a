"""Qwen v1 against its definition, stated again below in plain torch: transformers has no such model, and its authors' code may not
stand here. What each line says was read off that code (Qwen/Qwen-7B, modeling_qwen.py)."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_checkpoints import assert_equal, tokens

import pellucid
from pellucid.errors import BadInput
from pellucid.models import save
from pellucid.nn import KVCache, count_parameters

CONFIG = {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 96, "hidden_size": 48, "intermediate_size": 160,
          "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 12, "seq_length": 20, "max_position_embeddings": 20,
          "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True,
          "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32"}
VARIANTS = {"as released": {}, "plain": {"use_dynamic_ntk": False, "use_logn_attn": False}, "only ntk": {"use_logn_attn": False},
            "only log-n": {"use_dynamic_ntk": False}, "biases, half rotated": {"no_bias": False, "rotary_pct": 0.5}}


def weights(config):
    g = torch.Generator().manual_seed(3)
    D, I, V = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes = {"transformer.wte.weight": (V, D), "transformer.ln_f.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = {"ln_1.weight": (D,), "ln_2.weight": (D,), "attn.c_attn.weight": (3 * D, D), "attn.c_attn.bias": (3 * D,),
                 "attn.c_proj.weight": (D, D), "mlp.w1.weight": (I, D), "mlp.w2.weight": (I, D), "mlp.c_proj.weight": (D, I)}
        if not config["no_bias"]:
            layer |= {"attn.c_proj.bias": (D,), "mlp.w1.bias": (I,), "mlp.w2.bias": (I,), "mlp.c_proj.bias": (D,)}
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    return {name: (1 if "ln_" in name else 0) + 0.25 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def alpha_of(length, trained):
    """The stretch of the base: 1 up to the trained length, then 3, 7, 15 ... for each doubling."""
    alpha = 1
    while length > trained:
        trained, alpha = 2 * trained, 2 * alpha + 1
    return alpha


def reference(w, config, x, alpha, training=False):
    """Logits (T, V) of one sequence, all at once, in float64; alpha: the stretch (1: none)."""
    w = {name: t.double() for name, t in w.items()}
    T, n, d = len(x), config["seq_length"], config["kv_channels"]
    H, r = config["num_attention_heads"], int(d * config["rotary_pct"])
    base = config["rotary_emb_base"] * (alpha ** (r / (r - 2)) if config["use_dynamic_ntk"] and not training else 1)
    angle = torch.outer(torch.arange(T).double(), base ** (-torch.arange(0, r, 2).double() / r))
    wheel = torch.polar(torch.ones_like(angle), angle)[:, None]  # (T, 1, r / 2)

    def norm(t, scale):
        return t * (t.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]) ** -0.5 * scale

    def linear(t, name):
        return F.linear(t, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def turn(t):  # entry j and entry j + r / 2 are the two coordinates of a point
        point = torch.complex(t[..., : r // 2], t[..., r // 2 : r]) * wheel
        return torch.cat((point.real, point.imag, t[..., r:]), -1)

    h = w["transformer.wte.weight"][x]
    for i in range(config["num_hidden_layers"]):
        at = f"transformer.h.{i}."
        q, k, v = (t.view(T, H, d) for t in linear(norm(h, w[at + "ln_1.weight"]), at + "attn.c_attn").chunk(3, -1))
        q, k = turn(q), turn(k)
        if config["use_logn_attn"] and not training:
            q = q * torch.tensor([math.log(p, n) if p > n else 1.0 for p in range(1, T + 1)])[:, None, None]
        scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        h = h + linear(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(T, -1), at + "attn.c_proj")
        inner = norm(h, w[at + "ln_2.weight"])
        h = h + linear(linear(inner, at + "mlp.w1") * F.silu(linear(inner, at + "mlp.w2")), at + "mlp.c_proj")
    return (norm(h, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T).float()


@pytest.fixture(scope="module", params=VARIANTS)
def opened(request, tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("qwen1"), CONFIG | VARIANTS[request.param]
    w = weights(config)
    (folder / "config.json").write_text(json.dumps(config))
    extra = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}  # old files carry it
    save_file(w | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return pellucid.load(folder), w, config


@pytest.mark.parametrize("length", [1, 19, 20, 21, 40, 41, 70, 100])
def test_logits_at_every_border(opened, length):
    model, w, config = opened
    x = tokens(1, length, seed=length)
    with torch.no_grad():
        assert_equal(model(x)[0], reference(w, config, x[0], alpha_of(length, 20)))


def test_each_row_has_a_stretch_of_its_own(opened):
    model, w, config = opened
    x, mask = tokens(3, 70), torch.ones(3, 70, dtype=torch.int64)
    mask[0, :55], mask[1, :40] = 0, 0  # 15, 30 and 70 tokens: 1, 3 and 7
    with torch.no_grad():
        got = model(x, mask=mask)
        cache = KVCache(model.spec, 3, 80, first=torch.tensor([55, 40, 0]))
        assert_equal(model(x, cache=cache)[mask.bool()], got[mask.bool()])
    for row, start in enumerate((55, 40, 0)):
        assert_equal(got[row, start:], reference(w, config, x[row, start:], alpha_of(70 - start, 20)))


@pytest.mark.parametrize("prompt", [5, 30])
def test_what_follows_keeps_the_stretch_of_the_prompt(opened, prompt):
    """In a batch of two that are prefilled as one and parted later."""
    model, w, config = opened
    x = tokens(2, 90)
    x[1, :prompt] = x[0, :prompt]
    cache = KVCache(model.spec, 1, 90)
    with torch.no_grad():
        first = model(x[:1, :prompt], cache=cache)
        cache.keep(torch.tensor([0, 0]))
        rest = [model(part, cache=cache) for part in x[:, prompt:].split([1] * 20 + [70 - prompt], 1)]
    got = torch.cat((first.expand(2, -1, -1), *rest), 1)
    for row in range(2):
        want = reference(w, config, x[row], alpha_of(prompt, 20))
        assert (got[row] - want).abs().max() < 2e-5 * want.abs().max()  # the reference is in float64, the cache steps are float32


def test_neither_stretch_nor_sharpening_while_training(opened):
    model, w, config = opened
    x = tokens(1, 50)
    model.train()
    with torch.no_grad():
        got = model(x)[0]
    model.eval()
    assert_equal(got, reference(w, config, x[0], 1, training=True))
    if config["use_dynamic_ntk"] or config["use_logn_attn"]:
        assert (model(x)[0] - got).abs().max() > 0.01


def test_back_to_its_files(opened, tmp_path):
    model, w, config = opened
    save(model, tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert set(written) == set(w) and all(torch.equal(written[name], w[name]) for name in w)
    fields = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {name: fields.get(name) for name in CONFIG if name != "torch_dtype"} == {
        name: value for name, value in config.items() if name != "torch_dtype"}
    assert fields["auto_map"]["AutoModelForCausalLM"] == "Qwen/Qwen-7B--modeling_qwen.QWenLMHeadModel"
    again = pellucid.load(tmp_path / "new")
    assert again.spec == model.spec and count_parameters(model.spec) == sum(t.numel() for t in w.values())


def test_qwen_7b():
    """Its config.json's numbers; the model card says 7.7 billion."""
    spec = pellucid.models.spec_of({"model_type": "qwen", "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
                                    "num_attention_heads": 32, "vocab_size": 151936, "seq_length": 8192})
    assert count_parameters(spec) == 7_721_324_544


@pytest.mark.parametrize(("change", "said"), [({"kv_channels": 16}, "4 heads of kv_channels 16 are not hidden_size 48"),
                                              ({"intermediate_size": 161}, "intermediate_size is 161"), ({"rotary_pct": 0.25}, "rotary_pct")])
def test_refused(change, said):
    with pytest.raises(BadInput, match=said):
        pellucid.models.spec_of(CONFIG | change)
