"""Rollouts and their rows: what was sampled is what is graded and trained on, token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny_policy import Echo, Noise, policy, token_logprobs, tokenizer, weights

from pellucid.align.rollout import Group, Rollouts, components
from pellucid.align.rows import pack_completions
from pellucid.align.support import kept_tokens, support_rows
from pellucid.data.packing import IGNORE
from pellucid.engine import LLM, Sample, SamplingParams
from pellucid.errors import BadInput
from pellucid.tasks import finished_only


def problems(task, n=6, seed=0):
    rng = random.Random(seed)
    return [task.sample(rng, "train") for _ in range(n)]


def rollouts(task=None, model=None, max_tokens=6, **how):
    return Rollouts(model or policy(), tokenizer(), task or Noise(), max_tokens=max_tokens, **how)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_prompts_end_where_the_assistant_begins():
    made = rollouts()
    (problem,) = problems(made.task, 1)
    whole, mask = tokenizer().encode_chat([{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": "7"}])
    ids = made.prompt(problem)
    assert whole[: len(ids)] == ids and not any(mask[: len(ids)]) and mask[len(ids)]


def test_groups_are_what_the_engine_gives_for_consecutive_seeds():
    made = rollouts()
    asked = problems(made.task, 3)
    groups = made.sample(asked, 4, 0.7, seed=90)
    llm = LLM(made.model, tokenizer())
    for i, (problem, group) in enumerate(zip(asked, groups)):
        params = SamplingParams(max_tokens=6, temperature=0.7, seed=90 + 4 * i, n=4)
        (request,) = llm.generate([made.prompt(problem)], params)
        assert [s.tokens for s in group] == [c.token_ids for c in request.outputs]
        assert [made.text(s) for s in group] == [c.text for c in request.outputs]
        assert [s.finish_reason for s in group] == [c.finish_reason for c in request.outputs]
    assert len({tuple(s.tokens) for g in groups for s in g}) > 6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_tempered_distribution(temperature):
    made = rollouts()
    for group in made.sample(problems(made.task), 3, temperature, seed=1):
        for s in group:
            with torch.no_grad():
                expected = token_logprobs(made.model, s, temperature)
            torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_batch", [1, 3, 512])
def test_batches_do_not_change_a_rollout(max_batch):
    made = rollouts(max_batch=max_batch)
    whole = rollouts().sample(problems(made.task), 3, 1.0, seed=5)
    cut = made.sample(problems(made.task), 3, 1.0, seed=5)
    assert [[s.tokens for s in g] for g in whole] == [[s.tokens for s in g] for g in cut]


def test_a_completion_that_ended_keeps_its_end_token_and_a_cut_one_has_none():
    made = rollouts(max_tokens=3)
    done = [s for g in made.sample(problems(made.task, 12), 4, 1.0, seed=2) for s in g]
    ended = [s for s in done if s.finish_reason == "stop"]
    cut = [s for s in done if s.finish_reason == "length"]
    assert len(ended) > 5 and len(cut) > 5
    ends = set(tokenizer().eos_ids)
    assert all(s.tokens[-1] in ends and not ends & set(s.tokens[:-1]) for s in ended)
    assert all(len(s.tokens) == 3 and not ends & set(s.tokens) for s in cut)
    assert all(made.text(s) == tokenizer().decode(s.tokens[:-1]) for s in ended)
    assert all(made.text(s) == tokenizer().decode(s.tokens) for s in cut)


def test_every_call_samples_from_the_weights_of_the_moment():
    """Also where the model computes in another dtype than its weights have, and a cast copy is kept."""
    for dtype in (None, torch.bfloat16):
        model = policy()
        model.compute_dtype = dtype
        made, asked = rollouts(model=model), problems(Noise(), 8)
        before = [[s.tokens for s in g] for g in made.sample(asked, 2, 1.0, seed=3)]
        master = weights(model)
        assert before == [[s.tokens for s in g] for g in made.sample(asked, 2, 1.0, seed=3)]
        assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(master, weights(model)))
        with torch.no_grad():
            model.head_weight.neg_()
        after = made.sample(asked, 2, 1.0, seed=3)
        assert before != [[s.tokens for s in g] for g in after]
        fresh = rollouts(model=model).sample(asked, 2, 1.0, seed=3)
        assert [[s.tokens for s in g] for g in after] == [[s.tokens for s in g] for g in fresh]


def test_a_bfloat16_rollout_has_the_logprobs_of_the_bfloat16_model():
    model = policy()
    model.compute_dtype = torch.bfloat16
    for group in rollouts(model=model).sample(problems(Noise(), 4), 2, 1.0, seed=3):
        for s in group:
            with torch.no_grad():
                expected = token_logprobs(model, s, 1.0)
            assert (torch.tensor(s.logprobs) - expected.float()).abs().max() < 0.1


def test_a_context_too_short_is_refused_before_sampling():
    with pytest.raises(BadInput, match="context"):
        rollouts(max_tokens=64).sample(problems(Noise(), 2), 2, 1.0, seed=0)


# --- grades -----------------------------------------------------------------------------------------------------------


def test_finished_only():
    full = {"format": 1.0, "correct": 1.0, "progress": 1.0}
    assert finished_only(full, True) == full
    assert finished_only(full, False) == {"format": 0.0, "correct": 0.0, "progress": 0.9}
    assert finished_only({"format": 1.0, "correct": 0.0, "progress": 0.3}, False) == {
        "format": 0.0, "correct": 0.0, "progress": 0.3}
    assert full == {"format": 1.0, "correct": 1.0, "progress": 1.0}  # the task's own dict is not changed


def test_a_cut_completion_earns_neither_form_nor_answer_but_keeps_partial_credit():
    made = rollouts(max_tokens=2)
    seen = {"stop": 0, "length": 0}
    for group in made.groups(problems(made.task, 20), 4, 1.0, seed=4):
        for s, text, rewards in zip(group.samples, group.texts, group.rewards):
            grades = made.task.grade(group.problem, text)
            assert rewards["progress"] == min(grades["progress"], 0.9)
            expected = grades if s.finish_reason == "stop" else {"format": 0.0, "correct": 0.0}
            assert (rewards["format"], rewards["correct"]) == (expected["format"], expected["correct"])
            seen[s.finish_reason] += 1
    assert min(seen.values()) > 5


def test_components_are_a_table_with_nan_where_a_task_has_no_such_component():
    p = problems(Echo(), 1)[0]
    groups = [Group(p, [], [], [{"correct": 1.0, "format": 1.0}, {"correct": 0.0, "format": 1.0}]),
              Group(p, [], [], [{"correct": 0.0, "progress": 0.5}, {"correct": 0.0, "progress": 0.25}])]
    table = components(groups)
    assert set(table) == {"correct", "format", "progress"}
    assert all(t.shape == (2, 2) and t.dtype == torch.float64 for t in table.values())
    assert table["correct"].tolist() == [[1, 0], [0, 0]]
    assert table["progress"][1].tolist() == [0.5, 0.25] and table["progress"][0].isnan().all()


def test_evaluation_gets_text_length_and_whether_it_ended():
    made = rollouts(Echo(), max_tokens=3)
    asked = problems(made.task, 10)
    answers = made.for_evaluation(seed=8)(asked, 3, 1.0)
    for group, samples in zip(answers, made.sample(asked, 3, 1.0, seed=8)):
        assert [(c.text, c.tokens, c.finished) for c in group] == [
            (made.text(s), len(s.tokens), s.finish_reason == "stop") for s in samples]
    greedy = made.for_evaluation(seed=8)(asked, 2, 0.0)
    assert all(a == b for a, b in greedy)


# --- rows -------------------------------------------------------------------------------------------------------------


def sample(prompt, tokens):
    return Sample(prompt, SamplingParams(), 0, tokens, [-1.0] * len(tokens), "stop")


def many(n=40, seed=0):
    rng = random.Random(seed)
    return [sample([rng.randrange(272) for _ in range(rng.randrange(1, 12))],
                   [rng.randrange(272) for _ in range(rng.randrange(1, 9))]) for _ in range(n)]


@pytest.mark.parametrize("T", [None, 19, 25, 64, 3])
def test_labels_stand_exactly_where_sampled_tokens_are_predicted(T):
    made = many()
    packed = pack_completions(made, T)
    seen = 0
    for i, s in enumerate(made):
        rows, columns = (packed.documents == i).nonzero(as_tuple=True)
        assert len(rows.unique()) == 1  # whole in one row
        assert columns.tolist() == list(range(columns[0], columns[0] + len(columns)))
        row, here = int(rows[0]), slice(int(columns[0]), int(columns[-1]) + 1)
        assert packed.tokens[row, here].tolist() == s.prompt + s.tokens[:-1]
        assert packed.positions[row, here].tolist() == list(range(len(columns)))
        labels = packed.labels[row, here].tolist()
        assert labels == [IGNORE] * (len(s.prompt) - 1) + s.tokens  # never a token of the prompt; the last one included
        seen += len(columns)
    padding = packed.documents < 0
    assert int(padding.sum()) == padding.numel() - seen
    assert (packed.labels[padding] == IGNORE).all() and not packed.tokens[padding].any()
    longest = max(len(s.prompt) + len(s.tokens) - 1 for s in made)
    assert packed.tokens.shape[1] == (2 * longest if T is None else max(T, longest))


def test_the_smallest_cases():
    one = pack_completions([sample([5], [9])])
    assert (one.tokens.tolist(), one.labels.tolist(), one.documents.tolist()) == ([[5]], [[9]], [[0]])
    two = pack_completions([sample([5, 6], [9]), sample([5, 6], [8, 7])])
    assert two.tokens.shape == (1, 5)
    assert math.isclose(float((two.documents >= 0).float().mean()), 1.0)


# --- truncated sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [dict(top_p=0.8), dict(top_k=3), dict(top_p=0.9, top_k=5)], ids=str)
def test_a_truncated_sample_keeps_what_could_be_drawn_and_its_logprobs_among_that(how):
    """Against the same truncation of the trainer's own distributions; the ratio over the support is 1 (trl#6789)."""
    made = rollouts(**how)
    sizes, ratios, naive = set(), [], []
    for group in made.groups(problems(made.task), 4, 0.9, seed=1):
        for s in group.samples:
            ids = torch.tensor([s.prompt + s.tokens])
            with torch.no_grad():
                logits = made.model(ids[:, :-1])[0, len(s.prompt) - 1 :] / 0.9
            expected = kept_tokens(logits, top_p=how.get("top_p", 1.0), top_k=how.get("top_k", 0))
            logp = support_rows(logits, torch.tensor(s.tokens), expected)
            assert len(s.support) == len(s.tokens) == len(s.logprobs)
            for m, ids in enumerate(s.support):
                assert ids.tolist() == expected[m : m + 1].ids.tolist() and s.tokens[m] in ids
                sizes.add(len(ids))
            ratios += (logp - torch.tensor(s.logprobs)).exp().tolist()
            naive += (token_logprobs(made.model, s, 0.9) - torch.tensor(s.logprobs)).exp().tolist()
    assert len(sizes) > 1 or how.get("top_k")
    assert max(abs(r - 1) for r in ratios) < 1e-3 and sum(naive) / len(naive) < 0.97


def test_no_support_is_kept_where_nothing_is_cut():
    assert all(s.support is None for g in rollouts().sample(problems(Noise(), 2), 2, 1.0, 0) for s in g)
    assert all(s.support is None for g in rollouts(top_p=0.5).sample(problems(Noise(), 2), 2, 1.0, 0) for s in g)
