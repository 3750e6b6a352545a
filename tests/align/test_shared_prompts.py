"""A group's prompt computed once: the same log-probabilities, entropies and gradients as with a copy for every completion."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_policy import Noise, policy, tokenizer

from pellucid.align.aggregation import Counts
from pellucid.align.online import OnlineLoop
from pellucid.align.online_config import OnlineConfig
from pellucid.align.recipes import recipe
from pellucid.align.rollout import Group
from pellucid.align.rows import pack_completions
from pellucid.align.update import Experience, Update
from pellucid.data.packing import IGNORE
from pellucid.engine import Sample, SamplingParams
from pellucid.nn import MLA, MLP, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.optim import OptimConfig
from pellucid.tasks import Problem

PROBLEM = Problem("noise", "1", "1", "1")


def sample(rng, prompt, length, masked=False):
    tokens = [rng.randrange(272) for _ in range(length)]
    mask = [i == 0 or rng.random() < 0.6 for i in range(length)] if masked else None
    return Sample(prompt, SamplingParams(), 0, tokens, [-rng.random() for _ in tokens], "stop", mask=mask)


def groups(seed=0, n=5, size=6, masked=False, longest=9, prompts=(1, 12)):
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        prompt = [rng.randrange(272) for _ in range(rng.randrange(*prompts))]
        made.append(Group(PROBLEM, [sample(rng, prompt, rng.randrange(1, longest), masked) for _ in range(size)], [""] * size, [{}] * size))
    return made


def updates(made, chosen=None):
    for share in (False, True):
        x = Experience(made, range(len(made)), share=share)
        yield Update(x, list(range(len(x.samples))) if chosen is None else chosen, Counts(0, 0))


@pytest.mark.parametrize("T", [None, 21, 60, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_every_completion_stands_whole_behind_its_prompt(T, masked):
    samples = [s for g in groups(masked=masked) for s in g.samples]
    packed = pack_completions(samples, T, share=True)
    for i, s in enumerate(samples):
        rows, columns = (packed.documents == i).nonzero(as_tuple=True)
        row = int(rows[0])
        assert (rows == row).all()
        before = []
        if packed.parents is not None and packed.parents[row, columns[0]] >= 0:
            parent = packed.parents[row, columns]
            assert len(parent.unique()) == 1 and parent[0] >= len(samples)
            before = (packed.documents[row] == parent[0]).nonzero().flatten().tolist()
            assert before[-1] < columns[0]
        places = before + columns.tolist()
        assert packed.tokens[row, places].tolist() == (s.prompt + s.tokens)[:-1]
        assert packed.positions[row, places].tolist() == list(range(len(places)))
        wanted = [t if s.mask is None or s.mask[k] else IGNORE for k, t in enumerate(s.tokens)]
        assert packed.labels[row, places].tolist() == [IGNORE] * (len(s.prompt) - 1) + wanted
    assert int((packed.labels != IGNORE).sum()) == sum(s.trained for s in samples)
    assert packed.tokens.numel() <= pack_completions(samples, T).tokens.numel()


def test_how_many_tokens_are_computed():
    rng = random.Random(0)
    made = [sample(rng, list(range(64 * k, 64 * k + 64)), 64) for k in range(4) for _ in range(8)]
    shared, copies = pack_completions(made, share=True), pack_completions(made)
    assert shared.tokens.shape == (4, 63 + 8 * 64) and copies.tokens.numel() == 4 * 8 * 127  # 56 %
    different = pack_completions([sample(rng, [i] * 5, 7) for i in range(6)], share=True)
    assert different.parents is None and different.tokens.numel() == 6 * 11
    lone = pack_completions([sample(rng, [5], 3) for _ in range(3)], share=True)  # a prompt of one token: nothing to share but its place
    assert sorted(lone.labels[lone.labels >= 0].tolist()) and lone.tokens.numel() == 9


SPECS = {"policy": None, "latent attention": DecoderSpec(272, 32, (Layer(MLA(3, 12, 8, 6, 7, Rope(6)), MLP(40)),) * 2, context=64)}


@pytest.mark.parametrize("masked", [False, True], ids=["answers", "dialogues"])
@pytest.mark.parametrize("name", SPECS)
def test_the_same_numbers_and_gradients(name, masked):
    model = policy() if SPECS[name] is None else init_weights(Decoder(SPECS[name]), 0)
    made = groups(masked=masked, longest=40, prompts=(1, 20))
    chosen = [k for k in range(30) if k % 7]  # some were dropped
    found = []
    for update in updates(made, chosen):
        update.experience.advantages = torch.linspace(-2, 2, update.experience.tokens)
        logp, entropy = update.logprobs(model, 32, 0.8, entropy=True)
        for rows in (1, 3, 32):
            model.zero_grad()
            count = 0
            for micro in update.micro(rows):
                logps, H, whose, at = update.forward(model, micro, 0.8, bonus=True)
                ((logps * update.experience.advantages[at]).sum() + 0.3 * H.sum()).backward()
                torch.testing.assert_close(logps, logp[at])
                assert torch.equal(update.experience.sequence[at], torch.tensor(chosen)[whose])
                count += len(at)
            assert count == int((~logp.isnan()).sum())
            found.append((logp, entropy, [p.grad.clone() for p in model.parameters()]))
    logp, entropy, gradients = found[0]
    for other, other_entropy, others in found[1:]:
        torch.testing.assert_close(other, logp, atol=1e-5, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(other_entropy, entropy, atol=1e-5, rtol=1e-5, equal_nan=True)
        for a, b in zip(others, gradients):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_longer_rows_make_smaller_micro_batches():
    plain, shared = updates(groups(n=12, longest=20, prompts=(20, 21)))
    assert shared.rows.tokens.shape[1] > plain.rows.tokens.shape[1] == plain.usual
    for rows in (8, 16, 100):
        parts = list(shared.micro(rows))
        assert sum(len(range(*part.indices(len(shared.rows)))) for part in parts) == len(shared.rows)
        assert max(part.stop - part.start for part in parts) * shared.rows.tokens.shape[1] <= rows * plain.usual
        assert all(part.stop - part.start == min(rows, len(plain.rows)) for part in plain.micro(rows))
    assert all(part.stop - part.start == 1 for part in shared.micro(1))


def test_a_run_is_the_same_with_and_without(monkeypatch):
    config = OnlineConfig(steps=3, prompts=6, group=4, max_tokens=6, evaluations=0, seed=5, updates=2, objective=recipe("grpo", beta=0.1),
                          optim=OptimConfig("adamw", lr=1e-3))
    found = []
    for share in (True, False):
        if not share:
            monkeypatch.setattr(OnlineLoop, "share", False)
        loop = OnlineLoop(policy(), tokenizer(), Noise(), config)
        assert loop.share is share
        history = loop.run()
        found.append((history.metrics, [p.detach().clone() for p in loop.model.parameters()]))
    for (_, one), (_, other) in zip(found[0][0], found[1][0], strict=True):
        for key in ("loss", "ratio/mean", "kl/ref_k3", "entropy/mean", "grad_norm"):
            if key in one:
                assert one[key] == pytest.approx(other[key], abs=1e-4)
    for a, b in zip(*(weights for _, weights in found)):
        assert (a - b).abs().max() < 2e-4  # Adam divides by the root of tiny gradients
