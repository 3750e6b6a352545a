"""Each kind of objective makes a policy better on problems that it was never trained on."""

from __future__ import annotations

import random

import pytest
from test_online import accuracy, config, loop
from tiny_policy import Echo

from pellucid.align import recipe
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Problem


class First(Echo):
    """Two digits are shown, the first is the answer. Ten of the hundred pairs are held out, each digit once in each place."""

    name = "first"

    def sample(self, rng: random.Random, split: str) -> Problem:
        while True:
            shown = "".join(rng.choices("0123456789", k=2))
            if (int(shown[1]) == (3 * int(shown[0]) + 1) % 10) == (split == "heldout"):
                return Problem(self.name, shown, shown[0], shown)


@pytest.mark.parametrize("name", ["grpo", "ppo", "rloo", "reinforce++", "gdpo"])
def test_it_improves_on_held_out_problems(name):
    """From digits at random (a few in 100 right), by grades alone."""
    optim = OptimConfig("muon", lr=0.02, adam_lr=0.01)
    cfg = config(steps=60, prompts=16, group=8, max_tokens=3, clip=1.0, seed=1, schedule=Schedule("linear", warmup=0.05), optim=optim,
                 objective=recipe(name))
    running = loop(cfg, task=First())
    before = accuracy(running)
    history = running.run()
    after = accuracy(running)
    assert before < 0.12
    assert after > 0.25, [round(m["accuracy"], 2) for _, m in history.metrics]
    if name == "ppo":
        assert sum(m["critic/explained"] for _, m in history.metrics[-10:]) / 10 > 0.2
