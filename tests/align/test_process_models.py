"""Process reward models: the loss against a token classifier's (trl's PRM trainer until 1.13), on disk, and as a judge of steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_policy import policy, tokenizer

from pellucid import events
from pellucid.align.examples import encode_steps
from pellucid.align.offline import OfflineConfig
from pellucid.align.reward_model import (
    ProcessLoop,
    RewardModel,
    StepFormat,
    judged_right,
    load_reward_model,
    save_reward_model,
    step_format,
)
from pellucid.align.reward_scoring import Judge, StepJudge
from pellucid.align.reward_specs import model_of
from pellucid.align.selection import ProcessReward
from pellucid.data.formats import StepwiseRecord
from pellucid.errors import BadInput
from pellucid.optim import OptimConfig

RECORDS = [StepwiseRecord("12", ["3", "45", "6"], [True, False, True]), StepwiseRecord("7", ["89"], [False]),
           StepwiseRecord("0", ["1 2", "3"], [True, True])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prm") / "model"
    save_reward_model(RewardModel.of(policy(), seed=3), path, tokenizer(), StepFormat())
    return path


def classifier(folder: Path):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def rows_of_trl(record: StepwiseRecord) -> tuple[list[int], list[int]]:
    """Ids and labels as trl's PRM trainer made them: each step and the separator encoded apart, the label on the separator's last token."""
    tok = tokenizer()
    ids, labels = tok.encode(record.prompt), [-100] * len(tok.encode(record.prompt))
    for step, label in zip(record.completions, record.labels):
        piece = tok.encode(step) + tok.encode("\n")
        ids, labels = ids + piece, labels + [-100] * (len(piece) - 1) + [int(label)]
    return ids, labels


def test_loss_and_gradients_are_those_of_a_two_class_token_classifier(folder: Path):
    """transformers' hidden states, a head of two classes whose difference is our score, torch's cross-entropy over all labelled tokens."""
    mine, other = load_reward_model(folder), classifier(folder)
    mine.train().requires_grad_()
    loop = ProcessLoop(mine, encode_steps(tokenizer(), RECORDS, 64), OfflineConfig(steps=1, batch=3, optim=OptimConfig("adamw", lr=0.0)))
    share, parts = loop.prepare([0, 1, 2])
    loss = share([0, 1]) + share([2])  # micro-batches add up
    loss.backward()
    logits, labels = [], []
    for ids, marks in map(rows_of_trl, RECORDS):
        score = other.model(torch.tensor([ids])).last_hidden_state[0] @ other.score.weight[0]
        logits.append(torch.stack([torch.zeros_like(score), score], -1))
        labels += marks
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels), ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine.score.weight.grad, other.score.weight.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine.embed.weight.grad, other.model.embed_tokens.weight.grad, atol=1e-6, rtol=1e-5)
    right = (torch.cat(logits)[:, 1] > 0) == torch.tensor(labels).bool()
    expected_right = float(right[torch.tensor(labels) >= 0].float().mean())
    assert sum(float(p["accuracy"]) for p in parts) == pytest.approx(expected_right)
    name, value, details = judged_right(mine, loop.items, at_once=2)
    assert value == pytest.approx(expected_right) and details == {"steps": 6, "right_steps": pytest.approx(4 / 6)} and "steps" in name


def test_probabilities_of_steps_are_those_of_transformers(folder: Path):
    """Whole solutions and their beginnings, each alone through the classifier: its logit at the last token is the last step's."""
    other, judge = classifier(folder), StepJudge.load(folder)
    judge.tokens = 16  # several batches
    steps = [r.completions for r in RECORDS] + [[]]
    found = judge.score_steps([r.prompt for r in RECORDS] + ["9"], steps)
    assert [len(x) for x in found] == [3, 1, 2, 0]
    for record, mine in zip(RECORDS, found):
        for n, p in enumerate(mine, 1):
            ids, _ = rows_of_trl(StepwiseRecord(record.prompt, record.completions[:n], record.labels[:n]))
            with torch.no_grad():
                assert p == pytest.approx(float(other(torch.tensor([ids])).logits[0, 0].sigmoid()), abs=1e-6)


def test_prompts_are_read_as_in_training(folder: Path, tmp_path: Path):
    judge, talk = StepJudge.load(folder), [{"role": "system", "content": "be brief"}, {"role": "user", "content": "12"}]
    assert judge.score_steps([talk], [["3"]]) == judge.score_steps(["12"], [["3"]])
    save_reward_model(judge.model, tmp_path / "talks", tokenizer(), StepFormat(" ", True))
    talks = StepJudge.load(tmp_path / "talks")
    assert talks.form == StepFormat(" ", True)
    (asked,) = encode_steps(tokenizer(), [StepwiseRecord(talk[1:], ["3", "4"], [True, True])], 64, " ")
    with torch.no_grad():
        scores, _ = talks.model.scores_at([asked.answer], [asked.ends])
    assert talks.score_steps(["12"], [["3", "4"]]) == [pytest.approx(scores.sigmoid().tolist())]
    assert talks.score_steps([talk[1:]], [["3", "4"]]) == talks.score_steps(["12"], [["3", "4"]])


def test_what_does_not_fit_is_not_graded_and_said_once(folder: Path):
    judge, notes = StepJudge.load(folder), []
    with events.subscribed(lambda e: notes.append(e.text) if e.kind == "note" else None):
        for _ in range(2):
            assert judge.score_steps(["1", "1"], [["2"] * 100, ["2"]])[0] == []
    assert len(notes) == 1 and "64" in notes[0]


def test_a_reward_model_is_recognised_by_its_folder(folder: Path, tmp_path: Path):
    save_reward_model(RewardModel.of(policy(), seed=3), tmp_path / "rm", tokenizer())
    assert step_format(tmp_path / "rm") is None and isinstance(model_of(str(tmp_path / "rm"), tokenizer()).function, Judge)
    reward = model_of(f"prm={folder}?combine=product*0.5", tokenizer())
    assert isinstance(reward.function, ProcessReward) and (reward.name, reward.weight) == ("prm", 0.5)
    asked = [[{"role": "user", "content": "12"}]]
    (steps,) = reward.function.model.score_steps(["12"], [["3", "45"]])
    assert reward.function(asked, ["<think>\n3\n45\n</think>\n\n6"]) == [pytest.approx(steps[0] * steps[1])]
    assert model_of(str(folder), tokenizer()).function(asked, ["3\n45"]) == [pytest.approx(min(steps))]
    for spec, says in ((f"{folder}?combine=best", "product"), (f"{folder}?combin=min", "did you mean 'combine'"),
                       (f"{tmp_path / 'rm'}?combine=min", "whole answers")):
        with pytest.raises(BadInput, match=says):
            model_of(spec, tokenizer())
    with pytest.raises(BadInput, match="align prm"):
        StepJudge.load(tmp_path / "rm")


@pytest.mark.parametrize("found", [7, {}, {"separator": "", "conversational": True}, {"separator": "a", "conversational": 1},
                                   {"separator": "a", "conversational": True, "more": 1}])
def test_damaged_settings_are_refused(folder: Path, tmp_path: Path, found):
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"process_reward": found}))
    with pytest.raises(BadInput, match="process_reward"):
        step_format(tmp_path)
