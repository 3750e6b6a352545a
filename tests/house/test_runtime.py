"""Every automatic choice carries its reason; impossible ones are refused with the next step."""

from __future__ import annotations

import json
import os
import platform
import random
import socket

import pytest
import torch

from pellucid import runtime
from pellucid.errors import BadInput


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_device_choices_and_reasons(monkeypatch: pytest.MonkeyPatch):
    assert runtime.choose_device("cpu") == runtime.Choice(torch.device("cpu"), "asked for")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto = runtime.choose_device()
    assert auto.value == torch.device("cpu") and "no CUDA" in auto.reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert "H200" in runtime.choose_device().reason and runtime.choose_device().value.type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "gpu", "toaster", "", "meta", "xpu", "hpu:3"])
def test_impossible_devices_are_refused(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput) as refused:
        runtime.choose_device(name)
    assert refused.value.next and refused.value.exit_code == 2


def test_threads_are_set_and_explained():
    assert runtime.choose_threads(1).reason == "asked for" and torch.get_num_threads() == 1
    usable = runtime.choose_threads()
    assert usable.value == torch.get_num_threads() <= (os.cpu_count() or 1) and "cores" in usable.reason
    for impossible in (0, -2):
        with pytest.raises(BadInput):
            runtime.choose_threads(impossible)


def test_dtype_names():
    assert runtime.dtype_of("bf16") is runtime.dtype_of("bfloat16") is torch.bfloat16
    assert runtime.dtype_of(torch.float64) is torch.float64
    with pytest.raises(BadInput, match="float31"):
        runtime.dtype_of("float31")


def test_dtype_is_chosen_by_measurement(monkeypatch: pytest.MonkeyPatch):
    for fast, expected in ((200.0, torch.bfloat16), (110.0, torch.float32)):  # 1.3 times faster wins, 1.1 does not
        monkeypatch.setattr(runtime, "matmul_gflops", lambda *a, fast=fast: fast if a[3] == torch.bfloat16 else 100.0)
        choice = runtime.choose_dtype(256, torch.device("cpu"))
        assert choice.value is expected and f"{fast:.0f}" in choice.reason and "100" in choice.reason


def test_best_seconds_takes_the_least_of_many(monkeypatch: pytest.MonkeyPatch):
    ticks, calls = iter([0.0, 0.0, 0.5, 0.5, 1.0, 1.2, 1.2, 3.0, 4.0, 4.0]), []
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks))
    assert runtime.best_seconds(lambda: calls.append(1), 2.0) == pytest.approx(0.2)
    assert len(calls) == 4  # one to warm up, three timed


def test_speeds_are_work_over_time(monkeypatch: pytest.MonkeyPatch):
    def a_millisecond(call, budget):
        call()
        return 1e-3

    monkeypatch.setattr(runtime, "best_seconds", a_millisecond)
    assert runtime.matmul_gflops(64, 128, 256, torch.float32) == pytest.approx(2 * 64 * 128 * 256 * 1e3 / 1e9)
    assert runtime.read_bandwidth_gbs(8) == pytest.approx(8 * 2**20 * 1e3 / 1e9)


def test_seeds_reach_python_and_torch():
    runtime.seed_everything(3)
    first = random.random(), torch.rand(2).tolist()
    runtime.seed_everything(3)
    assert first == (random.random(), torch.rand(2).tolist())
    runtime.seed_everything(4)
    assert first != (random.random(), torch.rand(2).tolist())


def test_a_seed_that_no_generator_takes_is_refused():
    for possible in (-(2**63), -1, 0, 2**63 - 1):
        runtime.seed_everything(possible)
    for impossible in (2**63, -(2**63) - 1, 10**30):
        with pytest.raises(BadInput, match="--seed") as refused:
            runtime.seed_everything(impossible)
        assert refused.value.next


def test_the_machine_card_tells_versions_and_no_names():
    card = runtime.machine_card()
    assert card["torch"] == torch.__version__ and card["cores"] == os.cpu_count()
    text = json.dumps(card)
    assert socket.gethostname() not in text and platform.node() not in text and os.path.expanduser("~") not in text


def test_peak_memory_grows():
    before = runtime.peak_memory_bytes()
    assert before is None or before > 10 * 2**20


@pytest.mark.parametrize(("given", "want"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_waiting_threads_spin_briefly_unless_the_user_has_said(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], want: str | None):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.os, "environ", copy := dict(os.environ))
    runtime.spin_briefly()
    assert copy.get("GOMP_SPINCOUNT") == want
