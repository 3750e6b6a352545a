"""Two processes run the loops as one does: weights, metrics, evaluations; stopped by one of them, resumed with another number.

What a process computes goes by the seed and not by who computes it, so that only the order of additions differs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import Noise, policy, tokenizer

from pellucid import events, tasks
from pellucid.align import ObjectiveConfig, recipe
from pellucid.align.answers import Answer
from pellucid.align.distill import DistillConfig, DistillLoop
from pellucid.align.offline import Labelled, OfflineConfig, Pair, PreferenceLoop, UnpairedLoop
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.reward_model import ProcessLoop, RewardLoop, RewardModel, Steps
from pellucid.align.unpaired import UnpairedConfig
from pellucid.data.packing import pack_samples
from pellucid.errors import BadInput, Interrupted, PellucidError
from pellucid.models.lora import LoraConfig, attach
from pellucid.optim import OptimConfig, Schedule
from pellucid.train import Loop, LoopConfig
from pellucid.train.ranks import ALONE, Ranks, joined

PLAIN = ObjectiveConfig(clip_high=0.28, dead_groups="drop")
CASES = {
    "grpo": dict(updates=2, micro_rows=2, objective=replace(PLAIN, beta=0.1)),
    "gdpo": dict(objective=recipe("gdpo", aggregation="token-mean"), rounds=1),
    "ppo": dict(objective=recipe("ppo"), epochs=2),
    "rloo": dict(objective=recipe("rloo", truncated="mask")),
    "corrected": dict(lag=1, updates=2, objective=replace(PLAIN, correction="truncate", high_entropy=0.5, entropy_coef=0.01), top_k=5),
    "muon": dict(optim=OptimConfig("muon", lr=0.01), objective=replace(PLAIN, kl_target=0.01, beta=0.1, kl_horizon=50)),
    "lora": dict(objective=replace(PLAIN, beta=0.1)),
}
SKIPPED = {"time/sampling", "time/waiting", "memory/peak", "speed/sampled", "speed/trained"}  # the clock's


def online(name, ranks, steps=3, folder=None):
    fields = dict(steps=steps, prompts=5, group=4, max_tokens=6, clip=1.0, evaluations=2, seed=5, schedule=Schedule("linear", warmup=0.3, floor=0.1),
                  optim=OptimConfig("adamw", lr=3e-3))
    model = policy()
    if name == "lora":
        attach(model, LoraConfig(2), 0)
    task = Noise(flat="0246")
    loop = OnlineLoop(model, tokenizer(), task, OnlineConfig(**(fields | CASES[name])), ranks=ranks, checkpoint=folder, evaluate=lambda: (
        "pass@1", tasks.evaluate(task, loop.for_evaluation(0), 7, 1, 1, temperature=1.0).progress, {}))
    return loop


def answers():
    tok = tokenizer()
    ask = [tok.encode_chat([{"role": "user", "content": str(i)}, {"role": "assistant", "content": str(i) * (1 + i % 3)}]) for i in range(10)]
    return [Answer(ids[: mask.index(True)], ids[mask.index(True):]) for ids, mask in ask]


def given(name, ranks):
    """The loops on given data: seven examples, so that the shares are unequal."""
    a, model = answers(), policy()
    pairs = [Pair(x, Answer(x.prompt, y.tokens), 0.1) for x, y in zip(a, a[3:] + a[:3])]
    settings = OfflineConfig(steps=3, batch=7, micro=3, optim=OptimConfig("adamw", lr=1e-3), schedule=Schedule("constant", warmup=0.0), evaluations=0)
    if name == "dpo":
        return PreferenceLoop(model, pairs, PreferenceConfig({"sigmoid": 1.0, "sft": 0.5}), settings, ranks=ranks)
    if name == "kto":
        return UnpairedLoop(model, [Labelled(x, i % 3 > 0) for i, x in enumerate(a)], UnpairedConfig(), settings, ranks=ranks)
    if name == "rm":
        return RewardLoop(RewardModel.of(model), pairs, settings, ranks=ranks)
    if name == "prm":
        steps = [Steps(x, list(range(len(x.tokens))), [float((i + j) % 3 > 0) for j in range(len(x.tokens))]) for i, x in enumerate(a)]
        return ProcessLoop(RewardModel.of(model), steps, settings, ranks=ranks)
    rows = pack_samples([(x.prompt + x.tokens, [False] * len(x.prompt) + [True] * len(x.tokens)) for x in a], 16)
    return Loop(model, rows, LoopConfig(steps=3, rows=5, optim=OptimConfig("adamw", lr=1e-3), evaluations=0), ranks=ranks)


DISTILLED = {"on-policy": dict(), "sampled": dict(estimate="sampled", group=2), "top-k": dict(estimate="top-k", top_k=8, on_policy=0.5, beta=0.5)}


def distilled(name, ranks, folder=None):
    """Distillation on the student's own samples, and on rows that are given; five prompts, so that the shares are unequal."""
    teacher, task = policy(), Noise()
    with torch.no_grad():
        teacher.head_weight.mul_(1.5)
    rows = pack_samples([(x.prompt + x.tokens, [False] * len(x.prompt) + [True] * len(x.tokens)) for x in answers()], 16)
    config = DistillConfig(**{"steps": 4, "prompts": 5, "max_tokens": 6, "rows": 5, "micro_rows": 2, "evaluations": 2, "seed": 3,
                              "optim": OptimConfig("adamw", lr=3e-3), **DISTILLED[name]})
    loop = DistillLoop(policy(), tokenizer(), teacher, tokenizer(), config, task=task, data=rows, ranks=ranks, checkpoint=folder, evaluate=lambda: (
        "pass@1", tasks.evaluate(task, loop.for_evaluation(0), 7, 1, 1, temperature=1.0).progress, {}))
    return loop


GIVEN = ("dpo", "kto", "rm", "prm", "sft")


def loop_of(name, ranks):
    return online(name, ranks) if name in CASES else distilled(name, ranks) if name in DISTILLED else given(name, ranks)


def told(loop):
    """What a run gave, as JSON."""
    h = loop.history
    table = [[p, {k: v for k, v in m.items() if k not in SKIPPED}] for p, m in getattr(h, "metrics", [])]
    return {"metrics": table, "evaluations": [list(e) for e in h.evaluations], "losses": [list(x) for x in getattr(h, "losses", [])],
            "sampled": getattr(h, "sampled", 0), "steps": h.steps}


def weights(loop):
    return {n: p.detach().clone() for n, p in loop.model.named_parameters()}


def worker(folder):
    """Everything that two processes are to do."""
    ranks = joined()
    for name in (*CASES, *GIVEN, *DISTILLED):
        loop = loop_of(name, ranks)
        loop.run()
        same = ranks.gathered([float(p.detach().double().sum()) for p in loop.model.parameters()])
        assert same[0] == same[1]  # bit for bit
        if ranks.first:
            save_file(weights(loop), folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(told(loop)))
    stopped = online("grpo", ranks, folder=folder / "state")

    def reader(event):
        if event.kind == "step" and event.step == 2 and not ranks.first:
            os.kill(os.getpid(), signal.SIGINT)  # one process is asked to stop, and not the first

    with events.subscribed(reader), pytest.raises((Interrupted, SystemExit)):
        stopped.run()
    assert stopped.history.steps == 2 and (folder / "state" / "state.json").exists()
    clock = online("gdpo", ranks)  # by the clock: both stop at the same step
    clock.budget.steps, clock.budget.seconds = None, 1.5
    clock.run()
    assert len(set(ranks.gathered(clock.history.steps))) == 1
    failing = online("grpo", ranks)
    if not ranks.first:
        def broken(*_):
            raise PellucidError("told to fail")

        failing.rollouts.groups = broken
    failing.run()


def two(folder):
    """The exit codes and complaints of two processes that run this file."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, cwd=Path(__file__).parent,
                                env=env | {"RANK": str(rank)}) for rank in (0, 1)]
    complaints = [process.communicate(timeout=200)[1].decode() for process in running]
    return [p.returncode for p in running], complaints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    codes, complaints = two(folder)
    (folder / "ended.json").write_text(json.dumps([codes, complaints]))
    assert "told to fail" in complaints[1], complaints  # the last thing that they do
    return folder


def close(a, b):
    """Numbers of two runs: sums in another order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            close(a[k], b[k]) if isinstance(a[k], (dict, list)) else near(k, a[k], b[k])
    else:
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y) if isinstance(x, (dict, list)) else near("", x, y)


def near(name, x, y):
    loose = {"engine/gap_mean", "engine/gap_max"}  # rounding itself
    assert x == pytest.approx(y, rel=2e-3, abs=1e-5 if name in loose else 2e-5, nan_ok=True), name


@pytest.mark.parametrize("name", [*CASES, *GIVEN, *DISTILLED])
def test_two_processes_equal_one(folder, name):
    loop = loop_of(name, ALONE)
    start = weights(loop)
    loop.run()
    alone, theirs = told(loop), json.loads((folder / f"{name}.json").read_text())
    assert alone["sampled"] == theirs["sampled"] and alone["steps"] == theirs["steps"]
    close(json.loads(json.dumps(alone)), theirs)
    moved = 0.0
    for n, p in load_file(folder / f"{name}.safetensors").items():
        torch.testing.assert_close(p, weights(loop)[n], atol=2e-5, rtol=1e-3)
        moved = max(moved, float((p - start[n]).abs().max()))
    assert moved > 1e-3


def test_what_two_processes_began_one_ends(folder, tmp_path):
    straight = online("grpo", ALONE)
    straight.run()
    going_on = online("grpo", ALONE, folder=folder / "state")
    assert going_on.resume() and going_on.history.steps == 2
    going_on.run()
    close(json.loads(json.dumps(told(straight))), json.loads(json.dumps(told(going_on))))
    for n, p in weights(going_on).items():
        torch.testing.assert_close(p, weights(straight)[n], atol=2e-5, rtol=1e-3)


def test_a_process_that_fails_ends_the_others(folder):
    codes, complaints = json.loads((folder / "ended.json").read_text())
    assert codes[0] == 1 and codes[1] in (1, -6)  # gloo may abort the one that leaves first, when the other's connection breaks
    assert "told to fail" in complaints[1] and "another process of this run has ended" in complaints[0]


def test_shares():
    ranks = [Ranks(r, 3) for r in range(3)]
    parts = [list(r.mine(range(8))) for r in ranks]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]] and ranks[0].dealt(parts) == list(range(8))
    assert [r.rows(7, 32) for r in ranks] == [3, 3, 3] and ranks[0].rows(7, 2) == 2 and ALONE.rows(7) == 7 and ranks[0].rows(1) == 1


def test_refused_with_several_processes():
    with pytest.raises(BadInput, match="processes share"):
        online("grpo", Ranks(0, 6))
    with pytest.raises(BadInput, match="processes share"):
        distilled("on-policy", Ranks(0, 6))
    with pytest.raises(BadInput, match="sorts the pairs"):
        a = answers()
        PreferenceLoop(policy(), [Pair(a[0], a[1])], PreferenceConfig({"aot": 1.0}), OfflineConfig(steps=1, batch=1), ranks=Ranks(0, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]))
