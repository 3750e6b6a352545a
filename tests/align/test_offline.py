"""The preference, unpaired and reward trainers: whole steps against trl's trainers, invariances, exact resume, learning."""

from __future__ import annotations

import math
import os
import random
import signal
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tiny_policy import policy, tokenizer, weights

import pellucid
from pellucid import events
from pellucid.align.answers import Answer, Flat, Shuffled, logprobs_of
from pellucid.align.examples import encode_answer, encode_labelled, encode_pairs, encode_steps, fitted
from pellucid.align.metrics import OFFLINE_MEANING
from pellucid.align.offline import (
    Labelled,
    OfflineConfig,
    Pair,
    PreferenceLoop,
    UnpairedLoop,
    mismatched,
    pair_accuracy,
)
from pellucid.align.preference_config import PreferenceConfig, preference_recipe
from pellucid.align.reward_model import (
    ProcessLoop,
    RewardLoop,
    RewardModel,
    Steps,
    load_reward_model,
    save_reward_model,
)
from pellucid.align.unpaired import UnpairedConfig
from pellucid.data.formats import PreferenceRecord, StepwiseRecord, UnpairedRecord
from pellucid.errors import BadInput, Interrupted
from pellucid.optim import OptimConfig, Optimizers, Schedule

CONSTANT = Schedule("constant", warmup=0.0)
LEARN = OptimConfig("muon", lr=0.02, adam_lr=0.01)


def config(**changes):
    return OfflineConfig(**(dict(steps=2, batch=6, optim=OptimConfig("adamw", lr=1e-3), schedule=CONSTANT, evaluations=0,
                                 seed=5) | changes))


class Plain(Optimizers):
    """Gradient descent that keeps the gradients it was given."""

    def __init__(self, model, lr):
        super().__init__([torch.optim.SGD(model.parameters(), lr=lr)])
        self.parameters, self.gradients = list(model.parameters()), []

    def step(self):
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.parameters])
        super().step()


def with_sgd(loop, lr=0.1):
    loop.stepper.optimizer = Plain(loop.model, lr)
    return loop


def some_pairs(n=10, seed=0):
    """Answers of unequal length to digits."""
    rng, tok = random.Random(seed), tokenizer()
    made = []
    for _ in range(n):
        prompt = [{"role": "user", "content": str(rng.randrange(10))}]
        sides = ["".join(rng.choices("0123456789", k=rng.randint(1, 6))) for _ in range(2)]
        made.append(Pair(*(encode_answer(tok, prompt, [{"role": "assistant", "content": s}]) for s in sides),
                         margin=rng.random()))
    return made


# --- against trl: whole steps -----------------------------------------------------------------------------------------


@pytest.fixture
def trl():
    pytest.importorskip("trl", reason="optional reference: pip install pellucid[parity]")
    import trl_trainers

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield trl_trainers
    torch.set_num_threads(before)


STEPS = dict(max_steps=3, learning_rate=0.2, lr_scheduler_type="constant", per_device_train_batch_size=4, max_grad_norm=1.0,
             logging_steps=1, weight_decay=0.0)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2), None


def answers_of(inputs, start, mask="completion_mask", ids="input_ids", attention="attention_mask"):
    """Rows of trl's batch -> our answers, in its order."""
    made = []
    for row in range(*start):
        real = inputs[attention][row].bool()
        tokens, completion = inputs[ids][row][real].tolist(), inputs[mask][row][real].bool()
        first = int(completion.int().argmax())
        made.append(Answer(tokens[:first], tokens[first:]))
    return made


def run_trl(trainer, model):
    """Three steps; the batch of the first is every step's, since it holds the whole data set."""
    trainer.optimizer, trainer.lr_scheduler = torch.optim.SGD(model.parameters(), lr=0.2), None
    batches = []
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: batches.append(prepare(inputs)) or batches[-1]
    trainer.train()
    return batches[0], [x["loss"] for x in trainer.state.log_history if "loss" in x]


def saved(model, path):
    model.save_pretrained(path)
    return pellucid.load(path)


def same_weights(ours, theirs, before):
    """Every weight after three steps; each moved by far more than the tolerance."""
    moved = 0
    for (name, a), (_, b), start in zip(ours.named_parameters(), theirs.named_parameters(), before):
        assert float((a - b).detach().abs().max()) < 5e-6, name
        moved += float((b - start).detach().abs().max()) > 1e-3
    assert moved > 10


@pytest.mark.parametrize("loss, options, micro", [
    ("sigmoid", dict(beta=0.3), None), ("ipo", dict(beta=0.3), 3), ("rpo", dict(beta=0.3), 1), ("wpo", dict(beta=0.3), 2)])
@pytest.mark.parametrize("reference", ["precompute", "live"])
def test_three_steps_of_dpo(trl, tmp_path, loss, options, micro, reference):
    """Batches, packing, chunked log-probabilities, reference, clipping, update: all of it, against DPOTrainer."""
    model, ref = trl.language_model(0), trl.language_model(0, head=7.2)  # the given weights moved away from the reference
    mine, given = saved(model, tmp_path / "model"), saved(ref, tmp_path / "ref")
    before = [p.detach().clone() for p in saved(model, tmp_path / "again").parameters()]
    extra = {"rpo": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0]), "wpo": dict(use_weighting=True)}.get(
        loss, dict(loss_type=loss))
    trainer = trl.dpo(tmp_path / "out", model, ref, **(STEPS | options | extra))
    inputs, losses = run_trl(trainer, model)
    pairs = [Pair(c, r) for c, r in zip(answers_of(inputs, (0, 4)), answers_of(inputs, (4, 8)))]
    cfg = preference_recipe({"sigmoid": "dpo"}.get(loss, loss), **options)
    running = PreferenceLoop(given, pairs, cfg, config(steps=3, batch=4, micro=micro, reference=reference, clip=1.0))
    with torch.no_grad():  # the reference is what was given; the policy starts elsewhere, so that nothing is 0
        for p, q in zip(given.parameters(), mine.parameters()):
            p.copy_(q)
    history = with_sgd(running, 0.2).run()
    assert [x for _, x in history.losses] == pytest.approx(losses, abs=2e-5)
    assert abs(losses[0] - losses[2]) > 1e-3
    same_weights(given, saved(model, tmp_path / "trained"), before)


def test_three_steps_of_kto(trl, tmp_path):
    model, ref = trl.language_model(0), trl.language_model(0, head=7.2)
    mine, given = saved(model, tmp_path / "model"), saved(ref, tmp_path / "ref")
    before = [p.detach().clone() for p in mine.parameters()]
    trainer = trl.kto(tmp_path / "out", model, ref, **(STEPS | dict(beta=0.3, desirable_weight=1.5)))
    inputs, losses = run_trl(trainer, model)
    answers = answers_of(inputs, (0, 4))
    running = UnpairedLoop(given, [Labelled(a, bool(g)) for a, g in zip(answers, inputs["label"])],
                           UnpairedConfig(beta=0.3, good_weight=1.5), config(steps=3, batch=4, micro=3, clip=1.0, reference="live"))
    running.mismatched = answers_of(inputs, (0, 4), "KL_completion_mask", "KL_input_ids", "KL_attention_mask")
    with torch.no_grad():
        for p, q in zip(given.parameters(), mine.parameters()):
            p.copy_(q)
    history = with_sgd(running, 0.2).run()
    assert [x for _, x in history.losses] == pytest.approx(losses, abs=2e-5)
    logged = [x["kl"] for x in trainer.state.log_history if "kl" in x]
    assert [x["kl"] for _, x in history.metrics] == pytest.approx(logged, abs=2e-4) and logged[2] > 1
    same_weights(given, saved(model, tmp_path / "trained"), before)


@pytest.mark.parametrize("centring", [None, 0.05])
def test_three_steps_of_a_reward_model(trl, tmp_path, centring):
    """RewardTrainer on Qwen2ForSequenceClassification; and what either side saves, the other opens."""
    from transformers import AutoModelForSequenceClassification

    model = trl.reward_model(0)
    model.save_pretrained(tmp_path / "model")
    mine = load_reward_model(tmp_path / "model")
    before = [p.detach().clone() for p in mine.parameters()]
    trainer = trl.reward(tmp_path / "out", model, **(STEPS | dict(center_rewards_coefficient=centring)))
    inputs, losses = run_trl(trainer, model)
    rows = [Answer(ids[m.bool()].tolist()[:1], ids[m.bool()].tolist()[1:]) for ids, m in zip(
        inputs["input_ids"], inputs["attention_mask"])]
    running = RewardLoop(mine, [Pair(c, r) for c, r in zip(rows[:4], rows[4:])], config(steps=3, batch=4, micro=3, clip=1.0),
                         centring=centring or 0.0)
    history = with_sgd(running, 0.2).run()
    assert [x for _, x in history.losses] == pytest.approx(losses, abs=2e-5)
    model.save_pretrained(tmp_path / "trained")
    same_weights(mine, load_reward_model(tmp_path / "trained"), before)
    save_reward_model(mine, tmp_path / "ours")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", pad_token_id=0)
    assert type(opened).__name__ == "Qwen2ForSequenceClassification"
    for a in rows:
        theirs = opened(torch.tensor([a.prompt + a.tokens])).logits[0, 0]
        torch.testing.assert_close(mine.scores([a])[0], theirs, atol=1e-5, rtol=1e-5)


# --- invariances ------------------------------------------------------------------------------------------------------


def gradients(loop):
    running = with_sgd(loop)
    running.run()
    return running.stepper.optimizer.gradients, [(p, {k: v for k, v in m.items() if k != "memory/peak"}) for p, m in running.history.metrics]


def close(a, b):
    for x, y in zip(a[0], b[0]):
        for p, q in zip(x, y):
            assert (p is None) == (q is None)
            if p is not None:
                torch.testing.assert_close(p, q, atol=2e-6, rtol=2e-5)
    for (_, x), (_, y) in zip(a[1], b[1]):
        assert set(x) == set(y)
        if abs(y.get("rewards/margin", 1)) < 1e-6:  # at first policy and reference are equal: which of two rewards is larger is rounding
            x, y = ({k: v for k, v in m.items() if k != "rewards/accuracy"} for m in (x, y))
        assert x == pytest.approx(y, abs=2e-5)


@pytest.mark.parametrize("name", ["dpo", "rpo", "ld-dpo", "simpo", "wpo"])
def test_micro_batches_and_the_reference_change_nothing(name):
    pairs, cfg = some_pairs(), preference_recipe(name)
    whole = gradients(PreferenceLoop(policy(), pairs, cfg, config()))
    assert max(float(g.abs().max()) for g in whole[0][1] if g is not None) > 1e-4
    for how in (dict(micro=1), dict(micro=4), dict(reference="live"), dict(micro=4, reference="live")):
        close(gradients(PreferenceLoop(policy(), pairs, cfg, config(**how))), whole)


def test_micro_batches_change_nothing_elsewhere():
    pairs = some_pairs()
    labelled = [Labelled(p.chosen, i % 2 == 0) for i, p in enumerate(pairs)]
    steps = [Steps(p.chosen, sorted({0, len(p.chosen.tokens) - 1}), [1.0] * len({0, len(p.chosen.tokens) - 1})) for p in pairs]
    makers = (
        lambda **c: UnpairedLoop(policy(), labelled, UnpairedConfig(), config(**c)),
        lambda **c: RewardLoop(RewardModel.of(policy(), seed=1), pairs, config(**c), centring=0.01),
        lambda **c: ProcessLoop(RewardModel.of(policy(), seed=1), steps, config(**c)))
    for make in makers:
        whole = gradients(make())
        assert max(float(g.abs().max()) for g in whole[0][1] if g is not None) > 1e-4
        close(gradients(make(micro=4)), whole)


def test_every_metric_is_explained_and_every_explanation_used():
    pairs, seen = some_pairs(), set()
    labelled = [Labelled(p.chosen, i % 2 == 0) for i, p in enumerate(pairs)]
    for loop in (PreferenceLoop(policy(), pairs, PreferenceConfig(), config(steps=1)),
                 UnpairedLoop(policy(), labelled, UnpairedConfig(), config(steps=1)),
                 RewardLoop(RewardModel.of(policy()), pairs, config(steps=1))):
        seen |= set(loop.run().metrics[0][1])
    assert seen == set(OFFLINE_MEANING)


def test_log_probabilities_are_those_of_each_answer_alone():
    model = policy()
    answers = [a for p in some_pairs() for a in (p.chosen, p.rejected)]
    masked = replace(answers[3], mask=[i % 2 == 0 for i in range(len(answers[3].tokens))])
    answers[3] = masked
    found = logprobs_of(model, answers, tokens=40)
    flat = Flat(answers)
    torch.testing.assert_close(flat.spread(found), flat.logprobs(model).detach(), atol=1e-5, rtol=1e-5)
    for a, got in zip(answers, found):
        logits = model(torch.tensor([a.prompt + a.tokens]))[0, len(a.prompt) - 1 : -1]
        alone = logits.log_softmax(-1).gather(1, torch.tensor(a.tokens)[:, None])[:, 0].detach()
        kept = torch.tensor(a.mask if a.mask is not None else [True] * len(a.tokens))
        torch.testing.assert_close(got, torch.where(kept, alone, 0.0), atol=1e-5, rtol=1e-5)


def test_mismatched_answers_belong_to_the_example_before():
    """KTO's reference point reads every prompt with another example's answer, as trl pairs them."""
    answers = [p.chosen for p in some_pairs()]
    loop = UnpairedLoop(policy(), [Labelled(a, True) for a in answers], UnpairedConfig(), config())
    assert [m.prompt for m in loop.mismatched] == [a.prompt for a in answers]
    assert [m.tokens for m in loop.mismatched] == [answers[i - 1].tokens for i in range(len(answers))]
    assert not UnpairedLoop(policy(), [Labelled(a, True) for a in answers], UnpairedConfig("apo_zero"), config()).mismatched


@pytest.mark.parametrize("good", [True, False])
def test_labels_of_one_kind_give_numbers_of_that_kind_alone(good):
    answers = [p.chosen for p in some_pairs()]
    (_, numbers), = UnpairedLoop(policy(), [Labelled(a, good) for a in answers], UnpairedConfig(), config(steps=1)).run().metrics
    there, other = ("good", "bad") if good else ("bad", "good")
    assert math.isfinite(numbers[f"logps/{there}"]) and math.isnan(numbers[f"logps/{other}"]) and not [k for k in numbers if k.endswith("_sum")]


@pytest.mark.parametrize(("given", "says"), [("n/a", "n/a"), ([1], "margin"), (True, "True"), (math.nan, "nan")])
def test_a_margin_is_a_number(given, says):
    record = PreferenceRecord("1", "2", "3", extra={"margin": given})
    with pytest.raises(BadInput, match="margin") as error:
        encode_pairs(tokenizer(), [record], 20)
    assert says in str(error.value)
    assert [p.margin for p in encode_pairs(tokenizer(), [PreferenceRecord("1", "2", "3", extra={"margin": m}) for m in (None, 2)], 20)] == [0.0, 2.0]


def test_the_other_answer_of_a_pair_is_not_mismatched():
    """Pairs that were taken apart: both answers of a prompt stand side by side, and neither is a stranger to it."""
    answers = [Answer([p], [t]) for p, t in [(1, 11), (1, 12), (2, 21), (2, 22), (3, 31), (1, 13)]]
    assert [(m.prompt, m.tokens) for m in mismatched(answers)] == [([1], [31]), ([1], [31]), ([2], [12]), ([2], [12]), ([3], [22]), ([1], [31])]
    with pytest.raises(BadInput, match="same prompt"):
        mismatched(answers[:2])


def test_the_reference_is_the_given_weights():
    """T5: at the first step policy and reference agree exactly, whatever file the weights once came from."""
    model = policy()
    with torch.no_grad():
        model.embed.weight.mul_(1.1)
    for how in ("precompute", "live"):
        numbers = PreferenceLoop(model, some_pairs(), PreferenceConfig(), config(reference=how, steps=1)).run().metrics[0][1]
        assert numbers["rewards/margin"] == pytest.approx(0, abs=1e-6) and numbers["loss"] == pytest.approx(0.6931472, abs=1e-5)


# --- stop and go on ---------------------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch():
    a, b = Shuffled(5, 3, 1), Shuffled(5, 3, 1)
    seen = [a.next() for _ in range(5)]
    assert sorted(i for batch in seen for i in batch) == sorted(list(range(5)) * 3)
    b.load_state(Shuffled(5, 3, 1).state() | {"taken": 6})
    assert b.next() == seen[2]
    whole = Shuffled(5, 5, 1)
    assert len({tuple(whole.next()) for _ in range(4)}) > 2, "every epoch has its own order"
    with pytest.raises(BadInput, match="seed"):
        Shuffled(5, 3, 2).load_state(a.state())


KINDS = {
    "dpo": lambda where, steps: PreferenceLoop(policy(), some_pairs(), PreferenceConfig(), config(steps=steps, batch=4),
                                               checkpoint=where),
    "kto": lambda where, steps: UnpairedLoop(policy(), [Labelled(p.chosen, i % 2 == 0) for i, p in enumerate(some_pairs())],
                                             UnpairedConfig(), config(steps=steps, batch=4), checkpoint=where),
    "reward": lambda where, steps: RewardLoop(RewardModel.of(policy(), 1), some_pairs(), config(steps=steps, batch=4),
                                              checkpoint=where),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_bit_identical(kind, tmp_path):
    straight = KINDS[kind](None, 6)
    straight.run()
    first = KINDS[kind](tmp_path / "c", 6)

    def stop(event):
        if isinstance(event, events.Step) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with events.subscribed(stop), pytest.raises(Interrupted):
        first.run()
    assert first.history.steps == 3
    second = KINDS[kind](tmp_path / "c", 6)
    assert second.resume()
    second.run()
    assert second.history.steps == 6 and [x for _, x in second.history.losses] == [x for _, x in straight.history.losses]
    assert all(torch.equal(a, b) for a, b in zip(weights(straight.model), weights(second.model)))


# --- learning ---------------------------------------------------------------------------------------------------------


def echo_pairs(seed, n, digits):
    """The prompt's digit is preferred to another one."""
    rng, tok, made = random.Random(seed), tokenizer(), []
    for _ in range(n):
        d = rng.choice(digits)
        other = rng.choice([x for x in "0123456789" if x != d])
        made.append(Pair(*(encode_answer(tok, [{"role": "user", "content": d}], [{"role": "assistant", "content": x}])
                           for x in (d, other))))
    return made


def split(seed=0):
    """Held-out pairs: their (prompt, rejected) combinations do not stand in the training data."""
    everything = echo_pairs(seed, 400, "0123456789")
    key = {(tuple(p.chosen.prompt), tuple(p.rejected.tokens)) for p in everything}
    held = set(sorted(key)[::5])
    parts = [[p for p in everything if ((tuple(p.chosen.prompt), tuple(p.rejected.tokens)) in held) is inside]
             for inside in (False, True)]
    return parts[0], parts[1]


def test_dpo_learns_on_held_out_pairs():
    train, held = split()
    model = policy()
    reference = logprobs_of(model, [a for p in held for a in (p.chosen, p.rejected)])
    before = pair_accuracy(model, held)[0]
    loop = PreferenceLoop(model, train, PreferenceConfig(), config(steps=60, batch=16, optim=LEARN),
                          evaluate=lambda: ("pairs", *pair_accuracy(model, held, reference)))
    loop.config.evaluations = 1
    history = loop.run()
    assert before < 0.75 and history.evaluations[-1][1] > 0.95
    first, last = history.metrics[0][1], history.metrics[-1][1]
    assert last["rewards/accuracy"] > 0.9 > first["rewards/accuracy"] and last["rewards/margin"] > 1
    assert last["loss"] < 0.4 and {"logps/chosen", "logps/rejected"} <= set(last)


def test_kto_learns_from_single_labels():
    train, held = split(1)
    model = policy()
    reference = logprobs_of(model, [a for p in held for a in (p.chosen, p.rejected)])
    items = [Labelled(a, good) for p in train for a, good in ((p.chosen, True), (p.rejected, False))]
    UnpairedLoop(model, items, UnpairedConfig(), config(steps=100, batch=32, optim=LEARN)).run()
    assert pair_accuracy(model, held, reference)[0] > 0.9


def test_a_reward_model_learns_and_is_kept(tmp_path):
    train, held = split(2)
    model = RewardModel.of(policy(), seed=0)

    def accuracy():
        with torch.no_grad():
            s = model.scores([a for p in held for a in (p.chosen, p.rejected)])
        return float((s[0::2] > s[1::2]).float().mean())

    before = accuracy()
    RewardLoop(model, train, config(steps=120, batch=16, optim=LEARN), centring=0.01).run()
    assert before < 0.75 < 0.95 < accuracy()
    save_reward_model(model, tmp_path / "rm", tokenizer())
    again = load_reward_model(tmp_path / "rm")
    some = [p.chosen for p in held[:5]]
    with torch.no_grad():
        torch.testing.assert_close(again.scores(some), model.scores(some))
    with pytest.raises(BadInput, match="score"):
        pellucid.save(policy(), tmp_path / "lm")
        load_reward_model(tmp_path / "lm")


def test_steps_are_judged_one_by_one():
    """Even digits are right steps: a process model learns it for every place of a solution, on unseen ones."""
    rng, tok = random.Random(0), tokenizer()

    def solution():
        digits = [str(rng.randrange(10)) for _ in range(rng.randint(1, 4))]
        return StepwiseRecord("go", digits, [int(d) % 2 == 0 for d in digits])

    train, held = (encode_steps(tok, [solution() for _ in range(n)], 64, separator=" ") for n in (200, 60))
    model = RewardModel.of(policy(), seed=0)
    ProcessLoop(model, train, config(steps=60, batch=16, optim=LEARN)).run()
    with torch.no_grad():
        scores, owner = model.scores_at([x.answer for x in held], [x.ends for x in held])
    labels = torch.tensor([y for x in held for y in x.labels])
    assert float(((scores > 0) == (labels > 0.5)).float().mean()) > 0.95
    assert owner.bincount().tolist() == [len(x.ends) for x in held]


# --- from records -----------------------------------------------------------------------------------------------------


def test_records_become_examples():
    tok = tokenizer()
    user = [{"role": "user", "content": "7"}]
    answer = encode_answer(tok, user, [{"role": "assistant", "content": "12"}])
    ids, mask = tok.encode_chat([*user, {"role": "assistant", "content": "12"}])
    assert answer.prompt + answer.tokens == ids[: len(answer)] and answer.mask is None
    assert [i for i, m in zip(ids, mask) if m] == answer.tokens
    text = encode_answer(tok, "ab", "12")
    assert text.prompt == tok.encode("ab") and text.tokens == [*tok.encode("12"), tok.eos_ids[0]]
    two = encode_answer(tok, user, [{"role": "assistant", "content": "1"}, {"role": "user", "content": "2"},
                                    {"role": "assistant", "content": "3"}])
    assert two.mask is not None and 0 < two.trained < len(two.tokens)
    cut = fitted(answer, len(answer.prompt) + 1)
    assert cut.tokens == answer.tokens[:1] and fitted(answer, len(answer.prompt)) is None
    pairs = encode_pairs(tok, [PreferenceRecord("a", "1", "2", extra={"margin": 0.5}), PreferenceRecord("a" * 99, "1", "2")], 20)
    assert len(pairs) == 1 and pairs[0].margin == 0.5
    assert encode_labelled(tok, [UnpairedRecord("a", "1", True)], 20)[0].good
    steps = encode_steps(tok, [StepwiseRecord("a", ["1", "22"], [True, False])], 64)[0]
    newline = tok.encode("\n")
    assert [steps.answer.tokens[e] for e in steps.ends] == [newline[-1]] * 2 and steps.labels == [1.0, 0.0]
    room = len(steps.answer.prompt) + steps.ends[0] + 1
    short = encode_steps(tok, [StepwiseRecord("a", ["1", "22"], [True, False])], room)[0]
    assert short.ends == steps.ends[:1] and short.labels == [1.0] and len(short.answer) == room
    for wrong, told in ((lambda: encode_pairs(tok, [PreferenceRecord("a" * 99, "1", "2")], 20), "no example"),
                        (lambda: encode_answer(tok, "a", user), "two kinds")):
        with pytest.raises(BadInput, match=told):
            wrong()


@pytest.mark.parametrize("make, told", [
    (lambda: PreferenceLoop(policy(), some_pairs(), preference_recipe("aot"), config(micro=2)), "sorts"),
    (lambda: PreferenceLoop(policy(), [], PreferenceConfig(), config()), "nothing to train"),
    (lambda: PreferenceLoop(policy(), some_pairs(), PreferenceConfig(), config(batch=0)), "at least 1"),
    (lambda: PreferenceLoop(policy(), [Pair(Answer([], [1]), Answer([1], [2]))], PreferenceConfig(), config()), "no prompt"),
    (lambda: PreferenceLoop(policy(), [Pair(Answer([1], []), Answer([1], [2]))], PreferenceConfig(), config()), "token to learn"),
    (lambda: UnpairedLoop(policy(), [Labelled(Answer([1], [2]), True)] * 2, UnpairedConfig(), config(batch=1)), "two examples"),
    (lambda: ProcessLoop(RewardModel.of(policy()), [Steps(Answer([1], [2]), [0], [])], config()), "labels"),
])
def test_refusals(make, told):
    with pytest.raises(BadInput, match=told):
        make()
