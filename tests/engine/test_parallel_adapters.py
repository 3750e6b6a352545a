"""LoRA adapters over several processes: answers are those of one process, whose logits are PEFT's (tests/server/test_adapters.py)."""

from __future__ import annotations

import functools
import json
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from several import ROOMY, TIGHT, requests, run, same
from tiny_splits import tokenizer, write_adapter

from pellucid.engine.adapters import Adapter, read_adapter
from pellucid.engine.config import EngineConfig
from pellucid.engine.core import Engine
from pellucid.engine.fleet import Fleet
from pellucid.engine.layout import Layout
from pellucid.engine.opening import open_model
from pellucid.engine.request import Request
from pellucid.errors import BadInput
from pellucid.models.hub import read_config, spec_of
from pellucid.parallel import Processes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
OPTIONS = {"llama": ({"target_modules": ALL, "r": 3, "lora_alpha": 12}, {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8}),
           "deepseek-v3": ({"target_modules": LATENT, "r": 3, "lora_alpha": 12}, {"target_modules": ["o_proj"], "r": 1, "lora_alpha": 4}),
           "gpt2": ({"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "lora_alpha": 6}, {"target_modules": ["c_attn"], "r": 2, "lora_alpha": 6}),
           "qwen3-next": ({"target_modules": ["q_proj", "o_proj", "in_proj_qkvz", "out_proj"], "r": 2, "lora_alpha": 6}, {"target_modules": ["v_proj"], "r": 2})}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Two folders of PEFT's for each family."""
    @functools.cache
    def of(family: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(family)
        for i, options in enumerate(OPTIONS[family]):
            write_adapter(folders(family), root / f"adapter{i}", **options)
        return root / "adapter0", root / "adapter1"

    return of


def mixed(first: Adapter, second: Adapter, **fields) -> list[Request]:
    """A third of the requests with each, a third with none."""
    asked = requests(**fields)
    for i, r in enumerate(asked):
        r.adapter, r.namespace = ((None, ""), (first, "first"), (second, "second"))[i % 3]
    return asked


@pytest.fixture(scope="module")
def alone(folders, adapters):
    @functools.cache
    def of(family: str, bits: int | None = None) -> list[Request]:
        model = open_model(folders(family), bits=bits)
        return run(Engine(model, [], ROOMY, tokenizer()), mixed(*(read_adapter(path, model) for path in adapters(family))))

    return of


@pytest.mark.parametrize(("kind", "family", "config"), [
    ("tensor", "llama", TIGHT), ("tensor", "deepseek-v3", ROOMY), ("replicas", "llama", ROOMY), ("disaggregated", "llama", TIGHT),
    ("attention", "llama", TIGHT), ("attention", "deepseek-v3", ROOMY),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("tensor", "gpt2", ROOMY), ("tensor", "qwen3-next", ROOMY), ("disaggregated", "deepseek-v3", ROOMY),
        ("tensor", "llama", EngineConfig(cache_tokens=128, block=4, budget=16, running=4, swap=True)),
        ("tensor", "llama", EngineConfig(cache_tokens=800, block=4, drafts=3))))])
def test_requests_of_several_adapters_run_beside_each_other(kind, family, config, fleet_of, adapters, alone):
    fleet, plain = fleet_of(family, kind, config), requests()
    loaded = [fleet.load_adapter(path) for path in adapters(family)]
    assert [a.name for a in loaded] == ["adapter0", "adapter1"] and not loaded[0].layers
    same(run(fleet, mixed(*loaded)), alone(family))
    changed = [a.output != b.output for a, b in zip(alone(family), run(fleet, plain), strict=True)]
    assert changed[1] and changed[2] and not changed[0] and not changed[3]
    same(run(fleet, mixed(*loaded)), alone(family))


def test_adapters_beside_int8_weights(fleet_of, adapters, alone):
    fleet = fleet_of("llama", "tensor", ROOMY, quantize="int8")
    for a, b in zip(run(fleet, mixed(*map(fleet.load_adapter, adapters("llama")))), alone("llama", 8), strict=True):
        assert a.output == b.output


def test_they_come_and_go_while_requests_run(fleet_of, adapters, alone):
    """Loaded from another thread; taken back under running requests, which end with it; gone from the processes then."""
    fleet, (first, second) = fleet_of("llama", "tensor", TIGHT), adapters("llama")
    got: list[Adapter] = []
    busy = requests(max_tokens=15)
    for r in busy:
        fleet.add(r)
    thread = threading.Thread(target=lambda: got.extend([fleet.load_adapter(first), fleet.load_adapter(second)]))
    thread.start()
    while fleet.busy:
        fleet.step()
    thread.join(30)
    asked = mixed(*got)
    for r in asked:
        fleet.add(r)
    fleet.step()
    for adapter in got:
        fleet.drop_adapter(adapter)
    while fleet.busy:
        fleet.step()
    same(asked, alone("llama"))
    late = mixed(*got)[1]
    run(fleet, [late, *(others := requests()[:2])])
    assert late.finish_reason == "error" and late.output == [] and all(len(r.output) == r.params.max_tokens for r in others)
    again = [fleet.load_adapter(path, "again") for path in (first, second)]
    assert again[0].name == "again" and again[0].number not in {a.number for a in got}
    same(run(fleet, mixed(*again)), alone("llama"))


def test_what_cannot_be_used_is_refused_and_the_engine_lives_on(fleet_of, adapters, folders, tmp_path):
    fleet, (first, _) = fleet_of("llama", "tensor"), adapters("llama")
    with pytest.raises(BadInput, match="does not fit this model"):
        fleet.load_adapter(adapters("deepseek-v3")[0])
    with pytest.raises(BadInput, match="holds no LoRA adapter"):
        fleet.load_adapter(folders("llama"))
    for path in first.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes((first / "adapter_model.safetensors").read_bytes()[:-100])
    with pytest.raises(BadInput, match="no readable"):
        fleet.load_adapter(tmp_path)
    config = json.loads((first / "adapter_config.json").read_text()) | {"alpha_pattern": ["not", "a", "table"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((first / "adapter_model.safetensors").read_bytes())
    with pytest.raises(BadInput):
        fleet.load_adapter(tmp_path)
    own = read_adapter(first, open_model(folders("llama")))
    with pytest.raises(BadInput, match="in this process alone"):
        fleet.add(mixed(own, own)[1])
    same(run(fleet, requests()), run(Engine(open_model(folders("llama")), [], ROOMY, tokenizer()), requests()))


def test_a_process_without_requests_adds_its_part_of_an_adapter(fleet_of, adapters, alone):
    """All requests are in one process; then all without an adapter in one and all with one in the other: passes of different adapters
    are the same in both."""
    fleet = fleet_of("llama", "attention", TIGHT)
    loaded = [fleet.load_adapter(path) for path in adapters("llama")]
    for place in (lambda r: 1, lambda r: int(r.adapter is None), lambda r: int(r.adapter is loaded[0])):
        fleet.router.choose = place  # type: ignore[method-assign]
        same(run(fleet, mixed(*loaded)), alone("llama"))
        fleet.router.loads = [0, 0]
    some = mixed(*loaded)
    for r in some:
        fleet.add(r)
    for _ in range(4):
        fleet.step()
    for r in some:  # an adapter goes with the last request that has it, under those of the other process
        if r.adapter is loaded[0]:
            fleet.cancel(r)
    fleet.drop_adapter(loaded[0])
    while fleet.busy:
        fleet.step()
    kept = [i for i, r in enumerate(some) if r.adapter is not loaded[0]]
    same([some[i] for i in kept], [alone("llama")[i] for i in kept])


@pytest.mark.slow
def test_groups_that_share_feed_forwards_take_adapters_and_draft_by_themselves(folders, adapters, alone):
    """Attention's parts of an adapter are cut in two, those of feed-forwards in four."""
    layout, folder = Layout(tp=2, dp_attention=2), folders("llama")
    processes = Processes("pellucid.engine.worker", layout.processes, layout.links, threads=1)
    try:
        fleet = Fleet(folder, layout, spec_of(read_config(folder)), tokenizer(), TIGHT, processes=processes)
        loaded = [fleet.load_adapter(path) for path in adapters("llama")]
        same(run(fleet, mixed(*loaded)), alone("llama"))
        fleet.router.choose = lambda r: 1  # type: ignore[method-assign]
        same(run(fleet, mixed(*loaded)), alone("llama"))
        fleet.close()
    finally:
        processes.close()


def test_matrices_that_are_multiplied_in_parts_take_no_adapter(folders, tmp_path):
    """kv_b of latent attention: a hook on it would never be called, and the adapter would change nothing."""
    write_adapter(folders("deepseek-v3"), tmp_path / "adapter", target_modules=["kv_b_proj"], r=2)
    with pytest.raises(BadInput, match="kv_b_proj"):
        read_adapter(tmp_path / "adapter", open_model(folders("deepseek-v3")))


def test_parts_of_an_adapter_add_up(folders, adapters):
    from pellucid.parallel import ALONE, Slice, load_part

    model = open_model(folders("llama"))
    whole = read_adapter(adapters("llama")[0], model)
    parts = [read_adapter(adapters("llama")[0], load_part(folders("llama"), Slice(rank, 2), ALONE)[0]) for rank in range(2)]
    for name, change in whole.layers.items():
        mine = [part.layers[name] for part in parts]
        if name.endswith((".o", ".down")):
            assert torch.equal(torch.cat([m.A for m in mine], 1), change.A) and all(torch.equal(m.B, change.B) for m in mine)
        else:
            assert all(torch.equal(m.A, change.A) for m in mine)
            assert sum(m.B.numel() for m in mine) == change.B.numel() and torch.allclose(sum(m.B.sum(0) for m in mine), change.B.sum(0), atol=1e-5)
