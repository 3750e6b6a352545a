"""Training a mixture of experts: what the loss adds, what micro-batches make of it, the bias that follows the load, Muon on experts."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_training import SPEC, rows

from pellucid.__main__ import main
from pellucid.models import load, save
from pellucid.nn import MLA, Decoder, DecoderSpec, Layer, MoE, Rope, Routing, init_weights
from pellucid.nn.experts import balance_loss
from pellucid.ops import balance
from pellucid.optim import OptimConfig, Schedule, build_optimizer
from pellucid.optim.muon import orthogonalize
from pellucid.tokenizers import train_bpe
from pellucid.train import held_out_loss, language_loss
from pellucid.train.loss import share_of
from pellucid.train.step import Stepper

MIXTURE = MoE(6, 2, 16, renormalize=True, aux_loss=0.1)


def model(moe: MoE = MIXTURE) -> Decoder:
    """The first layer is dense, the others have experts."""
    layers = (SPEC.layers[0], *(Layer(SPEC.layers[0].mixer, moe),) * 2)
    return init_weights(Decoder(replace(SPEC, layers=layers))).train()


def test_training_adds_the_balance_of_real_tokens_and_evaluation_does_not():
    ours, data = model(), rows()
    routing = Routing()
    ours.hidden(data.tokens, positions=data.positions, documents=data.documents, routing=routing)
    real = (data.documents >= 0).flatten()
    assert 0 < real.sum() < real.numel()  # there is padding
    want = 0.1 * balance.switch_loss(routing.logits, routing.chosen, real)
    assert len(routing.logits) == 2
    torch.testing.assert_close(balance_loss(routing), want)
    total, count = language_loss(ours, data)
    plain, _ = language_loss(ours.eval(), data)
    torch.testing.assert_close(total, plain + count * want)
    ours.train()
    assert held_out_loss(ours, data)[0] == pytest.approx(plain.item(), rel=1e-5) and ours.training


def test_without_weights_nothing_is_collected():
    ours, data = model(replace(MIXTURE, aux_loss=0.0)), rows()
    torch.testing.assert_close(language_loss(ours, data)[0], language_loss(ours.eval(), data)[0])


def test_micro_batches_weigh_their_balance_by_their_labels():
    ours, data = model(), rows()
    parts = [data.rows(slice(0, 2)), data.rows(slice(2, 3)), data.rows(slice(3, len(data)))]
    total = int((data.labels >= 0).sum())
    share = share_of(ours, total)
    sums, counts = zip(*(language_loss(ours, part) for part in parts), strict=True)
    torch.testing.assert_close(sum(share(part) for part in parts), sum(sums) / total)
    assert sum(counts) == total
    ours.eval()
    plain = sum(language_loss(ours, part)[0] for part in parts) / total
    added = [(s / n - language_loss(ours, part)[0] / n) * n / total for s, n, part in zip(sums, counts, parts, strict=True)]
    torch.testing.assert_close(sum(sums) / total, plain + sum(added))


def test_the_balance_loss_evens_out_the_load():
    """Routers that send much to one expert; after steps on the balance loss alone they do not."""
    ours, data = model(replace(MIXTURE, aux_loss=1.0)), rows(40)
    with torch.no_grad():
        for layer in ours.layers[1:]:
            mean = ours.embed(data.tokens).mean((0, 1))
            layer.ffn.router.weight[0] += 2 * mean / mean.norm()
    optimizer = torch.optim.Adam([layer.ffn.router.weight for layer in ours.layers[1:]], lr=0.01)

    def routed() -> Routing:
        routing = Routing()
        ours.hidden(data.tokens, positions=data.positions, documents=data.documents, routing=routing)
        return routing

    def worst(routing: Routing) -> float:
        """The largest load, over all layers as the loss sees them, in shares of an even one."""
        load = sum(balance.load(chosen, 6, routing.real) for chosen in routing.chosen)
        return (load.max() / load.mean()).item()

    before = worst(routed())
    for _ in range(80):
        optimizer.zero_grad()
        balance_loss(routed()).backward()
        optimizer.step()
    assert before > 1.2 and worst(routed()) < 1.06


def stepper(ours: Decoder, lr: float = 0.01) -> Stepper:
    return Stepper(ours, build_optimizer(ours, OptimConfig("adamw", lr=lr)), Schedule())


FREE = MoE(6, 2, 16, score="sigmoid", renormalize=True, select_bias=True, bias_speed=0.01)


@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 3, 8]], ids=["whole", "micro-batches"])
def test_after_a_step_the_bias_follows_the_load_of_all_its_micro_batches(cuts):
    ours, data = model(FREE), rows()
    cuts = [min(c, len(data)) for c in cuts]
    routing = Routing()
    ours.hidden(data.tokens, positions=data.positions, documents=data.documents, routing=routing)
    want = [balance.updated_bias(torch.zeros(6), balance.load(chosen, 6, routing.real), 0.01) for chosen in routing.chosen]
    for layer in ours.layers[1:]:
        layer.ffn.router.load = None  # of the pass above
    total = int((data.labels >= 0).sum())
    micro = [data.rows(slice(a, b)) for a, b in pairwise(cuts)]
    stepper(ours).step(micro, share_of(ours, total), 0.0)
    for layer, bias in zip(ours.layers[1:], want, strict=True):
        assert torch.equal(layer.ffn.router.select_bias, bias) and bias.abs().max() > 0
        assert layer.ffn.router.load is None


def test_a_skipped_step_moves_no_bias_and_forgets_its_load():
    ours, data = model(FREE), rows()
    result = stepper(ours).step([data], lambda part: language_loss(ours, part)[0] * float("nan"), 0.0)
    assert result.skipped
    for layer in ours.layers[1:]:
        assert layer.ffn.router.select_bias.eq(0).all() and layer.ffn.router.load is None


def test_the_bias_is_in_no_optimizer():
    ours = model(FREE)
    for name in ("adamw", "muon"):
        taken = {id(p) for o in build_optimizer(ours, OptimConfig(name)).optimizers for g in o.param_groups for p in g["params"]}
        assert not taken & {id(p) for n, p in ours.named_parameters() if "select_bias" in n}


def test_muon_takes_each_matrix_of_each_expert():
    ours = model(replace(MIXTURE, expert_bias=True, router_bias=True))
    optimizer = build_optimizer(ours, OptimConfig("muon", lr=0.1))
    muon = {id(p): parts for g in optimizer.optimizers[0].param_groups for p, parts in zip(g["params"], g["parts"], strict=True)}
    experts = ours.layers[1].ffn.experts
    assert muon[id(experts["gate_up"].weight)] == (16, 16) and muon[id(experts["down"].weight)] == (32,)
    assert not any(id(p) in muon for n, p in ours.named_parameters() if n.endswith("bias"))
    before = experts["gate_up"].weight.detach().clone()
    language_loss(ours, rows())[0].backward()
    grad = experts["gate_up"].weight.grad.clone()
    optimizer.step()
    moved = before - experts["gate_up"].weight.detach()
    for e in (0, 5):
        for part in (slice(0, 16), slice(16, 32)):  # the first step of the momentum points along the gradient
            want = 0.1 * orthogonalize(grad[e, part])
            torch.testing.assert_close(moved[e, part], want, atol=2e-3, rtol=0)
    adam = build_optimizer(ours, OptimConfig("adamw", weight_decay=0.1)).optimizers[0]
    decayed = {id(p) for g in adam.param_groups if g["weight_decay"] for p in g["params"]}
    assert id(experts["gate_up"].weight) in decayed and id(experts["gate_up"].bias) not in decayed


# --- pellucid train -----------------------------------------------------------------------------------------------------


def pretrained(tmp_path, capsys, name: str, spec) -> tuple[float, Decoder]:
    """The first loss that `pellucid train pretrain` tells of a new model of that spec, and the model after two steps."""
    folder, corpus = tmp_path / name, tmp_path / "text.txt"
    corpus.write_text("\n\n".join(f"one two three {i} four five six" for i in range(200)))
    save(init_weights(Decoder(spec)), folder, tokenizer=train_bpe(["one two three four five six " * 40], spec.vocab))
    code = main(["train", "pretrain", str(folder), str(corpus), "--steps", "2", "--lr", "0.001", "--rows", "2", "--length", "64",
                 "--dtype", "float32", "--micro-rows", "1", "--out", str(tmp_path / f"{name}-run"), "--threads", "1", "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    losses = [e["metrics"]["loss"] for e in told if e["kind"] == "step"]
    return losses[0], load(tmp_path / f"{name}-run" / "model")


def test_pretraining_uses_the_coefficient_of_the_checkpoint(tmp_path, capsys):
    """The balance loss of two experts a token is 2 at least."""
    moe = replace(MIXTURE, aux_loss=0.0)
    spec = replace(model(moe).spec, vocab=380, family="qwen3_moe")
    plain, _ = pretrained(tmp_path, capsys, "plain", spec)
    layers = tuple(replace(layer, ffn=replace(layer.ffn, aux_loss=0.5)) if isinstance(layer.ffn, MoE) else layer for layer in spec.layers)
    balanced, after = pretrained(tmp_path, capsys, "balanced", replace(spec, layers=layers))
    assert 0.99 < balanced - plain < 1.5
    assert after.spec.layers[1].ffn.aux_loss == 0.5


def test_pretraining_moves_the_selection_bias(tmp_path, capsys):
    mla = MLA(4, None, 16, 8, 8, Rope(8, interleaved=True))
    moe = MoE(6, 2, 16, score="sigmoid", renormalize=True, select_bias=True, wide_router=True, group_score="top2", shared=16)
    spec = DecoderSpec(380, 32, (Layer(mla, SPEC.layers[0].ffn), Layer(mla, moe)), context=64, family="deepseek_v3")
    _, after = pretrained(tmp_path, capsys, "v3", spec)
    bias = after.layers[1].ffn.router.select_bias
    assert after.spec.layers[1].ffn == moe and bias.abs().max() > 0
    assert set((bias * 1000).round().abs().int().tolist()) <= {0, 1, 2}  # two steps of 0.001
