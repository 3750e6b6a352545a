"""Resume states: everything that decides the next step, in one folder that appears whole or not at all.

model.safetensors + config.json (a Hugging Face folder by itself), optimizer/state.safetensors, state.json (step, seconds,
data position, random states). On a CPU a run that stops and resumes equals one that did not, bit for bit.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.models.hub import fill, write_model
from pellucid.nn import Decoder
from pellucid.optim import Optimizers

VERSION = 1
OPTIMIZER = Path("optimizer") / "state.safetensors"  # in a folder of its own: beside model.safetensors it would be weights


def save_checkpoint(folder: str | Path, model: Decoder, optimizer: Optimizers, state: dict[str, Any], tokenizer: Any = None,
                    write: Callable[[Path], None] | None = None) -> None:
    """`state`: plain JSON values of the caller (step, data position ...). write: how the weights get into a folder."""
    names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
    with atomic_folder(folder) as new:
        (write or partial(write_model, model))(new)
        tensors = {k: v.contiguous() for k, v in optimizer.state_tensors(names).items()}
        (new / OPTIMIZER).parent.mkdir()
        save_file(tensors | {"rng::torch": torch.get_rng_state()}, new / OPTIMIZER)
        version, numbers, gauss = random.getstate()
        body = {"version": VERSION, "python_rng": [version, list(numbers), gauss], **state}
        write_atomic(new / "state.json", json.dumps(body) + "\n")
        if tokenizer is not None:
            tokenizer.save(new)


def has_checkpoint(folder: str | Path) -> bool:
    """Whether there is one to resume. What a killed save left behind is put right first: the folder that it had moved
    aside takes its place again if no other has, and unfinished ones go away."""
    folder = Path(folder)
    left = re.compile(re.escape(f".{folder.name}.") + r"[a-z0-9_]{8}(\.old)?")  # the names that `atomic_folder` uses
    found = [f for f in folder.parent.iterdir() if left.fullmatch(f.name)] if folder.parent.is_dir() else []
    if not folder.exists():
        for aside in [f for f in found if f.suffix == ".old"][:1]:
            aside.rename(folder)
    for rest in found:
        shutil.rmtree(rest, ignore_errors=True)
    return (folder / "state.json").exists()


def load_checkpoint(folder: str | Path, model: Decoder, optimizer: Optimizers,
                    read: Callable[[Path], None] | None = None) -> dict[str, Any]:
    """Fills model, optimizer and the global generators; returns the caller's state. read: the inverse of `write`."""
    folder = Path(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / OPTIMIZER)
        if state["version"] != VERSION:
            raise BadInput(f"{folder} was written by another version ({state['version']}, not {VERSION})",
                           next="start again without --resume")
        (read or partial(fill, model))(folder)
        torch.set_rng_state(tensors.pop("rng::torch"))
        version, numbers, gauss = state.pop("python_rng")
        random.setstate((version, tuple(numbers), gauss))
        optimizer.load_state_tensors(dict(model.named_parameters()), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"no whole checkpoint in {folder}", f"{type(error).__name__}: {error}",
                       "start again without --resume") from error
    return state
