"""Models beyond their context through the doors that people use: load, LLM, the engine."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import assert_equal, tokens, written

import pellucid
from pellucid.engine import Sample, SamplingParams, run_all
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.request import Request
from pellucid.errors import BadInput
from pellucid.models import save
from pellucid.models.long_context import with_dual_chunk, with_rope_scaling, with_streaming
from pellucid.nn.specs import Attn, DualChunk

CHANGES = {"streaming": lambda spec: with_streaming(spec, 4, 20), "dual chunk": lambda spec: with_dual_chunk(spec, 32, 8)}


@pytest.fixture(scope="module", params=["qwen3", "mistral-nemo", "qwen3.5-moe"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("long")
    written(request.param, path)
    return path


def by_hand(model, prompt, most):
    """Greedy, each step a pass over everything."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("change", CHANGES)
def test_generation_goes_on_beyond_the_context(folder, change):
    """The trained context is 128 tokens; both ways of serving go on to 150 and agree with passes over everything."""
    model = pellucid.load(folder, change=CHANGES[change])
    assert model.spec.context == 128 and model.spec.limit == 2**31
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (130, 9)]
    want = [by_hand(model, p, 20) for p in prompts]
    samples = [Sample(p, SamplingParams(max_tokens=20), 0) for p in prompts]
    run_all(model, samples, eos=[])
    assert [s.tokens for s in samples] == want
    engine = Engine(model, eos=[], config=EngineConfig(cache_tokens=400, chunk=50))
    requests = [Request(p, SamplingParams(max_tokens=20)) for p in prompts]
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    assert [r.output for r in requests] == want


def test_without_it_the_context_is_the_limit(folder):
    model = pellucid.load(folder)
    with pytest.raises(BadInput, match="exceed the context of 128"):
        run_all(model, [Sample(tokens(1, 120)[0].tolist(), SamplingParams(max_tokens=20), 0)], eos=[])


def test_saving_keeps_the_model_as_it_was_trained(folder, tmp_path):
    model = pellucid.load(folder, change=CHANGES["streaming"])
    save(model, tmp_path / "new")
    assert pellucid.load(tmp_path / "new").spec == pellucid.load(folder).spec


def test_position_scaling_is_written_as_any(folder, tmp_path):
    """As a config.json with these fields, and read by transformers."""
    from transformers import AutoModelForCausalLM

    model = pellucid.load(folder, change=lambda spec: with_rope_scaling(spec, {"rope_type": "yarn", "factor": 4.0}))
    save(model, tmp_path / "new")
    assert pellucid.load(tmp_path / "new").spec == model.spec and model.spec.context == 512
    theirs, x = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager"), tokens(1, 300)
    with torch.no_grad():
        want = theirs(input_ids=x).logits
        assert_equal(model(x), want)
        assert (pellucid.load(folder)(x) - want).abs().max() > 1e-2


def test_ntk_by_parts_is_yarn_without_its_temperature(tmp_path):
    """The temperature is a factor of q and of k: the same as sharper scores."""
    written("qwen3", tmp_path)

    def loaded(scale=None, **more):
        def change(spec):
            spec = with_rope_scaling(spec, {"rope_type": "yarn", "factor": 4.0, **more})
            return replace(spec, layers=tuple(replace(layer, mixer=replace(layer.mixer, scale=scale)) for layer in spec.layers))
        return pellucid.load(tmp_path, change=change)

    yarn, x = loaded(), tokens(1, 60)
    factor = yarn.spec.layers[0].mixer.rope.attention_factor
    assert factor == pytest.approx(1.1386294)
    with torch.no_grad():
        want = yarn(x)
        assert_equal(loaded(scale=16**-0.5 * factor**2, attention_factor=1.0)(x), want)
        assert (loaded(attention_factor=1.0)(x) - want).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe", "qwen3-next"])
def test_dual_chunks_that_config_json_states(name, tmp_path):
    """Qwen2.5-1M's field: read, computed, served beyond the context, written back; up to a chunk's length it is plain attention."""
    from transformers import AutoModelForCausalLM

    written(name, tmp_path)
    plain, x = pellucid.load(tmp_path), tokens(1, 100)
    config = json.loads((tmp_path / "config.json").read_text())
    stated = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 48}
    (tmp_path / "config.json").write_text(json.dumps({**config, "dual_chunk_attention_config": stated}))
    model = pellucid.load(tmp_path)
    reaches = {layer.mixer.reach for layer in model.spec.layers if isinstance(layer.mixer, Attn)}
    assert reaches == {DualChunk(32, 8, 48)} and model.spec.limit == 2**31
    changed = pellucid.load(tmp_path, change=lambda spec: with_dual_chunk(plain.spec, 32, 8))
    with torch.no_grad():
        assert_equal(model(x[:, :24]), plain(x[:, :24]))
        assert_equal(model(x[:, :48]), changed(x[:, :48]))
        assert (model(x) - changed(x)).abs().max() > 1e-3
    save(model, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dual_chunk_attention_config"] == stated
    assert pellucid.load(tmp_path / "new").spec == model.spec
    AutoModelForCausalLM.from_pretrained(tmp_path / "new")  # which knows nothing of it, and opens the folder
    prompt = x[0, :60].tolist()
    engine, request = Engine(model, eos=[], config=EngineConfig(cache_tokens=400, chunk=16)), Request(prompt, SamplingParams(max_tokens=1, logprobs=True))
    engine.add(request)
    while engine.busy:
        engine.step()
    with torch.no_grad():  # the prompt in pieces, of which the engine knows the length
        want = model(x[:, :60])[0, -1].log_softmax(-1).max(-1)
    assert request.output == [int(want.indices)] and request.logprobs == [pytest.approx(float(want.values), abs=1e-4)]


@pytest.mark.parametrize(("stated", "said"), [
    ([], "an object"), ({"local_size": 3}, "chunk_size"), ({"chunk_size": 8}, "local_size"), ({"chunk_size": 8, "local_size": 5}, "half"),
    ({"chunk_size": 8.5, "local_size": 1}, "chunk_size"), ({"chunk_size": 8, "local_size": 1, "original_max_position_embeddings": -1}, "original_max")])
def test_dual_chunks_stated_wrongly(stated, said, tmp_path):
    written("qwen2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(BadInput, match=said):
        pellucid.models.spec_of({**config, "dual_chunk_attention_config": stated})
