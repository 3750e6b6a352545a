"""What INT8 and INT4 save and how fast they are, and what they cost in perplexity, beside the same model in float32 and bfloat16."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pellucid.errors import BadInput
from pellucid.nn import Decoder, KVCache
from pellucid.nn.experts import ExpertLinear
from pellucid.quant.int4 import Int4Linear, choose_int4
from pellucid.quant.int8 import Int8Linear, quantize, stored_bytes
from pellucid.quant.kernels import choose_kernel

PROMPT = 32
GOALS = {"int8": 0.005, "int4": 0.03}
"""How much more perplexity than bfloat16's is accepted."""
Step = Callable[[torch.Tensor, KVCache], torch.Tensor]  # tokens (B,), cache -> logits (B, V)


def plain_step(model: Decoder) -> Step:
    return lambda tokens, cache: model(tokens[:, None], cache=cache)[:, -1]


@torch.no_grad()
def measure(
    model: Decoder, small: Decoder | None = None, seconds: float = 3.0, batches: tuple[int, ...] = (1, 64),
    step_of: Callable[[Decoder], Step] | None = None,
) -> dict[str, Any]:
    """Size and decoding speed of a float32 model and its INT8 form, or the INT4 one ("int4" then stands for "int8").

    Returns plain values: "bytes" {float32, int8}, "size_ratio", "kernel", "relative_error" (of one product, over all
    layers), "tokens_per_second" {batch: {float32, bfloat16, int8}}, "speedup" {batch: int8 / float32}. Takes about
    `seconds`: the variants take turns, and the best round of each counts, so that load on the machine hurts all alike.
    `step_of`: how a model decodes one token, as in `engine.decode` (default: its own forward).
    """
    small = quantize(model) if small is None else small
    name = name_of(small)
    variants = {"float32": plain(model, torch.float32), "bfloat16": plain(model, torch.bfloat16), name: small}
    speeds = {str(b): decode_speeds(variants, b, seconds / len(batches), step_of or plain_step) for b in batches}
    sizes = {"float32": stored_bytes(variants["float32"]), name: stored_bytes(small)}
    return {
        "bytes": sizes,
        "size_ratio": sizes[name] / sizes["float32"],
        "kernel": choose_kernel().reason if name == "int8" else choose_int4().reason,
        "relative_error": product_error(model, small),
        "tokens_per_second": speeds,
        "speedup": {b: s[name] / s["float32"] for b, s in speeds.items()},
    }


@torch.inference_mode()
def perplexity(model: Decoder, tokens: torch.Tensor, rows: int = 16) -> float:
    """tokens (N, T): exp of the mean -log p of every token that has one before it in its row. As served: through the model's own head."""
    nats = 0.0
    for some in tokens.split(rows):
        logits = model.logits(model.hidden(some)[:, :-1]).float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
    return math.exp(nats / (tokens.shape[0] * (tokens.shape[1] - 1)))


def rows_of(texts: Sequence[Sequence[int]], length: int, most: int = 100_000) -> torch.Tensor:
    """Texts as ids, one behind the other -> rows (N, T) of `length` ids, at most `most` of them; a short text is one short row."""
    ids = torch.tensor(list(itertools.islice(itertools.chain.from_iterable(texts), most)))
    if len(ids) < 2:
        raise BadInput("the text is too short", f"{len(ids)} tokens: nothing can be predicted", "give more text with --corpus")
    length = min(length, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)


def quality(model: Decoder, tokens: torch.Tensor, small: Mapping[str, Decoder] | None = None) -> dict[str, Any]:
    """A float model on a text, tokens (N, T): "perplexity" of it in float32 and bfloat16, and of its quantized forms (int8 and int4, or
    those given); how much "more" than bfloat16's that is; which goals are "met"."""
    variants: dict[str, Callable[[], Decoder]] = {name: (lambda d=dtype: plain(model, d)) for name, dtype in  # type: ignore[misc]
                                                  (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
    variants |= {name: (lambda m=m: m) for name, m in small.items()} if small else {  # type: ignore[misc]
        f"int{bits}": (lambda b=bits: quantize(model, bits=b)) for bits in (8, 4)}  # type: ignore[misc]
    found = {name: perplexity(make(), tokens) for name, make in variants.items()}
    more = {name: value / found["bfloat16"] - 1 for name, value in found.items() if name != "bfloat16"}
    return {"perplexity": found, "more": more, "met": {name: more[name] <= most for name, most in GOALS.items() if name in more}}


def name_of(small: Decoder) -> str:
    return "int4" if any(isinstance(m, Int4Linear) for m in small.modules()) else "int8"


def plain(model: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy in `dtype` on the CPU; the model itself where it is that already."""
    if model.embed.weight.dtype == dtype and model.embed.weight.device.type == "cpu" and model.compute_dtype in (None, dtype):
        return model
    changed = copy.deepcopy(model).to("cpu", dtype)
    changed.compute_dtype = None
    return changed


def decode_speeds(
    variants: dict[str, Decoder], batch: int, seconds: float, step_of: Callable[[Decoder], Step],
) -> dict[str, float]:
    """Tokens/s of greedy decoding after a prompt of 32 tokens, `batch` sequences at once."""
    rounds = {name: decoder_round(model, batch, step_of(model)) for name, model in variants.items()}
    best = dict.fromkeys(rounds, float("inf"))
    for number in range(1000):
        if number == 1:  # the first round only warms up
            best, end = dict.fromkeys(rounds, float("inf")), time.perf_counter() + seconds
        for name, run in rounds.items():
            start = time.perf_counter()
            steps = run()
            best[name] = min(best[name], (time.perf_counter() - start) / steps)
        if number and time.perf_counter() >= end:
            break
    return {name: batch / step for name, step in best.items()}


def decoder_round(model: Decoder, batch: int, step: Step, steps: int = 8) -> Callable[[], int]:
    """A function that decodes `steps` tokens for each sequence, always from the same state, and returns their number."""
    steps = min(steps, model.spec.context - 1)
    prompt = min(PROMPT, model.spec.context - steps)
    tokens = torch.randint(0, model.spec.vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.spec, batch, prompt + steps, dtype=model.embed.weight.dtype)
    was_training, _ = model.training, model.eval()
    first = model.logits(model.hidden(tokens, cache=cache)[:, -1]).argmax(-1)
    model.train(was_training)

    def run() -> int:
        cache.length, token = prompt, first
        for _ in range(steps):
            token = step(token, cache).argmax(-1)
        return steps

    return run


def matrix_of(name: str, matrices: dict[str, nn.Module], model: Decoder) -> torch.Tensor:
    """What a quantized layer was made from: the layer of its name, one of stacked experts, or the embedding under a tied head."""
    stack, _, number = name.rpartition(".")
    if isinstance(matrices.get(stack), ExpertLinear):
        return matrices[stack].weight[int(number)]  # type: ignore[no-any-return, index]
    return matrices[name].weight if getattr(matrices.get(name), "weight", None) is not None else model.embed.weight  # type: ignore[return-value]


def product_error(model: Decoder, small: Decoder, rows: int = 16) -> float:
    """||quantized product - float32 product|| / ||float32 product|| on normal activations, the mean over all layers."""
    matrices = dict(model.named_modules())
    errors = []
    for name, layer in small.named_modules():
        if isinstance(layer, (Int8Linear, Int4Linear)):
            weight = matrix_of(name, matrices, model).detach().to("cpu", torch.float32)
            x = torch.randn(rows, layer.inputs, generator=torch.Generator().manual_seed(0))
            exact = x @ weight.mT
            found = layer(x) - (0 if layer.bias is None else layer.bias)
            errors.append(float((found - exact).norm() / exact.norm()))
    return sum(errors) / len(errors)
