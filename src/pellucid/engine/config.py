"""What an engine is told (`EngineConfig`), and what follows from it and the model: numbers of the cache, groups of layers, room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pellucid.engine.drafting import is_stateful
from pellucid.engine.hash_chain import HashChain
from pellucid.engine.layer_groups import layer_groups
from pellucid.engine.ordering import Planned
from pellucid.engine.orders import Fair, Order, first_come, longest_hit
from pellucid.engine.planning import depth_first
from pellucid.engine.prefix_cache import NoReuse, PrefixCache
from pellucid.engine.radix_tree import RadixTree
from pellucid.errors import BadInput
from pellucid.nn import Decoder, DecoderSpec, prediction_spec
from pellucid.nn.count import cache_bytes
from pellucid.ops.cache_codes import CacheCodes, cache_codes
from pellucid.runtime import Choice, available_memory_bytes

DRAFTS = 4
"""Tokens proposed at a time where nobody says how many."""
ORDERS: dict[str, Callable[[], Order]] = {"first-come": lambda: first_come, "longest-hit": lambda: longest_hit,
                                     "depth-first": lambda: depth_first, "planned": Planned, "fair": Fair}


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field is an option of `pellucid serve`."""

    cache_tokens: int | None = None
    """Tokens that the cache has room for; by default what memory allows, at most 64 full contexts."""
    block: int = 16
    """Tokens of a block of the cache."""
    cache_dtype: str = "auto"
    """How the cache keeps numbers: auto (as the model computes), f32, bf16, fp8, int8 (the last two with a scale a token and head, see
    ops/cache_codes.py). States of linear attention stay as they are computed."""
    reuse_windows: bool = True
    """Layers that read a window of the last tokens give back what falls behind it.
    `cache_tokens` counts tokens in every layer: of longer ones, more fit."""
    prefix: str = "chain"
    """Prefix cache: chain (hashes of blocks), radix (a tree, exact to the token), radix-cost (evicts what is cheapest to lose), none."""
    budget: int = 512
    """Tokens computed in a step."""
    chunk: int | None = None
    """Most prompt tokens of one request in a step; by default the budget."""
    running: int = 64
    """Requests that run at a time."""
    step_seconds: float | None = None
    """A step's time is kept under this by computing less of the prompts in it; those who are writing get a token in every step."""
    order: str = "first-come"
    """Who is admitted first: first-come, longest-hit (in the prefix cache), depth-first (through the tree of the waiting prompts' prefixes),
    planned (the next few so that the fewest tokens are computed, by dynamic programming), fair (the namespace served least)."""
    swap: bool = False
    """Preempted requests keep their cache in host memory instead of computing it again."""
    drafts: int | None = None
    """Tokens proposed at a time and checked in one pass (speculative decoding); 0: none. By default 4 where a draft model or `proposer`
    was asked for, else none."""
    proposer: str | None = None
    """Where proposals come from, if from no draft model: lookup (what followed the last tokens before; the default where only `drafts`
    are asked for), mtp (the model's own layer of multi-token prediction)."""
    speculate_up_to: int = 8
    """No proposals while more requests than this run: a fuller batch has better use for the budget."""


def make_cache(kind: str, model: Decoder, blocks: int, size: int, windows: tuple[int | None, ...] = (None,)) -> PrefixCache:
    """What a model of constant states (linear attention) leaves cannot be found block by block: it gets no reuse."""
    if is_stateful(model.spec) or kind == "none":
        return NoReuse(blocks, size, windows)
    if kind == "chain":
        return HashChain(blocks, size, windows=windows)
    if kind in ("radix", "radix-cost"):
        return RadixTree(blocks, size, "cost" if kind == "radix-cost" else "lru", windows=windows)
    raise BadInput(f"prefix cache {kind!r} is not known", next="use one of chain, radix, radix-cost, none")


def drafts_of(config: EngineConfig, asked: bool = False) -> int:
    """Tokens proposed at a time.  asked: a proposer was given beside the config."""
    if config.drafts is not None:
        return config.drafts
    return DRAFTS if asked or config.proposer else 0


def codes_for(model: Decoder, config: EngineConfig) -> CacheCodes:
    return cache_codes(config.cache_dtype, model.compute_dtype or model.embed.weight.dtype)


def groups_for(model: Decoder, config: EngineConfig) -> Choice:
    return layer_groups(model.spec, config.reuse_windows)


def choose_room(model: Decoder, config: EngineConfig, draft: Decoder | None = None) -> Choice:
    """Tokens of cache, with the reason: what was asked, or half of the free memory, or 64 full contexts. A draft model's cache, or the
    prediction layer's, holds as many."""
    if config.cache_tokens is not None:
        if config.cache_tokens < 1:
            raise BadInput(f"a cache of {config.cache_tokens} tokens is not possible", next="give --cache-tokens 4096 or so")
        return Choice(config.cache_tokens, "as asked")
    token = sum(cache_bytes(layer.mixer, codes_for(model, config)) for layer in model.spec.layers)
    if draft is not None:
        token += cached_bytes(draft)
    elif config.proposer == "mtp" and drafts_of(config):
        token += cached_bytes(model, prediction_spec(model.spec, 1))
    token = max(1, token)
    groups, context = groups_for(model, config).value, model.spec.context
    each = -(-sum(context if g.window is None else min(context, g.window + config.budget + 2 * config.block) for g in groups) // len(groups))
    most = config.running * each
    free = torch.cuda.mem_get_info()[0] if model.embed.weight.is_cuda else available_memory_bytes()
    if free is None or free // 2 // token >= most:
        return Choice(most, f"{config.running} full contexts of {model.spec.context} tokens, {most * token / 2**20:.0f} MiB")
    return Choice(max(config.block, free // 2 // token), f"half of the free memory, {free / 2**31:.1f} GiB, at {token} bytes a token")


def cached_bytes(model: Decoder, spec: DecoderSpec | None = None) -> int:
    """Of a token, in a proposer's cache: of a draft model, or of a part of the model. Those keep numbers as they are computed."""
    dtype = model.compute_dtype or model.embed.weight.dtype
    return sum(cache_bytes(layer.mixer, cache_codes("auto", dtype)) for layer in (spec or model.spec).layers)
