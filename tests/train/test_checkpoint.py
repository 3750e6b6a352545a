"""Resume states on disk: whole or not at all, wherever the process dies; broken ones are refused in words."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from tiny_training import decoder, equal, rows, weights

import pellucid
from pellucid.errors import BadInput
from pellucid.optim import OptimConfig, build_optimizer
from pellucid.train import Loop, LoopConfig, has_checkpoint, language_loss, load_checkpoint, save_checkpoint


def trained(steps, seed=0):
    model = decoder(seed)
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(steps):
        language_loss(model, rows())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def loaded(folder):
    model = decoder(seed=77)
    optimizer = build_optimizer(model, OptimConfig())
    return load_checkpoint(folder, model, optimizer), model, optimizer


def test_everything_that_decides_the_next_step_comes_back(tmp_path):
    model, optimizer = trained(2)
    torch.manual_seed(5)
    random.seed(5)
    save_checkpoint(tmp_path / "c", model, optimizer, {"step": 2, "text": "澄明"})
    expected = torch.rand(4), random.random(), random.gauss(0, 1)
    torch.manual_seed(6)
    random.seed(6)
    state, other, _ = loaded(tmp_path / "c")
    got = torch.rand(4), random.random(), random.gauss(0, 1)
    assert torch.equal(got[0], expected[0]) and got[1:] == expected[1:]
    assert (state["step"], state["text"]) == (2, "澄明")
    assert equal(weights(model), weights(other))


def test_a_checkpoint_is_a_model_folder_too(tmp_path):
    from transformers import AutoModelForCausalLM

    model, optimizer = trained(1)
    save_checkpoint(tmp_path / "c", model, optimizer, {})
    assert equal(weights(pellucid.load(tmp_path / "c")), weights(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert torch.equal(theirs.lm_head.weight, model.head_weight)


# --- death during a save ----------------------------------------------------------------------------------------------

POINTS = ["save_file", "replace", "rmtree", "fsync"]


def die_in_a_save(folder, call, number, model, optimizer):
    """A child process saves step 2 over step 1 and is gone, without any clean-up, at the numbered call. True: it died."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    try:
        from pellucid.train import checkpoint

        module = {"save_file": checkpoint, "replace": os, "rmtree": shutil, "fsync": os}[call]
        real, seen = getattr(module, call), []

        def mortal(*args, **how):
            seen.append(1)
            if len(seen) == number:
                os._exit(9)
            return real(*args, **how)

        setattr(module, call, mortal)
        save_checkpoint(folder, model, optimizer, {"step": 2})
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("call", POINTS)
def test_a_process_that_dies_during_a_save_leaves_a_whole_checkpoint(call, tmp_path):
    one, two = trained(1), trained(2)
    deaths = 0
    for number in range(1, 12):
        folder = tmp_path / f"{number}" / "state"
        save_checkpoint(folder, *one, {"step": 1})
        if not die_in_a_save(folder, call, number, *two):  # trained here: a child computes without kernels
            break
        deaths += 1
        assert has_checkpoint(folder)
        state, model, _ = loaded(folder)
        assert equal(weights(model), weights({1: one, 2: two}[state["step"]][0]))
        assert os.listdir(folder.parent) == ["state"]  # nothing of the dead save is left
        save_checkpoint(folder, *two, {"step": 2})  # and the next save is fine
        assert loaded(folder)[0]["step"] == 2
    assert deaths >= {"replace": 4}.get(call, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_loop_resumes_after_a_death_between_the_two_renames(tmp_path):
    def loop(seed):
        return Loop(decoder(seed), rows(), LoopConfig(steps=4, rows=2), checkpoint=tmp_path / "state")

    running = loop(0)
    running.history.steps = 3
    running.save()
    (tmp_path / "state").rename(tmp_path / ".state.abcdefgh.old")
    (tmp_path / ".state.abcdefgh").mkdir()
    other = loop(1)
    assert other.resume() and other.history.steps == 3
    assert equal(weights(other.model), weights(running.model))


def test_neighbours_with_like_names_are_left_alone(tmp_path):
    for name in ("state.old", ".state.backup.old", ".states.abcdefgh.old", "stated", ".state.ABCDEFGH"):
        (tmp_path / name).mkdir()
    assert not has_checkpoint(tmp_path / "state")
    assert len(os.listdir(tmp_path)) == 5
    assert not has_checkpoint(tmp_path / "absent" / "state")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_a_save_that_fails_leaves_the_previous_checkpoint(error, tmp_path, monkeypatch):
    one, two = trained(1), trained(2)
    save_checkpoint(tmp_path / "c", *one, {"step": 1})

    class Tokenizer:
        def save(self, folder):
            raise error

    with pytest.raises(BaseException) as caught:
        save_checkpoint(tmp_path / "c", *two, {"step": 2}, tokenizer=Tokenizer())
    assert "disk is full" in str(caught.value) or caught.value is error
    state, model, _ = loaded(tmp_path / "c")
    assert state["step"] == 1 and equal(weights(model), weights(one[0]))
    assert os.listdir(tmp_path) == ["c"]


# --- broken checkpoints -----------------------------------------------------------------------------------------------


def cut_in_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGE = {
    "no state": lambda f: (f / "state.json").unlink(),
    "cut state": lambda f: cut_in_half(f / "state.json"),
    "no optimizer": lambda f: (f / "optimizer" / "state.safetensors").unlink(),
    "cut optimizer": lambda f: cut_in_half(f / "optimizer" / "state.safetensors"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "cut weights": lambda f: cut_in_half(f / "model.safetensors"),
    "another version": lambda f: (f / "state.json").write_text(
        json.dumps(json.loads((f / "state.json").read_text()) | {"version": 99})),
    "state is a list": lambda f: (f / "state.json").write_text("[]"),
    "no version": lambda f: (f / "state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_words(damage, tmp_path):
    save_checkpoint(tmp_path / "c", *trained(1), {"step": 1})
    damage(tmp_path / "c")
    with pytest.raises(BadInput) as caught:
        loaded(tmp_path / "c")
    assert caught.value.next


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c", *trained(1), {"step": 1})
    from dataclasses import replace

    from pellucid.nn import Decoder, init_weights

    wide = decoder().spec
    for spec in (replace(wide, dim=16), replace(wide, layers=wide.layers[:1]), replace(wide, vocab=61)):
        other = init_weights(Decoder(spec))
        with pytest.raises(BadInput):
            load_checkpoint(tmp_path / "c", other, build_optimizer(other, OptimConfig()))
