"""Dialogues in a rollout: the ids are those of the template, the mask is the model's own tokens, and a model learns from them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny_policy import SPEC, Dials, policy, token_logprobs, tokenizer

from pellucid import events
from pellucid.align import recipe
from pellucid.align.aggregation import count
from pellucid.align.dialogue import as_messages, reply_ids, spans, turns_of
from pellucid.align.objective import objective
from pellucid.align.online import OnlineConfig, OnlineLoop
from pellucid.align.rewards import batch_of
from pellucid.align.rollout import Rollouts, trained_lengths
from pellucid.align.rows import pack_completions
from pellucid.align.update import Update
from pellucid.data.packing import IGNORE, pack_samples
from pellucid.engine.batch import Batch
from pellucid.errors import BadInput
from pellucid.nn import Decoder, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.tasks import Mixture, Problem, evaluate
from pellucid.train import Loop, LoopConfig

ENDS = set(tokenizer().eos_ids)
LONG = replace(SPEC, context=400)


class Guess:
    """Ask for the secret (any digit does), be told it, say it again."""

    name, dials, schemas, max_turns = "guess", Dials(), [], 2

    def sample(self, rng: random.Random, split: str) -> Problem:
        asked, secret = rng.choice("0123456789"), rng.choice("0123456789")
        return Problem(self.name, asked, secret, asked)

    def reply(self, problem, turns):
        return problem.answer if len(turns) < self.max_turns else None

    def demonstrate(self, problem, rng):
        return problem.prompt

    def grade(self, problem, text):
        return {"format": float(len(text) == 1), "correct": 0.0}

    def grade_turns(self, problem, turns):
        return {"format": float(all(len(t) == 1 for t in turns)), "correct": float(len(turns) == 2 and turns[1] == problem.answer)}

    def dialogue(self, problem, rng):
        return [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": rng.choice("0123456789")},
                {"role": "tool", "content": problem.answer}, {"role": "assistant", "content": problem.answer}]


class Chatty(Guess):
    """Three replies of different lengths and kinds: a tool's, a user's, both together."""

    name, max_turns = "chatty", 4

    def reply(self, problem, turns):
        return ["7", {"role": "user", "content": "and 1 2 3?"},
                [{"role": "tool", "content": "4"}, {"role": "tool", "content": "56"}], None][len(turns) - 1]


def patient():
    """The tiny policy with room for a dialogue."""
    model = Decoder(LONG)
    model.load_state_dict(policy().state_dict())
    return model.eval()


def rollouts(task, model=None, max_tokens=200, **how):
    return Rollouts(model or patient(), tokenizer(), task, max_tokens=max_tokens, **how)


def problems(task, n=6, seed=0):
    rng = random.Random(seed)
    return [task.sample(rng, "train") for _ in range(n)]


class Scripted(Batch):
    """A batch whose model writes what it is told: turn after turn, for every sample the same."""

    script: list[list[int]] = []

    def _give(self, rows, tokens):
        for i, s in enumerate(rows):
            sampled = [s.tokens[a:b] for said, a, b in spans(s) if said] if s.tokens else []
            turn, at = (len(sampled) - 1, len(sampled[-1])) if sampled else (0, 0)
            if sampled and sampled[-1][-1] in ENDS:
                turn, at = turn + 1, 0
            if not self.unread.get(id(s)):
                tokens[i] = self.script[turn][at]
        super()._give(rows, tokens)


def scripted(monkeypatch, task, words):
    """An episode in which the model says these words, and its messages."""
    end = tokenizer().end_of_turn_id
    monkeypatch.setattr(Scripted, "script", [[*tokenizer().encode(w), end] for w in words])
    monkeypatch.setattr("pellucid.engine.batch.Batch", Scripted)
    (problem,) = problems(task, 1)
    (group,) = rollouts(task).groups([problem], 2, 1.0, 3)
    return problem, group


# --- the ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["1", "23", "4 5", "6"], ["0 1", "", "2", "999"]], ids=str)
def test_the_ids_are_those_that_the_template_gives_for_the_same_conversation(monkeypatch, words):
    problem, group = scripted(monkeypatch, Chatty(), words)
    for s, episode in zip(group.samples, group.episodes):
        assert [m["role"] for m in episode] == ["assistant", "tool", "assistant", "user", "assistant", "tool", "tool", "assistant"]
        assert [m["content"] for m in episode if m["role"] == "assistant"] == words == list(turns_of(s, tokenizer()))
        ids, mask = tokenizer().encode_chat([{"role": "user", "content": problem.prompt}, *episode])
        last = max(i for i, said in enumerate(mask) if said) + 1
        assert s.prompt + s.tokens == ids[:last]
        assert [False] * len(s.prompt) + s.mask == mask[:last]
        assert s.finish_reason == "stop" and s.trained == sum(mask)


def test_a_turn_in_other_tokens_than_the_tokenizers_keeps_them(monkeypatch):
    """What was sampled stays: "user" as two tokens is not joined to what the tokenizer would use."""
    tok = tokenizer()
    apart = [*tok.encode("u"), *tok.encode("s"), *tok.encode("er")]
    assert tok.encode("user") != apart and tok.decode(apart) == "user"
    monkeypatch.setattr(Scripted, "script", [[*apart, tok.end_of_turn_id], [*tok.encode("2"), tok.end_of_turn_id]])
    monkeypatch.setattr("pellucid.engine.batch.Batch", Scripted)
    (group,) = rollouts(Guess()).groups(problems(Guess(), 1), 2, 1.0, 0)
    for s in group.samples:
        assert s.tokens[: len(apart) + 1] == [*apart, tok.end_of_turn_id] and group.episodes[0][0]["content"] == "user"


def test_thoughts_of_earlier_turns_stay_where_a_template_would_drop_them(monkeypatch):
    words = ["<think>\n1\n</think>\n\n2", "3", "4", "5"]
    problem, group = scripted(monkeypatch, Chatty(), words)
    rendered = tokenizer().render([{"role": "user", "content": problem.prompt}, *group.episodes[0]], add_generation_prompt=False)
    text = tokenizer().decode(group.samples[0].tokens)
    assert "<think>" in text and "<think>" not in rendered  # a user spoke after it
    assert group.turns(0)[0] == words[0]


# --- mask, log-probabilities, limits --------------------------------------------------------------------------------------


def test_masks_logprobs_and_turns_of_sampled_episodes():
    made = rollouts(Mixture([(Guess(), 1.0), (Chatty(), 1.0)]))
    groups = made.groups(problems(made.task, 10), 4, 0.8, 5)
    several = 0
    for g in groups:
        for i, s in enumerate(g.samples):
            assert len(s.tokens) == len(s.logprobs) and len(s.tokens) <= 200
            mask = s.mask or [True] * len(s.tokens)
            assert len(mask) == len(s.tokens) and mask[0] and mask[-1]
            with torch.no_grad():
                expected = token_logprobs(made.model, s, 0.8)
            for given, mine, theirs in zip(mask, s.logprobs, expected.tolist()):
                assert mine == pytest.approx(theirs, abs=1e-4) if given else mine == 0.0
            turns = [s.tokens[a:b] for said, a, b in spans(s) if said]
            assert len(turns) == len(g.turns(i)) <= {"guess": 2, "chatty": 4}[g.problem.task]
            assert all(t[-1] in ENDS and not ENDS & set(t[:-1]) for t in turns[:-1])
            told = [m for m in g.episodes[i] if m["role"] != "assistant"]
            for a, b in [(a, b) for said, a, b in spans(s) if not said]:
                text = tokenizer().decode(s.tokens[a:b])
                assert all(m["content"] in text for m in told[:1]) or len(told) > 1
            several += len(turns) > 1
    assert several > 20
    assert trained_lengths(groups).tolist() == [[sum(s.mask or [1] * len(s.tokens)) for s in g.samples] for g in groups]


def test_an_episode_does_not_depend_on_what_else_is_in_the_batch():
    task = Mixture([(Guess(), 1.0), (Chatty(), 1.0)])
    asked = problems(task, 8)
    whole = rollouts(task).sample(asked, 4, 1.0, 9)
    for max_batch in (1, 5):
        cut = rollouts(task, max_batch=max_batch).sample(asked, 4, 1.0, 9)
        assert [[(s.tokens, s.mask, s.finish_reason) for s in g] for g in cut] == [
            [(s.tokens, s.mask, s.finish_reason) for s in g] for g in whole]


@pytest.mark.parametrize("max_tokens", range(3, 150, 12))
def test_the_limit_counts_replies_and_never_ends_on_one(max_tokens):
    for g in rollouts(Chatty(), max_tokens=max_tokens).groups(problems(Chatty(), 4), 3, 1.0, 2):
        for i, s in enumerate(g.samples):
            assert len(s.tokens) <= max_tokens
            assert s.mask is None or s.mask[-1]
            if s.finish_reason == "length" and len(s.tokens) < max_tokens:  # no room for what came next
                told = Chatty().reply(g.problem, g.turns(i))
                assert len(s.tokens) + len(reply_ids(tokenizer(), as_messages(told))) >= max_tokens
                assert s.tokens[-1] in ENDS
            assert g.rewards[i]["correct"] == 0.0 or s.finish_reason == "stop"


def test_no_more_turns_than_the_task_allows():
    class Endless(Guess):
        name, max_turns = "endless", 3

        def reply(self, problem, turns):
            return "1"

    for g in rollouts(Endless()).groups(problems(Endless(), 4), 4, 1.0, 0):
        assert max(len(g.turns(i)) for i in range(4)) == 3
        assert all(s.finish_reason == "stop" for i, s in enumerate(g.samples) if len(g.turns(i)) == 3 and s.tokens[-1] in ENDS)


def test_a_tool_that_fails_is_told_to_the_model_and_noted_once():
    class Broken(Guess):
        name = "broken"

        def reply(self, problem, turns):
            return str(1 // 0)

    seen = []
    with events.subscribed(seen.append):
        groups = rollouts(Broken()).groups(problems(Broken(), 4), 4, 1.0, 0)
    told = [m["content"] for g in groups for episode in g.episodes for m in episode if m["role"] == "tool"]
    assert len(told) > 4 and set(told) == {"error: ZeroDivisionError: integer division or modulo by zero"}
    assert sum("failed to reply" in e.text for e in seen if e.kind == "note") == 1


def test_replies_of_other_kinds_are_refused():
    for wrong in (3, [], {"role": "assistant", "content": "x"}, [{"role": "tool"}], {"role": "user", "content": 3}):
        with pytest.raises(BadInput, match="a task replied"):
            as_messages(wrong)


# --- grades -----------------------------------------------------------------------------------------------------------------


def test_the_whole_episode_is_graded_and_handed_to_reward_functions():
    made = rollouts(Guess())
    groups = made.groups(problems(Guess(), 20), 8, 1.0, 4)
    right = 0
    for g in groups:
        for i, (s, rewards) in enumerate(zip(g.samples, g.rewards)):
            wanted = Guess().grade_turns(g.problem, g.turns(i)) if s.finish_reason == "stop" else {"correct": 0.0}
            assert rewards["correct"] == wanted["correct"]
            right += int(rewards["correct"])
    assert right > 3
    batch = batch_of(groups)
    assert batch.completions[0] == groups[0].episodes[0] and batch.columns["turns"][0] == groups[0].turns(0)


def test_evaluation_sees_dialogues():
    made = rollouts(Guess())
    scores = evaluate(Guess(), made.for_evaluation(0), 8, 4, 0)
    assert 0 < scores.format <= 1


# --- the objective sees the model's tokens only ------------------------------------------------------------------------------


def test_rows_hold_labels_at_sampled_tokens_only():
    samples = [s for g in rollouts(Chatty()).sample(problems(Chatty(), 5), 3, 1.0, 1) for s in g]
    packed = pack_completions(samples)
    for i, s in enumerate(samples):
        row, columns = (packed.documents == i).nonzero(as_tuple=True)
        labels = packed.labels[row[0], columns[0] : columns[-1] + 1].tolist()
        mask = s.mask or [True] * len(s.tokens)
        assert labels == [IGNORE] * (len(s.prompt) - 1) + [t if m else IGNORE for t, m in zip(s.tokens, mask)]
        assert packed.tokens[row[0], columns[0] : columns[-1] + 1].tolist() == (s.prompt + s.tokens)[:-1]


def config(**changes):
    fields = dict(steps=2, prompts=6, group=4, max_tokens=120, evaluations=0, seed=5, optim=OptimConfig("adamw", lr=1e-3))
    return OnlineConfig(**(fields | changes))


def test_given_tokens_have_no_gradient_of_their_own(monkeypatch):
    """The gradient of the loss at every output that predicts a given token is exactly zero, and at the others it is not."""
    running = OnlineLoop(patient(), tokenizer(), Guess(), config(objective=recipe("grpo", beta=0.0)))
    groups = running.sampling.collect().groups
    x, credit = running._judge(groups, running.resolved())
    chosen = [k for k, (i, j) in enumerate(x.places) if credit.lengths[i, j] > 0]
    x.share = False  # a prompt for each completion: easier to count
    update = Update(x, chosen, count(credit.lengths.flatten()))
    assert x.tokens == int(trained_lengths(groups)[credit.live].sum())
    caught, hidden = [], Decoder.hidden

    def watch(self, *args, **kw):
        out = hidden(self, *args, **kw)
        out.retain_grad()
        caught.append(out)
        return out

    monkeypatch.setattr(Decoder, "hidden", watch)
    running.model.train()
    logp, _, whose, at = update.forward(running.model, slice(0, len(update.rows)), 1.0)
    loss, _ = objective(logp, None, None, x.advantages[at], whose, running.resolved(), update.counts)
    loss.backward()
    size = caught[0].grad.abs().sum(-1)
    given = (update.rows.labels == IGNORE) & (update.rows.documents >= 0)
    learning = torch.zeros_like(size, dtype=torch.bool)
    learning[update.at >= 0] = x.advantages[update.at[update.at >= 0]] != 0
    assert bool((size[given] == 0).all()) and bool((size[learning] > 0).all()) and int(learning.sum()) > 20
    replies = sum(len(s.tokens) - s.trained for s in x.samples)
    assert replies > 100 and int(given.sum()) == replies + sum(len(s.prompt) - 1 for s in x.samples)
    assert (logp.detach() - x.sampler[at]).abs().max() < 1e-4  # each beside the sampler's own


@pytest.mark.parametrize("method", ["ppo", "reinforce++", "gspo"])
def test_advantages_of_a_dialogue_are_those_of_its_sampled_tokens_alone(method):
    """A reply in the middle of an episode changes nothing: GAE and returns are carried over it (verl's fix of 2026)."""
    cfg = recipe(method, reward_beta=0.0) if method != "gspo" else recipe(method)
    running = OnlineLoop(patient(), tokenizer(), Guess(), config(objective=cfg))
    groups = running.sampling.collect().groups
    x, credit = running._judge(groups, running.resolved())
    assert any(s.mask for s in x.samples)
    values = torch.zeros(x.tokens) if x.values is None else x.values
    raw = []
    for k in range(len(x.samples)):
        here = (x.sequence == k).nonzero().flatten()
        i, j = x.places[k]
        v, tokens = [*values[here].double().tolist(), 0.0], len(here)
        assert tokens == x.samples[k].trained
        a = [0.0] * (tokens + 1)
        for t in reversed(range(tokens)):  # by hand, over the model's own tokens
            r = float(credit.total[i, j]) if t == tokens - 1 else 0.0
            a[t] = (r + v[t + 1] - v[t]) + 0.95 * a[t + 1] if method == "ppo" else r + a[t + 1]
        raw += [float(credit.advantages[i, j])] * tokens if method == "gspo" else a[:tokens]
    expected = torch.tensor(raw, dtype=torch.float64)
    if method != "gspo":
        expected = (expected - expected.mean()) * (expected.var() + 1e-8).rsqrt()
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(x.advantages.double(), expected, atol=1e-5, rtol=0)


def test_turns_and_given_tokens_are_told():
    seen = []
    running = OnlineLoop(patient(), tokenizer(), Guess(), config(steps=1))
    with events.subscribed(seen.append):
        running.run()
    (step,) = [e for e in seen if e.kind == "step"]
    assert 1 < step.metrics["turns/mean"] <= 2 and 0.3 < step.metrics["turns/given_tokens"] < 0.95


def test_it_learns_to_say_what_the_tool_told_it():
    """From one right answer in three: the answer stands in the reply, which is different in every episode."""
    rng, tok, made = random.Random(0), tokenizer(), []
    for _ in range(400):
        p = Guess().sample(rng, "train")
        messages = Guess().dialogue(p, rng)
        if rng.random() < 0.7:
            messages[-1]["content"] = rng.choice("0123456789")
        made.append(tok.encode_chat(messages))
    model = init_weights(Decoder(LONG), 0)
    Loop(model, pack_samples(made, 128), LoopConfig(steps=160, rows=16, optim=OptimConfig("muon", lr=0.02, adam_lr=0.01),
                                                   schedule=Schedule("linear"))).run()
    cfg = config(steps=24, prompts=12, group=8, max_tokens=60, clip=1.0, seed=1, schedule=Schedule("linear", warmup=0.05),
                 optim=OptimConfig("muon", lr=0.02, adam_lr=0.01))
    running = OnlineLoop(model, tok, Guess(), cfg)

    def accuracy():
        groups = running.rollouts.groups(problems(Guess(), 40, 77), 4, 1.0, 123)
        return sum(r["correct"] for g in groups for r in g.rewards) / 160

    before = accuracy()
    history = running.run()
    after = accuracy()
    assert before < 0.5 and after > 0.8, (before, after, [round(m["accuracy"], 2) for _, m in history.metrics])
