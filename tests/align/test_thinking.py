"""Budget forcing: plain decoding where nothing is forced, and never a token more than the budget."""

import random

import pytest
from biased_policy import llm
from tiny_policy import Echo, tokenizer

from pellucid import events
from pellucid.align import thinking
from pellucid.align.thinking import END, OPEN, Budget, budgeted, think, thinking_curve
from pellucid.engine import SamplingParams
from pellucid.errors import BadInput
from pellucid.tasks import evaluate

TOK = tokenizer()
END_ID, OPEN_ID, EOS = TOK.id_of(END), TOK.id_of(OPEN), set(TOK.eos_ids)
CLOSING = TOK.encode(Budget(1).closing)


def prompts(n=5, opened=True):
    rng = random.Random(0)
    made = [TOK.encode_chat([{"role": "user", "content": str(rng.randrange(10 ** (1 + i % 3)))}], add_generation_prompt=True)[0] for i in range(n)]
    return [p + [OPEN_ID] * opened for p in made]


def plain(model, asked, most, n=4, temperature=1.0, seed=7):
    outputs = model.generate(asked, SamplingParams(max_tokens=most, temperature=temperature, seed=seed, n=n))
    return [[c.token_ids for c in o.outputs] for o in outputs]


def both(groups, others):
    return [(t, other) for group, theirs in zip(groups, others) for t, other in zip(group, theirs)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", [Budget(30, 10), Budget(12, 18), Budget(5, 25), Budget(1, 29)])
def test_without_force_it_is_plain_decoding_token_for_token(budget, temperature):
    asked, n = prompts(12), 1 if temperature == 0 else 4
    seen = {"stop": 0, "length": 0, "forced": 0}
    for t, other in both(think(llm(), asked, budget, n=n, temperature=temperature, seed=7), plain(llm(), asked, 40, n, temperature)):
        if t.forced:
            seen["forced"] += 1
            assert t.tokens[: budget.thinking] == other[: budget.thinking]
            continue
        assert t.tokens == other[: len(t.tokens)] and not any(t.written)
        assert t.finish_reason == ("stop" if t.tokens[-1] in EOS else "length")
        assert t.tokens == other if t.finish_reason == "stop" else len(t.tokens) == t.answer_at + budget.answer
        seen[t.finish_reason] += 1
    assert temperature == 0 or seen["stop"] > 3 or (budget.thinking == 1 and seen["forced"] > 20), seen


def test_a_stream_that_goes_on_behind_the_budget_draws_as_if_it_had_not_stopped():
    """Completions that end their thought before the budget and their answer behind it cross from one part to the other."""
    crossing = 0
    budget = Budget(6, 30)
    for t, other in both(think(llm(), prompts(12), budget, n=6, temperature=1.0, seed=7), plain(llm(), prompts(12), 40, 6)):
        if not t.forced and t.answer_at is not None and len(t.tokens) > budget.thinking:
            crossing += 1
            assert t.tokens == other[: len(t.tokens)]
    assert crossing > 5


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("waits", [0, 1, 3])
@pytest.mark.parametrize("most", [1, 2, 7, 20])
def test_never_more_than_the_budget(most, waits, opened):
    model = llm(start=0.0 if opened else 8.0)
    budget = Budget(most, answer=6, waits=waits)
    wait, seen = TOK.encode(budget.wait), 0
    for group in think(model, prompts(6, opened), budget, n=6, temperature=1.0, seed=3):
        for t in group:
            thinks = opened or t.text.startswith(OPEN)
            assert len(t.written) == len(t.tokens) and t.thinking_tokens <= most and t.waited <= waits
            if not thinks:
                assert len(t.tokens) <= most + 6 and t.answer_at == 0 and not t.forced and not any(t.written)
                continue
            seen += 1
            thought = t.tokens[: t.thinking_tokens]
            assert END_ID not in thought and sum(t.written[: t.thinking_tokens]) == t.waited * len(wait)
            if t.answer_at is None:
                assert t.tokens[-1] in EOS and len(t.tokens) == t.thinking_tokens + 1 <= most
                continue
            between = t.tokens[t.thinking_tokens : t.answer_at]
            assert between == (CLOSING if t.forced else [END_ID]) and all(t.written[t.thinking_tokens : t.answer_at]) == t.forced
            assert not t.forced or t.thinking_tokens == most
            answer = t.tokens[t.answer_at :]
            assert len(answer) <= 6 and not EOS & set(answer[:-1]) and not any(t.written[t.answer_at :])
            assert (t.finish_reason == "stop") == bool(EOS & set(answer[-1:]))
            assert t.text == TOK.decode(t.tokens[:-1] if t.finish_reason == "stop" else t.tokens)
    assert seen > 10


def test_a_forced_answer_is_what_the_model_says_behind_the_closed_thought():
    asked = prompts(8)
    forced = [(p, t) for p, (t,) in zip(asked, think(llm(end=-20, eos=-20), asked, Budget(4, 8)))]
    for prompt, t in forced:
        assert t.forced and t.tokens[:4] == plain(llm(end=-20, eos=-20), [prompt], 4, 1, 0.0)[0][0]
        (continued,) = plain(llm(end=-20, eos=-20), [prompt + t.tokens[: t.answer_at]], 8, 1, 0.0)
        assert t.tokens[t.answer_at :] == continued[0] and t.text.count(END) == 1


def test_each_end_is_taken_back_and_the_model_goes_on_from_wait():
    eager = llm(end=50.0, eos=-20)  # ends its thought at once, again and again
    for waits in (0, 1, 4):
        for (t,) in think(eager, prompts(3), Budget(30, 1, waits=waits, wait=" 0") if waits else Budget(10, 1)):
            assert t.waited == waits and t.thinking_tokens == waits * len(TOK.encode(" 0")) and not t.forced
            assert t.tokens[: t.thinking_tokens] == TOK.encode(" 0") * waits and t.tokens[t.thinking_tokens] == END_ID


def test_an_end_of_the_turn_inside_a_thought_is_taken_back_too():
    ends = llm(end=-20.0, eos=50.0)
    (t,) = think(ends, prompts(1), Budget(10, 3, waits=2, wait=" 0"))[0]
    assert t.waited == 2 and t.answer_at is None and t.finish_reason == "stop" and not EOS & set(t.tokens[:-1])
    (t,) = think(ends, prompts(1), Budget(10, 3))[0]
    assert t.tokens == [TOK.end_of_turn_id] and t.thinking_tokens == 0 and t.text == ""


def test_waits_share_one_budget():
    """What was spent stays spent: with room for two waits only, the third end is left as it is."""
    wait = len(TOK.encode(" 0"))
    (t,) = think(llm(end=50.0, eos=-20), prompts(1), Budget(2 * wait + 1, 1, waits=9, wait=" 0"))[0]
    assert t.waited == 2 and t.thinking_tokens == 2 * wait


def test_no_thought_at_all():
    for opened in (True, False):
        for (t,) in think(llm(), prompts(4, opened), Budget(0, 5)):
            head = ([] if opened else [OPEN_ID]) + CLOSING
            assert t.tokens[: len(head)] == head and all(t.written[: len(head)]) and t.thinking_tokens == 0 and t.forced
            assert t.answer_at == len(head) and 1 <= len(t.tokens) - len(head) <= 5


def test_an_end_of_several_tokens_is_found_by_its_text(monkeypatch):
    """Models without a token of their own for the tag: the same results when it is looked for as text."""
    for budget in (Budget(20, 6), Budget(9, 6, waits=2)):
        by_id = think(llm(), prompts(5), budget, n=4, temperature=1.0, seed=1)
        with monkeypatch.context() as m:
            m.setattr(type(TOK), "id_of", lambda self, name: None)
            assert think(llm(), prompts(5), budget, n=4, temperature=1.0, seed=1) == by_id
    forcing = thinking._Forcing(llm(), Budget(5), 0.0)
    forcing.end_id = None
    spelled = [TOK.encode(c)[0] for c in END]
    assert forcing._place([5, *spelled, 6]) == (1, 1 + len(spelled)) and forcing._place(spelled[:-1]) is None


def test_batches_and_training_mode_change_nothing():
    model = llm()
    whole = think(model, prompts(5), Budget(8, 6, waits=1), n=3, temperature=1.0, seed=2)
    model.model.train()
    model.max_batch, before = 2, model.max_batch
    try:
        assert think(model, prompts(5), Budget(8, 6, waits=1), n=3, temperature=1.0, seed=2) == whole and model.model.training
    finally:
        model.max_batch = before
        model.model.eval()
    assert len({tuple(t.tokens) for group in whole for t in group}) > 8


@pytest.mark.parametrize("how", [{"thinking": -1}, {"thinking": 4, "answer": 0}, {"thinking": 4, "waits": -1}, {"thinking": 4, "waits": 1, "wait": ""},
                                 {"thinking": 4, "closing": "Answer:"}])
def test_impossible_budgets(how):
    with pytest.raises(BadInput):
        Budget(**how)


def test_a_context_too_short_is_refused_before_sampling():
    with pytest.raises(BadInput, match="context"):
        think(llm(), prompts(1), Budget(60, 30))


def test_the_curve_is_the_evaluation_under_each_budget():
    task, budgets, seen = Echo(), [Budget(0, 6), Budget(4, 6), Budget(12, 6), Budget(12, 6, waits=2, wait=" 0")], []
    model = llm(start=6.0)
    with events.subscribed(seen.append):
        curve = thinking_curve(model, task, budgets, problems=1, draws=8, seed=3)
    assert [(p.budget, p.waits) for p in curve] == [(0, 0), (4, 0), (12, 0), (12, 2)]
    for point, budget in zip(curve, budgets):
        thoughts = []
        scores = evaluate(task, budgeted(model, budget, 3, thoughts), 1, 1, 3, draws=8)
        assert point.accuracy == scores.pass_at_1 and point.thinking_tokens == sum(t.thinking_tokens for t in thoughts) / 8
        assert scores.mean_length == sum(len(t.tokens) for t in thoughts) / 8
    assert curve[0].thinking_tokens == 0 < curve[1].thinking_tokens < curve[2].thinking_tokens <= curve[3].thinking_tokens <= 12
    assert curve[0].forced == 1 >= curve[1].forced >= curve[2].forced and curve[3].waited > 0 == curve[2].waited
    named = [e for e in seen if isinstance(e, events.Evaluation)]
    assert [e.value for e in named] == [p.accuracy for p in curve] and named[3].details["waits"] == 2
