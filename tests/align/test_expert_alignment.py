"""Mixtures of experts under every loop: the model's balance losses stand beside any objective as they stand beside the language
loss of `train/` (which its own tests compare with transformers), and routers without a loss follow the load."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_policy import Noise, tokenizer

from pellucid import events
from pellucid.align import ObjectiveConfig, recipe
from pellucid.align.answers import Answer, Flat
from pellucid.align.critic import Critic
from pellucid.align.distill import DistillConfig, DistillLoop
from pellucid.align.offline import Labelled, OfflineConfig, Pair, PreferenceLoop, UnpairedLoop
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.reward_model import ProcessLoop, RewardLoop, RewardModel, Steps
from pellucid.align.unpaired import UnpairedConfig
from pellucid.data.packing import pack_samples
from pellucid.models.lora import LoraConfig, attach
from pellucid.nn import Attn, Decoder, DecoderSpec, Layer, MoE, Rope, init_weights
from pellucid.nn.experts import Router
from pellucid.ops import balance
from pellucid.optim import OptimConfig, Optimizers, Schedule
from pellucid.train import language_loss

EXPERTS = MoE(4, 2, 16, aux_loss=0.3, z_loss=0.05)


def model(moe: MoE = EXPERTS, kind=Decoder) -> Decoder:
    spec = DecoderSpec(vocab=272, dim=32, layers=(Layer(Attn(4, 2, 8, Rope(8)), moe),) * 2, context=64, tied=True)
    made = init_weights(Decoder(spec), 3)
    return made if kind is Decoder else kind.of(made, 1)


def plain(moe: MoE = EXPERTS) -> MoE:
    """The same without any balance."""
    return replace(moe, aux_loss=0.0, z_loss=0.0)


class Kept(Optimizers):
    """Keeps the first gradient; moves nothing."""

    def __init__(self, of):
        super().__init__([torch.optim.SGD(of.parameters(), lr=0.0)])
        self.named, self.gradient = dict(of.named_parameters()), None

    def step(self):
        self.gradient = self.gradient or {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.named.items()}


def gradient(loop):
    loop.stepper.optimizer = kept = Kept(loop.model)
    loop.stepper.clip = None
    loop.step(0.5)
    return kept.gradient


def balance_gradient(rows, count):
    """What train/ adds for these rows: the difference of its loss with and without, by label."""
    grads = []
    for moe in (EXPERTS, plain()):
        one = model(moe).train()
        loss, n = language_loss(one, rows)
        assert n == count
        (loss / n).backward()
        grads.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in one.named_parameters()})
    return {n: grads[0][n] - grads[1][n] for n in grads[0]}


def compare(make, rows, count):
    """make(model) -> loop of one micro-batch."""
    whole, without = gradient(make(EXPERTS)), gradient(make(plain()))
    wanted, some = balance_gradient(rows, count), 0.0
    for n, g in wanted.items():
        torch.testing.assert_close(whole[n] - without[n], g, atol=2e-6, rtol=1e-3, msg=n)
        some = max(some, float(g.abs().max()))
    assert some > 1e-3


def answers():
    tok = tokenizer()
    ask = [tok.encode_chat([{"role": "user", "content": str(i)}, {"role": "assistant", "content": str(i) * (1 + i % 3)}]) for i in range(6)]
    return [Answer(ids[: mask.index(True)], ids[mask.index(True):]) for ids, mask in ask]


SETTINGS = OfflineConfig(steps=1, batch=6, optim=OptimConfig("adamw", lr=1e-3), evaluations=0)


def test_preferences_with_experts():
    a = answers()
    pairs = [Pair(x, Answer(x.prompt, y.tokens)) for x, y in zip(a, a[1:] + a[:1])]
    order = PreferenceLoop(model(), pairs, PreferenceConfig(), SETTINGS).order.next()
    both = [y for i in order for y in (pairs[i].chosen, pairs[i].rejected)]
    flat = Flat(both)
    compare(lambda moe: PreferenceLoop(model(moe), pairs, PreferenceConfig(), SETTINGS), flat.rows, sum(y.trained for y in both))
    flat = Flat([a[i] for i in order])
    labelled = [Labelled(x, i % 2 == 0) for i, x in enumerate(a)]
    compare(lambda moe: UnpairedLoop(model(moe), labelled, UnpairedConfig(loss="apo_zero"), SETTINGS), flat.rows, sum(x.trained for x in a))


@pytest.mark.parametrize("kind", ["pairs", "steps"])
def test_reward_models_with_experts(kind):
    """The coefficient times the balance, whatever the micro-batches: each is a part of the step."""
    a = answers()
    items = [Pair(x, Answer(x.prompt, y.tokens)) for x, y in zip(a, a[1:] + a[:1])] if kind == "pairs" else [
        Steps(x, [len(x.tokens) - 1], [1.0]) for x in a]
    make = RewardLoop if kind == "pairs" else ProcessLoop
    gates = []
    for micro in (None, 2):
        found = [gradient(make(model(moe, RewardModel), items, replace(SETTINGS, micro=micro))) for moe in (EXPERTS, plain())]
        gates.append([(found[0][n] - found[1][n]).flatten() for n in found[0] if n.endswith("router.weight")])
        assert all(float(g.abs().max()) > 1e-3 for g in gates[-1])
        score = found[0]["score.weight"] - found[1]["score.weight"]
        assert float(score.abs().max()) < 1e-6  # the balance has no say in the head
    assert float(torch.nn.functional.cosine_similarity(torch.cat(gates[0]), torch.cat(gates[1]), 0)) > 0.5


def online(moe, **changes):
    fields = dict(steps=1, prompts=4, group=4, max_tokens=6, objective=ObjectiveConfig(), clip=None, evaluations=0, seed=5, rounds=1,
                  schedule=Schedule("constant", warmup=0.0), optim=OptimConfig("adamw", lr=1e-3))
    return OnlineLoop(model(moe), tokenizer(), Noise(), OnlineConfig(**(fields | changes)))


def test_the_online_loop_with_experts():
    seen = []

    def make(moe):
        running = online(moe)
        update = type(running)._one_update

        def noted(batch, *rest):
            seen.append(batch)
            return update(running, batch, *rest)

        running._one_update = noted
        return running

    whole, without = gradient(make(EXPERTS)), gradient(make(plain()))
    rows, count = seen[0].rows, seen[0].counts.tokens
    assert torch.equal(rows.tokens, seen[1].rows.tokens)
    if rows.parents is None:
        wanted = balance_gradient(rows, count)
    else:  # a group's prompt stands once in its row: train/ has no such rows, the routers' decisions are taken from the pass itself
        one = model()
        from pellucid.nn import Routing
        from pellucid.nn.experts import balance_loss

        routing = Routing()
        one.train().hidden(rows.tokens, positions=rows.positions, documents=rows.documents, parents=rows.parents, routing=routing)
        balance_loss(routing).backward()
        wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.named_parameters()}
    for n, g in wanted.items():
        torch.testing.assert_close(whole[n] - without[n], g, atol=2e-6, rtol=1e-3, msg=n)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3


def test_the_critic_has_a_balance_of_its_own(monkeypatch):
    found = {}
    step = Critic.step
    for name, moe in (("with", EXPERTS), ("without", plain())):
        def kept(self, *args, name=name, **how):
            self.stepper.optimizer = found[name] = Kept(self.model)
            return step(self, *args, **how)

        monkeypatch.setattr(Critic, "step", kept)
        online(moe, objective=recipe("ppo")).step(0.5)
    gates = [n for n in found["with"].gradient if n.endswith("router.weight")]
    assert gates and all(float((found["with"].gradient[n] - found["without"].gradient[n]).abs().max()) > 1e-3 for n in gates)


def test_distillation_with_experts():
    rows = pack_samples([(a.prompt + a.tokens, [False] * len(a.prompt) + [True] * len(a.tokens)) for a in answers()], 24)
    config = DistillConfig(steps=1, on_policy=0.0, rows=len(rows), beta=0.0, evaluations=0)
    first = DistillLoop(model(), tokenizer(), model(), tokenizer(), config, data=rows).batches.next()
    compare(lambda moe: DistillLoop(model(moe), tokenizer(), model(plain()), tokenizer(), config, data=rows), first,
            int((first.labels >= 0).sum()))


def test_routers_that_are_balanced_without_a_loss_follow_the_load():
    """As in train/: after the step every bias moves by `bias_speed` towards what its expert lacked in the step's passes."""
    moe = replace(plain(), select_bias=True, score="sigmoid", bias_speed=0.01)
    running, seen = online(moe, updates=1), []
    update = type(running)._one_update

    def noted(batch, *rest):
        seen.append(batch)
        loads = [r.load for r in running.model.modules() if isinstance(r, Router)]
        assert loads == [None, None]  # neither rollouts nor measurements count
        return update(running, batch, *rest)

    running._one_update = noted
    before = model(moe)
    running.step(0.5)
    rows = seen[0].rows
    before.train().hidden(rows.tokens, positions=rows.positions, documents=rows.documents, parents=rows.parents)
    for old, new in zip(before.modules(), running.model.modules()):
        if isinstance(old, Router):
            wanted = balance.updated_bias(old.select_bias, old.load, 0.01)
            assert torch.equal(new.select_bias, wanted) and bool((wanted != 0).any())


def test_what_the_update_cannot_know_is_told():
    seen = []
    with events.subscribed(seen.append):
        online(EXPERTS)
    assert any("experts are chosen anew" in e.text for e in seen if e.kind == "note")


def test_adapters_of_experts_learn_online():
    """The sampler's merged model says what the trainer's adapters say, after every update; the experts' own weights never move."""
    adapting = init_weights(Decoder(replace(model(plain()).spec, family="qwen3_moe")), 3)
    attach(adapting, LoraConfig(2, target_parameters=("gate_up_proj", "down_proj")))
    given = {n: p.detach().clone() for n, p in adapting.named_parameters()}
    config = OnlineConfig(steps=3, prompts=4, group=4, max_tokens=6, objective=recipe("grpo"), evaluations=0, seed=5, rounds=1, updates=2,
                          schedule=Schedule("constant", warmup=0.0), optim=OptimConfig("adamw", lr=0.02))
    loop = OnlineLoop(adapting, tokenizer(), Noise(), config)
    for _, numbers in loop.run().metrics:
        assert numbers["engine/gap_max"] < 1e-3
    moved = {n for n, p in adapting.named_parameters() if not torch.equal(p, given[n])}
    assert {n for n in moved if "experts" in n} and all(".adapters." in n for n in moved)
    assert not torch.equal(loop.plain.layers[0].ffn.experts["down"].weight, given["layers.0.ffn.experts.down.weight"])
