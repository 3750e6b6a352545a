"""Prompts of a data set as a task: every format, the split, the order of epochs, exact resume, columns for rewards."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_policy import policy, tokenizer, weights

from pellucid import events
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.prompts import Prompts, Row, content_of
from pellucid.align.rewards import Reward, RewardSet, batch_of
from pellucid.align.rollout import Rollouts
from pellucid.data.formats import PromptRecord
from pellucid.errors import BadInput, Interrupted
from pellucid.optim import OptimConfig

ASK = [{"role": "user", "content": "7"}]
FORMATS = {
    "prompt-only": {"prompt": "7", "solution": "49"},
    "conversational": {"prompt": ASK, "solution": "49"},
    "prompt-completion": {"prompt": ASK, "completion": [{"role": "assistant", "content": "49"}]},
    "preference": {"prompt": ASK, "chosen": [{"role": "assistant", "content": "49"}], "rejected": [{"role": "assistant", "content": "4"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "7"}, {"from": "gpt", "value": "49"}]},
    "messages": {"messages": [*ASK, {"role": "assistant", "content": "49"}]},
    "question": {"messages": ASK},
    "verl": {"data_source": "squares", "prompt": ASK, "ability": "math", "reward_model": {"style": "rule", "ground_truth": "49"},
             "extra_info": {"index": 3}},
}


def rows(form: dict, n: int = 12) -> list[dict]:
    text = json.dumps(form)
    return [json.loads(text.replace('"7"', f'"{i % 10} {i}"')) for i in range(n)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_format_gives_prompts_and_columns(name: str, kind: str, tmp_path: Path):
    file, made = tmp_path / f"data.{kind}", rows(FORMATS[name])
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, made)))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(made), file)
    task = Prompts.open(str(file))
    every = task.train + task.heldout
    assert sorted(r.prompt for r in every) == sorted(f"{i % 10} {i}" for i in range(12))
    assert all(isinstance(content_of(r), str) == (name == "prompt-only") for r in every)
    groups = Rollouts(policy(), tokenizer(), task, max_tokens=4, rewards=RewardSet([Reward("n", lambda completions: [1.0] * len(completions))])
                      ).groups(task.measured(1), 2, 1.0, 0)
    (row,) = task.measured(1)
    asked = tokenizer().encode(row.content) if name == "prompt-only" else tokenizer().encode_chat(row.content, add_generation_prompt=True)[0]
    assert all(s.prompt == asked for s in groups[0].samples)
    batch = batch_of(groups)
    assert batch.prompts[0] == row.content and isinstance(batch.completions[0], str) == (name == "prompt-only")
    if name == "verl":
        assert batch.columns["ground_truth"] == ["49", "49"] and batch.columns["data_source"][0] == "squares" and row.answer == "49"
        assert batch.columns["extra_info"][0]["index"] == 3
    if "solution" in FORMATS[name]:
        assert batch.columns["solution"] == ["49", "49"] and row.answer == "49"
    if name in ("sharegpt", "messages", "prompt-completion"):
        assert task.demonstrate(row, random.Random(0)) == "49"


def test_a_column_that_some_rows_lack_is_none_there():
    """Whatever rows stand in a batch, so that a function gets the same for a row; and before the run it is told of every column."""
    records = [PromptRecord(f"{i}", extra={"answer": str(i)} | ({"hint": "h"} if i % 2 else {})) for i in range(20)]
    records[3] = PromptRecord("3", extra={"solution": "49"})
    found = Prompts(records)
    assert found.columns == ["answer", "hint", "solution"]
    got = {}

    def look(prompts, hint, answer):
        got.update({p: (h, a) for p, h, a in zip(prompts, hint, answer)})
        return [1.0] * len(prompts)

    rewards = RewardSet([Reward("look", look)])
    rewards.check(found.columns)
    rollouts = Rollouts(policy(), tokenizer(), found, max_tokens=2, rewards=rewards)
    for row in found.train + found.heldout:
        rollouts.groups([row], 1, 1.0, 0)
    assert got == {str(i): ("h" if i % 2 and i != 3 else None, str(i) if i != 3 else "49") for i in range(20)}


def test_prompts_that_do_not_fit_are_left_out_before_the_run():
    """The context is 64 here; one of them, met in the hundredth step, would end a run."""
    from tiny_policy import SPEC

    tok, told = tokenizer(), []
    found = Prompts([PromptRecord("7" * (i % 10 + 1) + f" {i}" if i % 4 else "7" * (SPEC.limit + i)) for i in range(40)])
    sides = [list(found.train), list(found.heldout)]
    with events.subscribed(told.append):
        rollouts = Rollouts(policy(), tok, found, max_tokens=4, rewards=RewardSet([Reward("n", lambda completions: [1.0] * len(completions))]))
    assert [found.train, found.heldout] == [[r for r in side if len(r.prompt) < SPEC.limit] for side in sides]
    assert [n.text.split(" prompts ")[0] for n in told if n.kind == "note"] == ["10 of 40"]
    assert sorted(found.sample(random.Random(0), "train").prompt for _ in found.train) == sorted(r.prompt for r in found.train)
    edge = max(len(rollouts.prompt(r)) for r in found.train + found.heldout)
    found.keep(lambda row: len(rollouts.prompt(row)) + SPEC.limit - edge <= SPEC.limit, "")
    assert len(found.train) + len(found.heldout) == 30
    with pytest.raises(BadInput, match="exceed the model's context"):
        Rollouts(policy(), tok, found, max_tokens=SPEC.limit)


def task(n: int = 40, seed: int = 0) -> Prompts:
    return Prompts([PromptRecord([{"role": "user", "content": f"{i % 10} {i}"}], extra={"k": str(i)}) for i in range(n)], seed)


def test_the_split_is_the_prompts_own_and_every_epoch_has_every_row_once_in_an_order_of_its_own():
    made, other = task(200), task(200, seed=1)
    assert {r.key for r in made.heldout} == {r.key for r in other.heldout} and 0 < len(made.heldout) < 40
    assert not {r.key for r in made.heldout} & {r.key for r in made.train}
    drawn = [made.sample(random.Random(0), "train") for _ in range(2 * len(made.train))]
    first, second = drawn[: len(made.train)], drawn[len(made.train) :]
    assert set(Counter(r.key for r in first).values()) == set(Counter(r.key for r in second).values()) == {1}
    assert [r.key for r in first] != [r.key for r in second] and made.epochs == 2.0
    again = task(200)
    assert [again.sample(random.Random(5), "train").key for _ in first] == [r.key for r in first]
    assert [other.sample(random.Random(0), "train").key for _ in first] != [r.key for r in first]
    assert all(made.sample(random.Random(i), "heldout") in made.heldout for i in range(9))


def test_few_rows_still_hold_one_out_and_one_prompt_is_too_few():
    few = task(2)
    assert len(few.train) == len(few.heldout) == 1
    for records in ([], [PromptRecord("a")], [PromptRecord("a"), PromptRecord("a")]):
        with pytest.raises(BadInput, match="too few rows"):
            Prompts(records)


def test_data_without_a_reward_are_refused():
    with pytest.raises(BadInput, match="no reward was given"):
        OnlineLoop(policy(), tokenizer(), task(), OnlineConfig(steps=1))


def wanted(completions, k, trainer_state, log_metric, log_extra):
    log_metric("asked", float(trainer_state.global_step))
    assert trainer_state.max_steps == 4
    return [float(c[-1]["content"].startswith(x[-1])) for c, x in zip(completions, k)]


def running(folder: Path | None = None) -> OnlineLoop:
    config = OnlineConfig(steps=4, prompts=6, group=4, max_tokens=4, evaluations=0, seed=3, optim=OptimConfig("adamw", lr=3e-3))
    return OnlineLoop(policy(), tokenizer(), task(20, seed=3), config, rewards=RewardSet([Reward("wanted", wanted)]),
                      checkpoint=None if folder is None else folder / "state")


def test_a_run_on_data_that_stops_and_goes_on_equals_one_that_does_not(tmp_path: Path):
    straight = running()
    history = straight.run()
    assert [m["asked"] for _, m in history.metrics] == [0, 1, 2, 3]  # what a reward logs stands among the numbers of its step

    def stop(record):
        if record.kind == "step" and record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    broken = running(tmp_path)
    with events.subscribed(stop), pytest.raises(Interrupted):
        broken.run()
    broken = running(tmp_path)
    assert broken.resume()
    broken.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(straight.model), weights(broken.model)))
    assert straight.task.state() == broken.task.state() and straight.task.state()["taken"] >= 24


def test_a_row_is_a_problem_that_people_can_read():
    made = Prompts([PromptRecord([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], extra={"answer": 5}),
                    PromptRecord("x")])
    rows = {r.prompt: r for r in (*made.train, *made.heldout)}
    assert set(rows) == {"q", "x"} and rows["q"].answer == 5 and rows["x"].answer is None
    assert all(isinstance(r, Row) and r.task == "data" for r in rows.values())
