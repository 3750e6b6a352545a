"""The families with experts beyond what every family is tested for: auxiliary losses, file layouts, rules for layers and windows,
real dimensions, refused configs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import BASE, CASES, IDS, MOE, assert_equal, redrawn, tokens, written
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

import pellucid
from pellucid.data.packing import Packed
from pellucid.errors import BadInput
from pellucid.models import save, spec_of
from pellucid.nn import Routing
from pellucid.nn.experts import balance_loss
from pellucid.ops.balance import switch_loss
from pellucid.train import language_loss

NAMES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return written(request.param, folder), pellucid.load(folder), folder


@pytest.mark.parametrize("padded", [False, True])
def test_auxiliary_loss(pair, padded):
    """All layers in one row; padding is left out where a mask says so."""
    theirs, ours, _ = pair
    x, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    if padded:
        mask[0, :7], mask[2, :1] = 0, 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if padded else {}
    routing = Routing()
    with torch.no_grad():
        want = theirs(input_ids=x, output_router_logits=True, **options).aux_loss
        ours.hidden(x, mask=mask if padded else None, routing=routing)
    assert len(routing.logits) == sum(hasattr(layer.ffn, "router") for layer in ours.layers)
    assert abs(switch_loss(routing.logits, routing.chosen, routing.real).item() - want.item()) < 1e-6 * want.item()
    assert balance_loss(routing).item() == pytest.approx(0.001 * want.item(), rel=1e-6)


def test_training_loss_and_the_routers_gradients(pair):
    """What `train` minimises is the loss of transformers with its balance: a large coefficient makes the gradient show it."""
    theirs, ours, _ = pair
    theirs.router_aux_loss_coef = theirs.config.router_aux_loss_coef = 0.001
    x = tokens(2, 25)
    want = theirs.train()(input_ids=x, labels=x, output_router_logits=True)
    assert want.aux_loss.item() > 1
    routers = {n: p for n, p in theirs.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight"))}
    grads = torch.autograd.grad(want.loss, list(routers.values()))
    theirs.eval()
    labels = torch.cat((x[:, 1:], torch.full((2, 1), -100)), 1)
    rows = Packed(x, labels, torch.arange(25).expand(2, 25), torch.zeros(2, 25, dtype=torch.int64))
    total, count = language_loss(ours.train(), rows)
    assert_equal(total / count, want.loss)
    mine = [p for n, p in ours.named_parameters() if n.endswith("router.weight")]
    for a, b in zip(torch.autograd.grad(total / count, mine), grads, strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()
    ours.eval()


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one file", "shards"])
def test_fused_files(pair, shard, tmp_path):
    """As transformers holds the experts in memory; for Mixtral also under another prefix."""
    theirs, ours, _ = pair
    theirs.save_pretrained(tmp_path, save_original_format=False, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == bool(shard)
    again = pellucid.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_shards(pair, tmp_path):
    """Experts of a layer over several files."""
    theirs, ours, _ = pair
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    again = pellucid.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_a_missing_expert_is_named(tmp_path):
    written("qwen3-moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"missing: model.layers.1.mlp.experts.3.up_proj.weight \(1\)"):
        pellucid.load(tmp_path)


def test_the_file_that_we_write_is_the_original_layout(pair, tmp_path):
    _, ours, folder = pair
    save(ours, tmp_path / "new")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "new"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert spec_of(json.loads((tmp_path / "new" / "config.json").read_text())) == ours.spec


# --- rules ------------------------------------------------------------------------------------------------------------


def fields(config, **more):
    return {**config.to_dict(), **more}


def windows(spec):
    return [layer.mixer.window for layer in spec.layers]


def sparse(spec):
    return [hasattr(layer.ffn, "experts") for layer in spec.layers]


@pytest.mark.parametrize("options", [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}, {"decoder_sparse_step": 3, "mlp_only_layers": [2]}])
@pytest.mark.parametrize("kind", [Qwen2MoeConfig, Qwen3MoeConfig])
def test_which_layers_are_sparse(kind, options):
    config = kind(**{**BASE, **MOE, "num_hidden_layers": 6}, **options)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert sparse(spec_of(fields(config))) == [hasattr(layer.mlp, "experts") for layer in theirs.model.layers]


@pytest.mark.parametrize("used", [True, False])
def test_qwen2_moe_has_windows_in_the_first_layers_every_second(used):
    config = Qwen2MoeConfig(**{**BASE, **MOE, "num_hidden_layers": 6}, use_sliding_window=used, sliding_window=6, max_window_layers=3)
    want = [6 if used and kind == "sliding_attention" else None for kind in config.layer_types]
    assert want == ([6, None, 6, None, None, None] if used else [None] * 6)
    plain = fields(config)
    del plain["layer_types"]
    plain["sliding_window"] = 6  # Hub files give it even where it is not used
    assert windows(spec_of(fields(config))) == windows(spec_of(plain)) == want


def test_qwen3_moe_has_windows_in_all_layers_or_none():
    for used in (True, False):
        config = Qwen3MoeConfig(**BASE, **MOE, use_sliding_window=used, sliding_window=6)
        assert windows(spec_of(fields(config, sliding_window=6))) == [6 if used else None] * 2


def test_both_spellings_of_the_expert_count():
    plain = fields(Qwen3MoeConfig(**BASE, **MOE))
    assert plain.pop("num_local_experts", plain.pop("num_experts", None)) == 6
    assert spec_of({**plain, "num_experts": 6}) == spec_of({**plain, "num_local_experts": 6})


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, GptOssConfig])
def test_what_files_leave_out_is_what_transformers_assumes(kind):
    given = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
             "num_key_value_heads": 2}
    config = kind(**given)
    assert spec_of({**given, "model_type": config.model_type}) == spec_of(fields(config))


@pytest.mark.parametrize(("case", "change", "said"), [
    ("mixtral", {"num_experts_per_tok": 7}, "7 of 6 experts"),
    ("mixtral", {"num_local_experts": "six"}, "num_local_experts is 'six'"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("qwen2-moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
    ("qwen2-moe", {"use_sliding_window": False}, "use_sliding_window is False"),
    ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("gpt-oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("gpt-oss", {"sliding_window": None}, "sliding_window is None"),
    ("gpt-oss", {"swiglu_limit": -1}, "swiglu_limit is -1"),
])
def test_what_cannot_be_is_refused(case, change, said):
    with pytest.raises(BadInput, match=said):
        spec_of({**CASES[case].to_dict(), **change})


# --- real dimensions --------------------------------------------------------------------------------------------------

REAL = {
    "qwen3-30b-a3b": (Qwen3MoeConfig(vocab_size=64, hidden_size=2048, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=32,
                                     num_key_value_heads=4, head_dim=128, num_experts=16, num_experts_per_tok=8, moe_intermediate_size=768,
                                     norm_topk_prob=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **IDS), 8),
    "gpt-oss-20b": (GptOssConfig(vocab_size=64, hidden_size=2880, intermediate_size=2880, num_hidden_layers=1, num_attention_heads=64,
                                 num_key_value_heads=8, num_local_experts=4, num_experts_per_tok=2, **IDS), 5000),
}


@pytest.mark.parametrize("name", REAL)
def test_a_layer_of_real_dimensions_in_bfloat16(name, tmp_path):
    """Equal to the reference in float32, and in bfloat16 as close to it as the reference is; gpt-oss beyond its original context."""
    config, first = REAL[name]
    theirs = redrawn(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"), 0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if p.dim() > 1:
                p.mul_(5 * p.shape[-2 if "experts" in key and "oss" in name else -1] ** -0.5)  # as large as in trained models
    theirs.bfloat16().save_pretrained(tmp_path)
    narrow, wide = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
                    for dtype in (torch.bfloat16, torch.float32))
    at = torch.arange(first, first + 24)[None]
    x = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = wide(input_ids=x, position_ids=at).logits
        assert_equal(pellucid.load(tmp_path)(x, positions=at), want)
        got = pellucid.load(tmp_path, dtype="bfloat16")(x, positions=at)
        usual = narrow(input_ids=x, position_ids=at).logits
    # of the middle token: rounded logits may choose another expert for one or two, and do so here and there
    error, usual = (((t.float() - want).norm(dim=-1) / want.norm(dim=-1)).median() for t in (got, usual))
    assert error < 1.2 * usual and error < 0.03
