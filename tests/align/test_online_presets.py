"""Every published objective through the whole loop: it runs, does not depend on how a step is cut, resumes, and repeats itself."""

from __future__ import annotations

import copy
import fnmatch
import math
import random
from dataclasses import replace

import pytest
import torch
from test_online import PLAIN, Recorder, config, interrupted_at, learned, loop
from tiny_policy import Echo, Noise, policy, weights

from pellucid.align import RECIPES, ObjectiveConfig, recipe
from pellucid.align.aggregation import Counts
from pellucid.align.metrics import LOOP_MEANING, MEANING
from pellucid.align.reward_model import RewardModel
from pellucid.align.update import Update
from pellucid.errors import BadInput
from pellucid.models.lora import LoraConfig, attach, without_adapters
from pellucid.optim import OptimConfig

PPO = recipe("ppo")
ALL = ObjectiveConfig(advantage="gae", whiten="token", reward_beta=0.05, beta=0.02, kl="k2", entropy_coef=0.01, entropy_target=4.0,
                      high_entropy=0.6, correction="truncate", off_policy=0.3, kl_target=0.1, kl_horizon=50, clip_low=0.05,
                      clip_high=0.05, truncated="mask", aggregation="token-mean")
"""Nearly every choice at once."""


def named(name):
    return recipe(name, **({"max_tokens": 6} if name == "dr-grpo" else {}))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_runs(name):
    cfg = named(name)
    running = loop(config(objective=cfg, epochs=2, updates=2, clip=1.0))
    before = weights(running.model)
    metrics = [m for _, m in running.run().metrics]
    assert not equal(before, weights(running.model)) and running.stepper.skipped == 0
    for numbers in metrics:
        known = [k for k in numbers if not any(fnmatch.fnmatch(k, p) for p in (*MEANING, *LOOP_MEANING))]
        assert not known, known
        assert all(math.isfinite(numbers[k]) for k in ("grad_norm", "ratio/mean", "entropy/mean", "advantage/token_abs"))
        assert numbers["grad_norm"] > 1e-4 and numbers["advantage/token_abs"] > 1e-3
    assert metrics[0]["ratio/max"] > 1.0 + 1e-6  # the second update is off-policy
    assert ("critic/explained" in metrics[0]) == (cfg.advantage == "gae")
    assert ("kl/ref_k1" in metrics[0]) == cfg.needs_reference


CUT = {
    "grpo with kl": replace(PLAIN, beta=0.1), "ppo": PPO, "everything": ALL, "rloo": named("rloo"), "reinforce++": named("reinforce++"),
    "gspo": recipe("gspo", clip_low=0.3, clip_high=0.4), "gdpo": named("gdpo"), "dapo": named("dapo"), "dr-grpo": named("dr-grpo"),
    "entropy": replace(PLAIN, entropy_coef=0.1), "token mean": replace(PLAIN, aggregation="token-mean", dead_groups="keep"),
}


@pytest.mark.parametrize("name", CUT)
def test_micro_batches_change_nothing(name):
    """Gradient of every optimizer step and weights after four of them, policy's and critic's, for rows one by one, three by
    three, and all together."""
    found = []
    for rows in (1, 3, 1000):
        running = loop(config(objective=CUT[name], epochs=2, updates=2, micro_rows=rows), lr=0.5)
        if running.critic is not None:
            running.critic.stepper.optimizer = Recorder(running.critic.model, 0.5)
        if running.reference is not None:
            with torch.no_grad():
                running.reference.head_weight.mul_(1.2)
        numbers = learned(running, running.sampling.collect().groups)
        critic = [] if running.critic is None else [*running.critic.stepper.optimizer.gradients, weights(running.critic.model)]
        found.append(([*running.stepper.optimizer.gradients, weights(running.model), *critic], numbers))
    (first, table), *others = found
    assert max(float(g.abs().max()) for g in first[0]) > 1e-3 and len(first) >= 5
    for tensors, numbers in others:
        for mine, theirs in zip(first, tensors, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
        assert numbers == pytest.approx(table, abs=2e-5, rel=1e-3, nan_ok=True)


def test_the_order_of_groups_and_of_their_completions_changes_nothing():
    """One update over a rollout in two orders: the same weights and numbers."""
    found = []
    for shuffle in (False, True):
        running = loop(config(objective=replace(ALL, high_entropy=1.0)), lr=0.5)
        running.critic.stepper.optimizer = Recorder(running.critic.model, 0.5)
        groups = running.sampling.collect().groups
        if shuffle:
            for g in groups:
                order = random.Random(1).sample(range(4), 4)
                g.samples, g.texts, g.rewards = ([part[i] for i in order] for part in (g.samples, g.texts, g.rewards))
            random.Random(2).shuffle(groups)
        found.append((learned(running, groups), weights(running.model) + weights(running.critic.model)))
    (one, a), (two, b) = found
    assert one == pytest.approx(two, abs=2e-5, rel=1e-3, nan_ok=True)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-4)


RESUMED = {
    "ppo": config(objective=PPO, epochs=2, updates=2, steps=4, clip=1.0),
    "everything, one step off": config(objective=ALL, lag=1, updates=2, steps=4, clip=1.0),
    "two steps off": config(objective=replace(PLAIN, correction="mask"), lag=2, steps=5),
    "top-p": config(objective=PLAIN, top_p=0.8, lag=1, steps=4),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_stops_goes_on_bit_for_bit(name, tmp_path):
    """Critic, controllers, and rollouts that wait to be learned from included; and a second run is the first one again."""
    cfg = RESUMED[name]
    straight, again = loop(cfg), loop(cfg)
    history = straight.run()
    again.run()
    broken = loop(cfg, checkpoint=tmp_path / "state")
    for step in (1, 3):
        interrupted_at(step, broken)
        broken = loop(cfg, checkpoint=tmp_path / "state")
        assert broken.resume()
    after = broken.run()
    for other in (again, broken):
        assert equal(weights(straight.model), weights(other.model))
        assert (straight.beta, straight.reward_beta, straight.bonus) == (other.beta, other.reward_beta, other.bonus)
        if straight.critic is not None:
            assert equal(weights(straight.critic.model), weights(other.critic.model))
    assert history.sampled == after.sampled
    if name.startswith("everything"):
        assert straight.reward_beta.value != ALL.reward_beta and straight.bonus.value != ALL.entropy_coef


def test_pending_rollouts_of_another_task_are_refused(tmp_path):
    cfg = config(objective=PLAIN, lag=1, steps=4)
    interrupted_at(1, loop(cfg, checkpoint=tmp_path / "state"))
    with pytest.raises(BadInput, match="other problems"):
        loop(cfg, task=Noise(digits="789"), checkpoint=tmp_path / "state").resume()


# --- one step off -----------------------------------------------------------------------------------------------------


def test_one_step_off_learns_from_samples_of_older_weights():
    """The samples of step 2 are those that the weights before step 1 give, and the ratio compares with their sampler."""
    cfg = config(objective=replace(PLAIN, dead_groups="keep"), lag=1, steps=3, optim=OptimConfig("adamw", lr=0.01))
    running = loop(cfg)
    start = copy.deepcopy(running.model)
    running.step(0.0)
    (waiting,) = running.sampling.ahead
    fresh = loop(cfg, model=start)
    fresh.sampling.collect()
    groups = fresh.sampling.collect().groups  # the second rollout, with the weights as given
    assert [[s.tokens for s in g.samples] for g in groups] == [[s.tokens for s in g.samples] for g in waiting.groups]
    numbers = running.step(0.4)
    assert numbers["ratio/max"] > 1.01 and numbers["kl/old_k3"] > 1e-4
    x = running.latest[2]
    assert x.old is x.sampler
    running.step(0.7)
    assert not running.sampling.ahead  # nothing is sampled ahead that the run will not learn from


def test_a_correction_stands_between_the_sampler_and_the_weights_of_the_step():
    cfg = config(objective=replace(PLAIN, dead_groups="keep", correction="truncate", correction_high=10.0), lag=1, steps=3, updates=2,
                 optim=OptimConfig("adamw", lr=0.01))
    running = loop(cfg)
    first = running.step(0.0)
    assert first["correction/mean"] == pytest.approx(1.0, abs=1e-4) == first["correction/ess/to_64"]
    before = copy.deepcopy(running.model)
    second = running.step(0.4)
    x = running.latest[2]
    assert abs(second["correction/mean"] - 1) > 1e-4 and second["correction/ess/to_64"] < 1 - 1e-4 and second["engine/gap_mean"] > 1e-3
    (proximal,) = Update(x, range(len(x.samples)), Counts(0, 0)).logprobs(before, 32, 1.0)
    torch.testing.assert_close(x.old, proximal, atol=1e-5, rtol=0)


# --- sampling from a part of the vocabulary ---------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [dict(top_p=0.8), dict(top_k=5), dict(top_k=8, top_p=0.7)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratios_are_exact_where_the_sampler_truncates(limits, temperature):
    """Trainer against sampler, over what could be drawn: the same numbers. Over the whole vocabulary they are not (the bias
    of the kept mass), and after an update the two ratios are those of the two distributions."""
    running = loop(config(temperature=temperature, updates=2, **limits), lr=0.3)
    groups = running.sampling.collect().groups
    x, credit = running._judge(groups, running.resolved())
    assert x.support is not None and len(x.support) == x.tokens
    assert (x.old - x.sampler).abs().max() < 1e-4
    kept, x.support = x.support, None
    (whole,) = Update(x, range(len(x.samples)), Counts(0, 0)).logprobs(running.model, 32, temperature)
    assert float((whole - x.sampler).exp().mean()) < 0.95
    x.support = kept
    numbers = running._update(x, credit, running.resolved(), 0.5)
    assert numbers["engine/gap_max"] < 1e-4 and numbers["ratio/max"] > 1.001
    sizes = kept.starts.diff()
    assert (sizes <= limits.get("top_k", 272)).all() and (sizes >= 1).all() and (sizes > 1).any()


# --- coefficients that follow a measurement ---------------------------------------------------------------------------


def test_adaptive_kl_and_entropy_act_in_the_next_step():
    cfg = config(objective=replace(PLAIN, beta=0.1, kl_target=1e-6, kl_horizon=20, entropy_coef=0.01, entropy_target=50.0), steps=3,
                 optim=OptimConfig("adamw", lr=0.02))
    running = loop(cfg)
    tables = [m for _, m in running.run().metrics]
    assert tables[0]["entropy/coefficient"] == 0.0 and tables[1]["entropy/coefficient"] == pytest.approx(0.015)
    assert tables[0]["kl/coefficient"] == 0.1
    # At first the policy is its reference and the weight falls; then it is far above the target, and the weight rises.
    assert running.beta.value > tables[2]["kl/coefficient"] > tables[1]["kl/coefficient"] < 0.1
    assert running.resolved().beta == running.beta.value


def test_an_entropy_bonus_keeps_the_entropy_up():
    after = {}
    for coefficient in (0.0, 1.0):
        running = loop(config(objective=replace(PLAIN, entropy_coef=coefficient), steps=12, optim=OptimConfig("adamw", lr=0.01)))
        after[coefficient] = [m["entropy/mean"] for _, m in running.run().metrics][-1]
    assert after[1.0] > after[0.0] + 0.3


def test_high_entropy_tokens_are_those_of_the_whole_rollout():
    running = loop(config(objective=replace(PLAIN, dead_groups="keep", high_entropy=0.25)))
    x, credit = running._judge(running.sampling.collect().groups, running.resolved())
    (entropy,) = x.entropy
    assert 0.2 < float(x.keep.float().mean()) < 0.3
    assert float(entropy[x.keep].min()) >= float(entropy[~x.keep].max())
    numbers = running._update(x, credit, running.resolved(), 0.5)
    assert numbers["correction/dropped"] == pytest.approx(1 - float(x.keep.float().mean()), abs=1e-6)


# --- the critic -------------------------------------------------------------------------------------------------------


class Parity(Echo):
    """The prompt alone decides what any answer earns."""

    def grade(self, problem, completion):
        return {"format": 0.0, "correct": float(int(problem.answer) % 2)}


def test_the_critic_learns_and_starts_from_what_it_is_given():
    """Values are 0 before anything is known; training explains the returns; a reward model's scores are where another starts."""
    cfg = config(objective=replace(PPO, lam=1.0), steps=20, prompts=12, epochs=2, optim=OptimConfig("adamw", lr=1e-5),
                 critic=OptimConfig("adamw", lr=0.01))
    running = loop(cfg, task=Parity())
    tables = [m for _, m in running.run().metrics]
    assert tables[0]["critic/value"] == pytest.approx(0, abs=0.2)
    explained = [m["critic/explained"] for m in tables]
    assert sum(explained[-5:]) / 5 > 0.7 > 0.3 > explained[0]
    assert running.critic.model.embed.weight is not running.model.embed.weight
    judge = RewardModel.of(policy(), seed=3)
    other = loop(cfg, critic=judge)
    x, _ = other._judge(other.sampling.collect().groups, other.resolved())
    assert other.critic.model is judge and float(x.values.abs().mean()) > 0.05


def test_values_are_read_before_their_token():
    """Changing a token changes the values behind it only."""
    running = loop(config(objective=PPO), critic=RewardModel.of(policy(), seed=1))
    groups = running.sampling.collect().groups
    place, s = next((k, s) for g in groups for k, s in enumerate(g.samples) if len(s.tokens) >= 3)
    group = next(g for g in groups if any(t is s for t in g.samples))
    x = running._judge([group], running.resolved())[0]
    before = x.values[x.sequence == x.number[0, place]].clone()
    s.tokens[1] = (s.tokens[1] + 1) % 200
    x = running._judge([group], running.resolved())[0]
    after = x.values[x.sequence == x.number[0, place]]
    assert torch.equal(before[:2], after[:2]) or (before[:2] - after[:2]).abs().max() < 1e-6
    assert (before[2:] - after[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [
    dict(epochs=0), dict(lag=-1), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=0), dict(critic=OptimConfig("adamw")),
    dict(lag=1, objective=ObjectiveConfig(policy="reinforce")), dict(group=0, objective=PPO)], ids=str)
def test_impossible_settings_are_refused_before_work(wrong):
    with pytest.raises(BadInput):
        loop(config(**wrong))


def test_token_objectives_need_no_group():
    for name in ("ppo", "reinforce++"):
        running = loop(config(objective=named(name), group=1, prompts=12, steps=2))
        before = weights(running.model)
        numbers = running.run().metrics[-1][1]
        assert not equal(before, weights(running.model)) and math.isnan(numbers["reward/total/informative"])


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapting(seed=0):
    model = policy()
    attach(model, LoraConfig(rank=4), seed)
    return model


def test_with_adapters_the_reference_is_the_model_without_them():
    """The same numbers as with a frozen copy, and no second model in memory; the given weights never move."""
    model = adapting()
    given = weights(without_adapters(model))
    running = loop(config(objective=replace(PLAIN, beta=0.1), steps=3, optim=OptimConfig("adamw", lr=0.02)), model=model)
    held = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in held for p in running.reference.parameters())
    kl = [m["kl/ref_k3"] for _, m in running.run().metrics]
    assert kl[0] < 1e-9 and kl[2] > 1e-5
    assert equal(given, weights(without_adapters(model))) and not equal(given, weights(running.plain))
    x, _ = running._judge(running.sampling.collect().groups, running.resolved())
    (frozen,) = Update(x, range(len(x.samples)), Counts(0, 0)).logprobs(policy(), 32, 1.0)
    kept = ~x.ref.isnan()
    torch.testing.assert_close(x.ref[kept], frozen[kept], atol=1e-6, rtol=0)


def test_a_run_with_adapters_samples_from_what_it_learned_and_resumes(tmp_path):
    """Sampler and trainer agree after every update, and a stopped run goes on bit for bit; only adapters are saved."""
    cfg = config(objective=replace(PPO, reward_beta=0.1), steps=4, updates=2, optim=OptimConfig("adamw", lr=0.02))
    straight = loop(cfg, model=adapting())
    for _, numbers in straight.run().metrics:
        assert numbers["engine/gap_max"] < 1e-4
    broken = loop(cfg, model=adapting(), checkpoint=tmp_path / "state")
    interrupted_at(2, broken)
    assert (tmp_path / "state" / "adapter_model.safetensors").exists() and not (tmp_path / "state" / "model.safetensors").exists()
    broken = loop(cfg, model=adapting(seed=5), checkpoint=tmp_path / "state")
    assert broken.resume()
    broken.run()
    assert equal(weights(straight.model), weights(broken.model)) and equal(weights(straight.plain), weights(broken.plain))
