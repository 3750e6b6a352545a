"""Distillation: the loss of a step against trl's on padded logits, estimators against enumeration, students that improve."""

from __future__ import annotations

import copy
import random
from functools import cache

import pytest
import torch
from tiny_policy import SPEC, Echo, policy, tokenizer, weights

from pellucid.align.distill import DistillConfig, DistillLoop, check_vocabularies
from pellucid.align.divergence import sparse_rows
from pellucid.align.rollout import Rollouts
from pellucid.align.rows import pack_completions
from pellucid.data.packing import pack_samples
from pellucid.errors import BadInput
from pellucid.nn import Decoder, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import evaluate
from pellucid.tokenizers import patterns, train_bpe
from pellucid.train import Loop, LoopConfig


def chats(n: int, seed: int, right: float = 1.0) -> list:
    rng, made = random.Random(seed), []
    for _ in range(n):
        digit = str(rng.randrange(10))
        said = digit if rng.random() < right else "".join(rng.choices("0123456789", k=3))
        made.append(tokenizer().encode_chat([{"role": "user", "content": digit}, {"role": "assistant", "content": said}]))
    return made


@cache
def _teacher() -> Decoder:
    model = init_weights(Decoder(SPEC), 1)
    config = LoopConfig(steps=120, rows=16, optim=OptimConfig("muon", lr=0.02, adam_lr=0.01), schedule=Schedule("linear"), evaluations=0)
    Loop(model, pack_samples(chats(400, 1), 48), config).run()
    return model.eval()


def teacher() -> Decoder:
    return copy.deepcopy(_teacher())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loop_of(student: Decoder, data=None, **changes) -> DistillLoop:
    config = DistillConfig(**{"steps": 30, "prompts": 16, "max_tokens": 6, "evaluations": 0, "optim": OptimConfig("adamw", lr=3e-3),
                              "schedule": Schedule("constant", warmup=0.0), **changes})
    return DistillLoop(student, tokenizer(), teacher(), tokenizer(), config, task=Echo(), data=data)


def accuracy(model: Decoder) -> float:
    return evaluate(Echo(), Rollouts(model, tokenizer(), Echo(), max_tokens=6).for_evaluation(0), 10, 1, 1).pass_at_1


def samples_of(model: Decoder):
    problems = [Echo().sample(random.Random(i), "train") for i in range(5)]
    return [s for g in Rollouts(model, tokenizer(), Echo(), max_tokens=5).sample(problems, 2, 1.0, 3) for s in g]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_of_a_step_equal_trls(beta, temperature):
    """The same samples, padded, through GKDTrainer's static loss."""
    student, samples = policy(), samples_of(policy())
    loop = loop_of(student, beta=beta, temperature=temperature)
    rows = pack_completions(samples)
    total = sum(len(s.tokens) for s in samples)
    ours = loop.divergence(rows)[0] / total
    ours.backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()

    T = max(len(s.prompt) + len(s.tokens) for s in samples)
    ids, labels = torch.zeros(len(samples), T, dtype=torch.int64), torch.full((len(samples), T), -100)
    for i, s in enumerate(samples):
        ids[i, : len(s.prompt) + len(s.tokens)] = torch.tensor(s.prompt + s.tokens)
        labels[i, len(s.prompt) : len(s.prompt) + len(s.tokens)] = torch.tensor(s.tokens)
    logits, theirs = student(ids)[:, :-1], teacher()(ids).detach()[:, :-1]
    pytest.importorskip("trl", reason="optional reference: pip install pellucid[parity]")
    from trl.experimental.gkd import GKDTrainer

    # trl takes logits that are aligned with the labels they predict
    want = GKDTrainer.generalized_jsd_loss(logits, theirs, labels[:, 1:], beta, temperature)
    want.backward()
    torch.testing.assert_close(ours, want, atol=2e-6, rtol=2e-5)
    assert max(g.abs().max() for g in got) > 1e-3  # not vacuous
    for a, p in zip(got, student.parameters()):
        torch.testing.assert_close(a, p.grad, atol=2e-6, rtol=2e-4)


def test_top_k_of_everything_is_the_full_divergence_and_less_is_less():
    rows = pack_completions(samples_of(policy()))
    full = loop_of(policy()).divergence(rows)[0]
    every = loop_of(policy(), estimate="top-k", top_k=SPEC.vocab, tail="drop").divergence(rows)[0]
    few = loop_of(policy(), estimate="top-k", top_k=4).divergence(rows)[0]
    torch.testing.assert_close(every, full, atol=1e-3, rtol=1e-4)
    assert 0 < float(few) < float(full)  # a bucket for the rest: a lower bound


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_an_unused_place_counts_for_neither_side(beta, tail):
    """A teacher that tells fewer than K tokens: the rest of its row is -inf, whatever ids stand there."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=g).log_softmax(-1) for _ in range(2))
    ids = torch.tensor([[1, 5, 2], [0, 3, 8], [7, 6, 4], [2, 0, 1]])
    known = teacher.gather(-1, ids)
    want = sparse_rows(student, ids, known, beta=beta, tail=tail)
    more = torch.cat([ids, torch.tensor([[3], [1], [0], [8]])], 1)
    got = sparse_rows(student, more, torch.cat([known, torch.full((4, 1), -torch.inf)], 1), beta=beta, tail=tail)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 0.1


def test_the_sampled_estimate_has_the_gradient_of_the_reverse_kl():
    """Over every token of the vocabulary in one place, weighted by its probability: exactly."""
    student = policy()
    prompt = samples_of(student)[0].prompt
    sample = samples_of(student)[0]

    def rows_of(token: int):
        import dataclasses

        return pack_completions([dataclasses.replace(sample, tokens=[token], logprobs=[0.0], mask=None)])

    logits = student(torch.tensor([prompt]))[0, -1]
    p = logits.softmax(-1).detach()
    sampled = loop_of(student, estimate="sampled")
    student.zero_grad()
    picks = [v for v in range(SPEC.vocab) if p[v] > 1e-9]
    sum(p[v] * sampled.divergence(rows_of(v))[0] for v in picks).backward()
    estimate = [q.grad.clone() for q in student.parameters()]
    student.zero_grad()
    loop_of(student).divergence(rows_of(picks[0]))[0].backward()  # the token does not matter to the whole distribution
    for a, q in zip(estimate, student.parameters()):
        torch.testing.assert_close(a, q.grad, atol=2e-5, rtol=1e-3)
    assert max(a.abs().max() for a in estimate) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"estimate": "top-k", "top_k": 8}, {"beta": 0.5}, {"estimate": "sampled", "prompts": 64, "steps": 200}])
def test_a_student_improves_on_policy(changes):
    assert accuracy(teacher()) == 1.0 and accuracy(policy()) <= 0.2
    student = policy()
    history = loop_of(student, **{"steps": 80, **changes}).run()
    assert accuracy(student) >= 0.8, accuracy(student)
    first, last = history.metrics[0][1], history.metrics[-1][1]
    assert last["divergence"] < 0.5 * first["divergence"] and last["accuracy"] > first["accuracy"] + 0.3


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_student_improves_off_policy_and_mixed(share):
    student = policy()
    history = loop_of(student, data=pack_samples(chats(200, 2), 48), on_policy=share, beta=0.0, steps=30, rows=8).run()
    assert accuracy(student) >= 0.8
    kinds = {m["on_policy"] for _, m in history.metrics}
    assert kinds == ({0.0} if share == 0 else {0.0, 1.0})


def test_micro_batches_change_nothing_and_resume_is_exact(tmp_path):
    data = pack_samples(chats(60, 2), 48)
    one, other = (loop_of(policy(), data, on_policy=0.5, steps=3, micro_rows=m) for m in (64, 1))
    one.run(), other.run()
    for (_, x), (_, y) in zip(one.history.metrics, other.history.metrics, strict=True):  # Adam would not see a factor
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3) and x["divergence"] == pytest.approx(y["divergence"], rel=1e-3)
    for a, b in zip(weights(one.model), weights(other.model)):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)

    def loop(model):
        made = loop_of(model, data, on_policy=0.5, steps=6)
        made.checkpoint = tmp_path / "c"
        return made

    whole = loop(policy())
    whole.run()
    first = loop(policy())
    first.budget.start()
    for _ in range(3):
        first._one_step()
    first.save()
    again = loop(policy())
    assert again.resume()
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(again.model)))


def test_matrices_that_are_padded_otherwise_are_no_other_vocabulary():
    """Two models of a family often differ in the rows of their heads beyond the tokens that exist."""
    from dataclasses import replace

    big = init_weights(Decoder(replace(SPEC, vocab=SPEC.vocab + 16)), 1)
    rows = pack_completions(samples_of(policy()))
    loop = DistillLoop(policy(), tokenizer(), big, tokenizer(), DistillConfig(steps=1), task=Echo())
    assert loop.vocab == SPEC.vocab and bool(loop.divergence(rows)[0].isfinite())


def test_refusals():
    other = train_bpe(["entirely different words make other tokens"] * 4, SPEC.vocab, patterns.QWEN_PATTERN)
    small = train_bpe(["user\nassistant"] * 4, SPEC.vocab - 3, patterns.QWEN_PATTERN)
    check_vocabularies(tokenizer(), tokenizer())
    with pytest.raises(BadInput, match=r"token [0-9]+ is"):
        check_vocabularies(tokenizer(), other)
    with pytest.raises(BadInput, match="differ in vocabulary"):
        check_vocabularies(tokenizer(), small)
    with pytest.raises(BadInput, match="differ in vocabulary"):
        DistillLoop(policy(), tokenizer(), teacher(), other, DistillConfig(steps=1), task=Echo())
    with pytest.raises(BadInput, match="no problems"):
        DistillLoop(policy(), tokenizer(), teacher(), tokenizer(), DistillConfig(steps=1))
    with pytest.raises(BadInput, match="given text"):
        DistillLoop(policy(), tokenizer(), teacher(), tokenizer(), DistillConfig(steps=1, on_policy=0.5), task=Echo())
    for wrong in ({"estimate": "sampled", "beta": 0.0}, {"beta": 2.0}, {"on_policy": -0.1}, {"top_k": 0}, {"estimate": "half"}):
        with pytest.raises(BadInput):
            DistillConfig(steps=1, **wrong)
