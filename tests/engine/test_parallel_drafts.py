"""Speculation over several processes: drafts change how many steps an answer takes, and no token of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from several import requests, run, same
from tiny_splits import checkpoint, tokenizer

import pellucid
from pellucid.engine import LLM, SamplingParams
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.fleet import Fleet
from pellucid.engine.layout import Layout
from pellucid.engine.opening import open_model
from pellucid.models.hub import read_config, spec_of
from pellucid.nn import Decoder, init_weights
from pellucid.parallel import Processes
from pellucid.quant import bits_named

PLAIN = EngineConfig(cache_tokens=800, block=4)
DRAFTED, TIGHT = replace(PLAIN, drafts=3), EngineConfig(cache_tokens=120, block=4, budget=9, running=4, drafts=3)


@pytest.fixture(scope="module")
def friend(tmp_path_factory):
    """A draft model that is right half of the time: the model with other numbers in a few places, and one layer less."""
    def of(family: str) -> Path:
        folder = tmp_path_factory.mktemp("friend") / family
        return checkpoint(family, folder, num_hidden_layers=1)

    return of


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """A checkpoint with a layer of multi-token prediction. What comes next depends on the last token mostly, in the model and in the layer
    alike, and on all others a little: some proposals stand."""
    folder = tmp_path_factory.mktemp("ahead") / "model"
    model = pellucid.load(checkpoint("deepseek-v3", tmp_path_factory.mktemp("base") / "model"))
    longer = init_weights(Decoder(replace(model.spec, mtp=(model.spec.layers[-1],))), 0)
    longer.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name, p in longer.named_parameters():
            if ".o." in name or "down" in name:
                p.mul_(0.02)
        (layer,) = longer.mtp
        layer.join.weight.mul_(0.1)[:, : model.spec.dim] += torch.eye(model.spec.dim)
    pellucid.save(longer, folder, tokenizer=tokenizer())
    assert pellucid.load(folder).spec.mtp
    return folder


def figures(engine: Engine) -> tuple[int, int]:
    return engine.totals["proposed_tokens"], engine.totals["accepted_tokens"]


@pytest.mark.parametrize(("kind", "family", "config"), [
    ("tensor", "llama", TIGHT), ("replicas", "llama", DRAFTED), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("tensor", "deepseek-v3", DRAFTED), ("disaggregated", "llama", TIGHT), ("attention", "deepseek-v3", TIGHT)))])
def test_a_draft_model_proposes_beside_every_lead(kind, family, config, fleet_of, folders, friend):
    """The model itself proposes: whatever is proposed stands. Then another one, of which little does."""
    want = run(Engine(open_model(folders(family)), [], PLAIN, tokenizer()), requests())
    fleet = fleet_of(family, kind, config, draft=folders(family))
    same(run(fleet, requests()), want)
    proposed, accepted = figures(fleet)
    assert fleet.drafts == 3 and proposed > 40 and accepted > 0.8 * proposed
    fleet.close()
    fleet = fleet_of(family, kind, config, draft=friend(family), same=200)
    same(run(fleet, requests()), want)
    proposed, accepted = figures(fleet)
    assert proposed > 40 and accepted < proposed


@pytest.mark.slow
def test_sampled_answers_are_those_of_one_process_too(fleet_of, folders):
    asked = dict(temperature=0.9, top_k=40, repetition_penalty=1.1)
    want = run(Engine(open_model(folders("qwen3")), [], PLAIN, tokenizer()), requests(**asked))
    fleet = fleet_of("qwen3", "tensor", DRAFTED, draft=folders("qwen3"))
    same(run(fleet, requests(**asked)), want)
    assert figures(fleet)[1] > 0


@pytest.mark.parametrize(("kind", "config"), [
    ("tensor", TIGHT), ("attention", TIGHT), pytest.param("replicas", DRAFTED, marks=pytest.mark.slow), pytest.param("disaggregated", DRAFTED, marks=pytest.mark.slow)])
def test_the_models_own_prediction_layer_proposes(kind, config, fleet_of, ahead):
    """Under tensor parallelism it is cut as the other layers are, and its passes are shared: it proposes what the whole one proposes."""
    config = replace(config, proposer="mtp", prefix="none")
    one = Engine(open_model(ahead), [], config, tokenizer())
    want = run(one, requests())
    same(want, run(Engine(open_model(ahead), [], PLAIN, tokenizer()), requests()))
    fleet = fleet_of(ahead, kind, config)
    same(run(fleet, requests()), want)
    assert figures(fleet)[1] > 10
    if kind == "tensor":
        assert figures(fleet) == figures(one)
        assert fleet.ready[0]["weights"] == fleet.ready[1]["weights"]
    same(run(fleet, requests()), want)  # twins of the first ones have left everywhere


@pytest.mark.parametrize("place", [lambda r: 1, lambda r: int(len(r.prompt) > 20)], ids=["one", "long"])
def test_who_has_nothing_to_propose_takes_part_where_feed_forwards_are_shared(place, fleet_of, ahead):
    """All requests in one process; and the longer ones apart: the two make different numbers of passes."""
    config = replace(DRAFTED, proposer="mtp", prefix="none")
    one = Engine(open_model(ahead), [], config, tokenizer())
    fleet = fleet_of(ahead, "attention", config)
    fleet.router.choose = place  # type: ignore[method-assign]
    same(run(fleet, requests()), run(one, requests()))
    assert figures(fleet) == figures(one) and figures(one)[1] > 10


@pytest.mark.slow
def test_groups_that_share_feed_forwards_propose_by_themselves(ahead):
    layout = Layout(tp=2, dp_attention=2)
    processes = Processes("pellucid.engine.worker", layout.processes, layout.links, threads=1)
    config = replace(TIGHT, proposer="mtp", prefix="none")
    want = run(Engine(open_model(ahead), [], config, tokenizer()), requests())
    try:
        fleet = Fleet(ahead, layout, spec_of(read_config(ahead)), tokenizer(), config, processes=processes)
        for _ in range(2):
            same(run(fleet, requests()), want)
            assert figures(fleet)[1] > 10
            fleet.router.choose = lambda r: 0  # type: ignore[method-assign]
        fleet.close()
    finally:
        processes.close()


def test_a_prediction_layer_that_nobody_asks_for_is_not_held(fleet_of, ahead):
    asked = fleet_of(ahead, "tensor", replace(DRAFTED, proposer="mtp")).ready[0]["weights"]
    fleet_of.close_all()
    assert fleet_of(ahead, "tensor", DRAFTED).ready[0]["weights"] < 0.8 * asked


def test_everything_at_once(fleet_of, ahead):
    """INT8 weights, cut, with a prediction layer that proposes."""
    config = replace(DRAFTED, proposer="mtp")
    want = run(Engine(open_model(ahead, bits=bits_named("int8")), [], PLAIN, tokenizer()), requests())
    fleet = fleet_of(ahead, "tensor", config, quantize="int8")
    for a, b in zip(run(fleet, requests()), want, strict=True):
        assert a.output == b.output
    assert figures(fleet)[1] > 10


def test_llm_takes_a_draft_model_over_processes(folders):
    plain = LLM(folders("qwen3"))
    llm = LLM(folders("qwen3"), tp=2, draft=folders("qwen3"), config=EngineConfig(cache_tokens=512, running=8))
    try:
        params = SamplingParams(max_tokens=12)
        assert llm.generate(["hello world", "12 + 30"], params) == plain.generate(["hello world", "12 + 30"], params)
        assert llm.fleet is not None and llm.fleet.totals["accepted_tokens"] > 5
    finally:
        llm.close()
