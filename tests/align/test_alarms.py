"""Every alarm with numbers that raise it and numbers that do not; reward hacking in a run that really hacks its reward."""

from __future__ import annotations

import copy
import json
import random
from functools import cache

import jsonschema
import pytest
import torch
from tiny_policy import SPEC, policy, tokenizer

from pellucid import events
from pellucid.align.alarms import RULES, WINDOW, Alarm, Alarms, in_both_languages, replay
from pellucid.align.answers import Answer
from pellucid.align.objective_config import ObjectiveConfig
from pellucid.align.offline import OfflineConfig, Pair, PreferenceLoop
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.recording import recorded
from pellucid.data.packing import pack_samples
from pellucid.messages import CATALOGUE, set_language
from pellucid.nn import Decoder, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Hackable, HackableDials
from pellucid.train import Loop, LoopConfig

N = 30


def line(a: float, b: float, noise: float = 0.0) -> list[float]:
    rng = random.Random(0)
    return [a + (b - a) * i / (N - 1) + rng.gauss(0, noise) for i in range(N)]


def flat(value: float, noise: float = 0.0) -> list[float]:
    return line(value, value, noise)


def raised(curves: dict[str, list[float]], weights: dict[str, float] | None = None, evaluations: list[float] = []) -> list[str]:  # noqa: B006
    return [a.name for a in alarms_of(curves, weights, evaluations)]


def alarms_of(curves, weights=None, evaluations=()) -> list[Alarm]:
    told: list[events.Event] = []
    alarms = Alarms(tell=told.append)
    if weights:
        alarms(Group("s", weights))
    for i in range(N):
        if evaluations and i % (N // len(evaluations)) == 0 and i // (N // len(evaluations)) < len(evaluations):
            alarms(events.Evaluation("s", "pass@1", evaluations[i // (N // len(evaluations))]))
        alarms(events.Step("s", i + 1, (i + 1) / N, None, {k: v[i] for k, v in curves.items()}))
    assert told == alarms.raised
    return alarms.raised


class Group:
    kind = "group"

    def __init__(self, stage, weights):
        self.stage, self.weights = stage, weights


CASES = {  # rule: numbers that raise it, and their near misses
    "entropy_collapse": ([{"entropy/mean": line(1.0, 0.05, 0.02), "accuracy": flat(0.4)}],
                         [{"entropy/mean": line(1.0, 0.05, 0.02), "accuracy": flat(0.97)},  # solved: sure of itself with reason
                          {"entropy/mean": line(1.0, 0.6, 0.02), "accuracy": flat(0.4)},
                          {"entropy/mean": flat(0.02, 0.01)}]),
    "entropy_explosion": ([{"entropy/mean": line(0.5, 3.0, 0.1)}], [{"entropy/mean": line(0.5, 0.9)}, {"entropy/mean": flat(3.0, 0.5)}]),
    "dead_groups": ([{"reward/total/informative": flat(0.05), "reward/correct/all_right": flat(0.9), "reward/correct/all_wrong": flat(0.05)}],
                    [{"reward/total/informative": flat(0.5)}]),
    "reward_hacking": ([{"reward/total/mean": line(0.3, 0.9, 0.03), "accuracy": line(0.7, 0.1, 0.03)}],
                       [{"reward/total/mean": line(0.3, 0.9, 0.03), "accuracy": line(0.3, 0.8, 0.03)},
                        {"reward/total/mean": flat(0.5, 0.05), "accuracy": line(0.7, 0.1, 0.03)},
                        {"reward/total/mean": line(0.3, 0.9, 0.03), "accuracy": flat(0.5, 0.1)}]),
    "length_drift": ([{"length/mean": line(40, 100, 3), "accuracy": flat(0.5, 0.02)}, {"length/mean": line(100, 30, 3)}],
                     [{"length/mean": line(40, 100, 3), "accuracy": line(0.3, 0.7, 0.02)}, {"length/mean": flat(40, 8)}]),
    "truncation": ([{"length/truncated": line(0.05, 0.5, 0.02)}], [{"length/truncated": flat(0.5)}, {"length/truncated": line(0, 0.1)}]),
    "engine_mismatch": ([{"engine/gap_mean": flat(0.2), "engine/ess": flat(0.97)}, {"engine/gap_mean": flat(0.01), "engine/ess": flat(0.5)}],
                        [{"engine/gap_mean": flat(1e-6), "engine/ess": flat(1.0)}, {"engine/gap_mean": flat(0.02), "engine/ess": flat(0.99)}]),
    "chosen_falls": ([{"logps/chosen": line(-20, -40, 1), "rewards/margin": line(0, 3, 0.1)}],
                     [{"logps/chosen": line(-20, -10, 1), "rewards/margin": line(0, 3, 0.1)},
                      {"logps/chosen": line(-20, -40, 1), "rewards/margin": flat(0, 0.1)}]),
    "diversity": ([{"diversity/distinct": line(0.9, 0.2, 0.02), "accuracy": flat(0.4)}],
                  [{"diversity/distinct": line(0.9, 0.2, 0.02), "accuracy": flat(0.99)}, {"diversity/distinct": line(0.9, 0.7)}]),
}


@pytest.mark.parametrize("name", CASES)
def test_raised_by_its_phenomenon_and_not_by_a_near_miss(name):
    for curves in CASES[name][0]:
        assert raised(curves).count(name) == 1, (name, curves.keys())
    for curves in CASES[name][1]:
        assert name not in raised(curves), (name, curves.keys())


def test_domination_needs_weights_and_weighs_with_them():
    spreads = {"reward/big/std": flat(2.0), "reward/small/std": flat(0.2)}
    assert "domination" not in raised(spreads)
    assert "domination" in raised(spreads, {"big": 1.0, "small": 1.0})
    assert "domination" not in raised(spreads, {"big": 0.1, "small": 1.0})
    assert "domination" not in raised(spreads | {"reward/small/std": flat(0.0)}, {"big": 1.0, "small": 1.0})  # nothing to dominate


def test_dead_groups_look_at_every_component():
    """A constant total hides components in which groups differ (GDPO learns from them)."""
    assert "dead_groups" not in raised({"reward/total/informative": flat(0.0), "reward/a/informative": flat(0.8)}, {"a": 1.0, "b": 1.0})
    assert "dead_groups" in raised({"reward/total/informative": flat(0.0), "reward/progress/informative": flat(0.8)}, {"a": 1.0})


def test_hacking_by_held_out_evaluations():
    reward = {"reward/total/mean": line(0.2, 0.9, 0.02)}
    assert "reward_hacking" in raised(reward, evaluations=[0.5, 0.6, 0.3])
    assert "reward_hacking" not in raised(reward, evaluations=[0.3, 0.5, 0.6])


def evaluated(curve: list[float], problems: int | None) -> list[str]:
    """The alarms of a run whose reward rises, with an evaluation after each step."""
    told: list[events.Event] = []
    alarms = Alarms(tell=told.append)
    for i, (reward, value) in enumerate(zip(line(0.2, 0.9, 0.02), curve)):
        alarms(events.Step("s", i + 1, (i + 1) / N, None, {"reward/total/mean": reward}))
        alarms(events.Evaluation("s", "pass@1", value, {} if problems is None else {"problems": problems}))
    alarms(events.Step("s", N + 1, 1.0, None, {"reward/total/mean": 0.9}))
    return [a.name for a in alarms.raised]


def test_noise_of_an_evaluation_is_no_hacking_and_a_real_fall_is():
    """Forty problems solved with the chance 1/2 scatter by 8 points, and the best of thirty looks good: no alarm in 100 runs of 30
    evaluations but for a few. The same numbers from where nobody says how few the problems were would raise it in every run."""
    noise, rng = 0, random.Random(0)
    for _ in range(100):
        curve = [sum(rng.random() < 0.5 for _ in range(40)) / 40 for _ in range(N)]
        noise += "reward_hacking" in evaluated(curve, 40)
        assert "reward_hacking" in evaluated(curve, None)
    assert noise <= 5
    for first, last, problems in ((0.8, 0.2, 40), (0.6, 0.45, 500), (0.95, 0.85, 400)):
        fall = [first] * (N - 2) + [last] * 2
        assert "reward_hacking" in evaluated(fall, problems), (first, last, problems)
    assert "reward_hacking" not in evaluated([1.0] + [0.0] * (N - 1), 1)  # one problem says nothing
    assert "reward_hacking" not in evaluated([0.8] * (N - 1) + [0.76], 10**6)  # certain, and too small to matter


def test_every_rule_has_a_case_and_its_words_in_both_languages():
    assert set(CASES) | {"domination"} == set(RULES)
    for name in RULES:
        assert f"alarm.{name}" in CATALOGUE and f"alarm.{name}.next" in CATALOGUE
    alarm = alarms_of(CASES["entropy_collapse"][0][0])[0]
    (en, zh), (remedy, _) = in_both_languages(alarm.as_dict())
    assert "entropy collapse" in en and "熵坍缩" in zh and "--clip-high" in remedy
    assert in_both_languages({"name": "of a later version", "text": "x", "remedy": "y", "numbers": {}})[0] == ("x", "x")


def test_once_and_again_only_after_a_silent_window():
    told: list[events.Event] = []
    alarms = Alarms(tell=told.append)
    values = [0.0] * WINDOW + [0.3] * (2 * WINDOW) + [0.0] * (3 * WINDOW) + [0.3] * (2 * WINDOW)
    for i, v in enumerate(values):
        alarms(events.Step("s", i + 1, 0.5, None, {"engine/gap_mean": v, "engine/ess": 1.0}))
    assert [a.name for a in told] == ["engine_mismatch"] * 2


def test_missing_and_nan_numbers_are_no_alarm_and_stages_are_apart():
    assert raised({"entropy/mean": [float("nan")] * N}) == []
    told: list[events.Event] = []
    alarms = Alarms(tell=told.append)
    for i in range(N):  # two stages, each too calm by itself, whose mixture would look like a collapse
        alarms(events.Step("a" if i < N // 2 else "b", i + 1, 0.5, None, {"entropy/mean": 1.0 if i < N // 2 else 0.01}))
    assert told == []


def test_alarms_fit_the_schema_and_a_log_without_them_gives_them(tmp_path):
    set_language("en")
    alarm = alarms_of(CASES["reward_hacking"][0][0])[0]
    jsonschema.validate(json.loads(json.dumps(alarm.as_dict())), events.json_schema())
    curves = CASES["reward_hacking"][0][0]
    log = [events.Step("s", i + 1, (i + 1) / N, None, {k: v[i] for k, v in curves.items()}).as_dict() for i in range(N)]
    assert [(a.name, a.step, a.text) for a in replay(log)] == [(alarm.name, alarm.step, alarm.text)]


# --- real runs ------------------------------------------------------------------------------------------------------------

TASK = Hackable(HackableDials(min_number=1, max_number=9))


@cache
def adder() -> Decoder:
    """A policy that often answers right."""
    rng, tok = random.Random(0), tokenizer()
    made = []
    for _ in range(1500):
        p = TASK.sample(rng, "train")
        a, b = p.answer
        text = TASK.demonstrate(p, rng) if rng.random() < 0.7 else f"{a} {b} {rng.choice((a, b))}"
        made.append(tok.encode_chat([{"role": "user", "content": p.prompt}, {"role": "assistant", "content": text}]))
    model = init_weights(Decoder(SPEC), 0)
    config = LoopConfig(steps=160, rows=32, optim=OptimConfig("muon", lr=0.02, adam_lr=0.01), schedule=Schedule("linear"), evaluations=0)
    Loop(model, pack_samples(made, 48), config).run()
    return model


def trained_on(weights: dict[str, float], folder) -> list[str]:
    torch.manual_seed(0)
    config = OnlineConfig(steps=30, prompts=16, group=8, rounds=1, max_tokens=12, weights=weights, evaluations=0, samples_shown=0,
                          objective=ObjectiveConfig(clip_high=0.28), optim=OptimConfig("adamw", lr=2e-3))
    loop = OnlineLoop(copy.deepcopy(adder()), tokenizer(), TASK, config)
    with recorded(folder, loop) as alarms:
        loop.run()
    return [a.name for a in alarms.raised]


def test_a_policy_that_hacks_its_reward_is_caught(tmp_path):
    assert "reward_hacking" in trained_on({"proxy": 1.0}, tmp_path)
    assert any(e["kind"] == "alarm" and e["name"] == "reward_hacking" for e in events.read_log(tmp_path / "events.jsonl"))


def test_and_one_that_is_paid_for_right_answers_is_not(tmp_path):
    assert not {"reward_hacking", "domination"} & set(trained_on({"correct": 1.0}, tmp_path))


def pairs() -> list[Pair]:
    """Random answers of three digits, preferred to the same with two more: what pushes those down pulls on all the others."""
    rng, found = random.Random(1), []
    for _ in range(64):
        prompt = tokenizer().encode_chat([{"role": "user", "content": str(rng.randrange(10))}], add_generation_prompt=True)[0]
        text = "".join(rng.choices("01234", k=3))
        chosen, rejected = (tokenizer().encode(x) for x in (text, text + "".join(rng.choices("56789", k=2))))
        found.append(Pair(Answer(prompt, chosen), Answer(prompt, rejected)))
    return found


@pytest.mark.parametrize("losses, falls", [({"sigmoid": 1.0}, True), ({"sft": 1.0}, False)])
def test_dpo_whose_chosen_answers_lose_probability(losses, falls, tmp_path):
    """DPO on answers that resemble each other takes probability from both; supervised learning of the chosen one does not."""
    loop = PreferenceLoop(policy(), pairs(), PreferenceConfig(losses=losses), OfflineConfig(
        steps=40, batch=16, optim=OptimConfig("adamw", lr=2e-3), schedule=Schedule("constant", warmup=0.0), evaluations=0))
    with recorded(tmp_path, loop) as alarms:
        loop.run()
    assert [(a.name, a.level) for a in alarms.raised] == ([("chosen_falls", "info")] if falls else [])
    first, last = (loop.history.metrics[i][1]["logps/chosen"] for i in (0, -1))
    assert (last < first - 3) == falls
