"""The record of a group against the loop's own numbers, recomputed with nothing of the package but its forward pass."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest
import torch
from tiny_policy import Noise, policy, token_logprobs, tokenizer, weights

from pellucid import events
from pellucid.align.inspector import COMPLETIONS, Recorder, side_by_side, sides
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.recording import read_run, recorded
from pellucid.errors import BadInput
from pellucid.optim import OptimConfig, Schedule


def loop_of(**changes) -> OnlineLoop:
    objective = changes.pop("objective", ObjectiveConfig(clip_low=0.05, clip_high=0.05))
    config = OnlineConfig(**{"steps": 2, "prompts": 3, "group": 4, "rounds": 1, "max_tokens": 6, "temperature": 0.9, "evaluations": 0,
                             "samples_shown": 0, "objective": objective, "optim": OptimConfig("adamw", lr=5e-3),
                             "schedule": Schedule("constant", warmup=0.0), **changes})
    return OnlineLoop(policy(), tokenizer(), Noise(), config)


def shown(loop: OnlineLoop) -> list:
    found = []
    with events.subscribed(Recorder(loop)), events.subscribed(lambda e: found.append(e) if e.kind == "group" else None):
        loop.run()
    return found


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_numbers_of_tokens(beta):
    """Log-probability of the sampler, ratio and entropy and KL after the step, clip by the sign of the advantage."""
    loop = loop_of(objective=ObjectiveConfig(clip_low=0.05, clip_high=0.05, beta=beta), steps=1)
    before = policy()
    record = shown(loop)[-1]
    groups, credit = loop.latest[:2]
    assert record.step == 1 and record.kl_to == ("reference" if beta else "sampling policy")
    i = next(n for n, g in enumerate(groups) if g.problem.prompt == record.prompt and set(g.texts) == {c["text"] for c in record.completions})
    some_clipped = False
    for c in record.completions:
        j = next(n for n, s in enumerate(groups[i].samples) if [tokenizer().decode([t]) for t in s.tokens] == c["tokens"])
        sample = groups[i].samples[j]
        old, new = (token_logprobs(m, sample, 0.9).detach() for m in (before, loop.model.eval()))
        torch.testing.assert_close(torch.tensor(c["logp"]), old, atol=2e-4, rtol=0)
        ratio = (new - old).exp()
        torch.testing.assert_close(torch.tensor(c["ratio"]), ratio, atol=5e-4, rtol=1e-3)
        d = old - new
        want = d.exp() - d - 1 if beta else (-d).exp() + d - 1  # k3 of (new || reference = old), or of (old || new)
        torch.testing.assert_close(torch.tensor(c["kl"]), want, atol=2e-4, rtol=1e-2)
        ids = torch.tensor([sample.prompt + sample.tokens])
        logits = loop.model(ids[:, :-1])[0, len(sample.prompt) - 1 :].detach() / 0.9
        p = logits.softmax(-1)
        torch.testing.assert_close(torch.tensor(c["entropy"]), -(p * p.log()).sum(-1), atol=2e-4, rtol=1e-3)
        a = float(credit.advantages[i, j])
        clip = [1.0 if r > 1.05 and a > 0 else -1.0 if r < 0.95 and a < 0 else 0.0 for r in ratio.tolist()]
        assert c["clip"] == clip
        some_clipped |= any(clip)
        assert c["advantages"]["used"] == pytest.approx(a, abs=1e-4) and c["rewards"] == groups[i].rewards[j]
    assert some_clipped and max(abs(v - 1) for c in record.completions for v in c["ratio"]) > 0.01
    totals = [c["total"] for c in record.completions]
    assert totals == sorted(totals, reverse=True)


def test_three_ways_on_the_papers_numbers():
    """Reference document, section 8.4: G = 4, r1 = [1, 0, 1, 0], r2 = [1, 1, 0, 0], and the two prompts of GDPO's equation."""
    parts = {"a": torch.tensor([[1.0, 0, 1, 0]]), "b": torch.tensor([[1.0, 1, 0, 0]])}
    ways = side_by_side(parts, {"a": 1.0, "b": 1.0}, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(ways["grpo"].float(), torch.tensor([[1.2247, 0, 0, -1.2247]]), atol=5e-4, rtol=0)
    torch.testing.assert_close(ways["dr-grpo"].float(), torch.tensor([[1.0, 0, 0, -1]]), atol=1e-6, rtol=0)
    two = {"a": torch.tensor([[0.0, 1], [0, 1]]), "b": torch.tensor([[0.0, 1], [0, 0]])}
    ways = side_by_side(two, None, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(ways["gdpo"].float(), torch.tensor([[-1.0954, 1.0954], [-0.5477, 0.5477]]), atol=5e-4, rtol=0)
    scale = {"correct": torch.tensor([[3.0, -1, 1, -3]]), "format": torch.tensor([[0.0, 1, 0, 1]])}
    ways = side_by_side(scale, None, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(ways["grpo"].float(), torch.tensor([[1.2009, -0.2402, 0.2402, -1.2009]]), atol=5e-4, rtol=0)
    assert ways["gdpo"][0, 1] > ways["gdpo"][0, 0]  # the badly answered, well-formatted one ranks above: users must see this


def test_used_equals_the_way_that_the_run_took():
    record = shown(loop_of(objective=ObjectiveConfig(advantage="gdpo", whiten="sequence"), steps=1))[-1]
    for c in record.completions:
        assert c["advantages"]["used"] == pytest.approx(c["advantages"]["gdpo"], abs=1e-4)
    assert any(abs(c["advantages"]["gdpo"] - c["advantages"]["grpo"]) > 1e-2 for c in record.completions)


def test_a_run_is_the_same_with_the_recorder_and_without():
    one, other = loop_of(steps=3), loop_of(steps=3)
    assert len(shown(one)) == 3
    other.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(one.model), weights(other.model)))
    for (_, a), (_, b) in zip(one.history.metrics, other.history.metrics):
        clock = ("time", "speed", "memory")
        assert {k: repr(v) for k, v in a.items() if not k.startswith(clock)} == {k: repr(v) for k, v in b.items() if not k.startswith(clock)}


def test_bounds():
    """A large group keeps its best and worst; a long run keeps about as many records as asked."""
    record = shown(loop_of(group=COMPLETIONS + 6, steps=1))[-1]
    assert len(record.completions) == COMPLETIONS and record.left_out == 6
    loop = loop_of(steps=9, prompts=1, group=2, max_tokens=2)
    found = []
    with events.subscribed(Recorder(loop, records=3)), events.subscribed(lambda e: found.append(e.step) if e.kind == "group" else None):
        loop.run()
    assert 3 <= len(found) <= 4 and found[0] == 1


def test_sides_of_other_policies():
    ratio, a = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5]), torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0])
    assert sides(ratio, a, ObjectiveConfig()).tolist() == [-1, 0, 1, 0, 0]
    assert sides(ratio, a, ObjectiveConfig(policy="cispo")).tolist() == [-1, 0, 1, -1, 1]
    assert sides(ratio, a, ObjectiveConfig(policy="sapo", clip_low=0.2)).tolist() == [0] * 5


def test_log_schema_and_reading(tmp_path):
    loop = loop_of(steps=3)
    with recorded(tmp_path, loop):
        loop.run()
    run = read_run(tmp_path)
    assert [s["step"] for s in run.steps] == [1, 2, 3] == [g["step"] for g in run.groups]
    for g in run.groups:
        jsonschema.validate(g, events.json_schema())
    assert run.group_at(None)["step"] == 3 and run.group_at(2)["step"] == 2 and run.group_at(99)["step"] == 3


def test_a_run_begun_again_or_resumed_in_the_same_folder(tmp_path):
    step = lambda n: {"kind": "step", "time": 0.0, "stage": "x", "step": n, "progress": n / 9, "eta_seconds": None, "metrics": {}}
    log = [step(1), step(2), {"kind": "evaluation", "time": 0.0, "stage": "x", "name": "pass@1", "value": 0.5, "details": {}}, step(3), step(4),
           step(3), step(4), step(5)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log) + '{"kind": "st')
    run = read_run(tmp_path)
    assert [s["step"] for s in run.steps] == [1, 2, 3, 4, 5] and len(run.evaluations) == 1
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [*log, step(1)]))
    run = read_run(tmp_path)
    assert [s["step"] for s in run.steps] == [1] and run.evaluations == []


def test_refusals(tmp_path):
    with pytest.raises(BadInput, match="no log"):
        read_run(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"kind": "note", "time": 0.0, "text": "x", "level": "info"}\n')
    with pytest.raises(BadInput, match="no step"):
        read_run(tmp_path)
    (tmp_path / "events.jsonl").write_text("nonsense\n" * 3)
    with pytest.raises(BadInput, match="line 1"):
        read_run(tmp_path)


def test_a_group_without_a_token_or_with_one_masked():
    """Given tokens (a tool's answer) have no numbers of their own, and shift none."""
    loop = loop_of(steps=1)
    loop.run()
    groups, credit = loop.latest[:2]
    from pellucid.align.inspector import token_numbers

    g = groups[0]
    whole = token_numbers(loop.model, None, g, credit.advantages[0], loop.config.objective, 0.9)
    j = max(range(4), key=lambda n: len(g.samples[n].tokens))
    mask = [n != 1 for n in range(len(g.samples[j].tokens))]
    masked = replace(g, samples=[*g.samples[:j], replace(g.samples[j], mask=mask), *g.samples[j + 1 :]])
    part = token_numbers(loop.model, None, masked, credit.advantages[0], loop.config.objective, 0.9)
    for name, values in part[j].items():
        assert [v is not None for v in values] == mask, name
        for v, w, on in zip(values, whole[j][name], mask):
            assert not on or v == pytest.approx(w, abs=1e-5)
