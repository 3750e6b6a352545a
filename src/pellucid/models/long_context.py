"""A model beyond the context that it was trained for: changes of its spec that leave every weight as it is.

    pellucid.load(path, change=lambda spec: with_streaming(spec, sinks=4, window=1020))

What each can do: position scaling (`with_rope_scaling`) squeezes a longer text into the trained positions, best with some training;
`with_dual_chunk` reads all of a longer text without training; `with_streaming` goes on for ever in constant memory, but knows only
the sinks and the last `window` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pellucid.errors import BadInput
from pellucid.models.config import Config, rotary_share
from pellucid.models.deepseek import temperature
from pellucid.nn.specs import GDN, MLA, Attn, DecoderSpec, DualChunk, Streaming


def with_streaming(spec: DecoderSpec, sinks: int = 4, window: int = 1020) -> DecoderSpec:
    """StreamingLLM (arXiv 2309.17453): layers that would see everything keep the first `sinks` tokens and the last `window`; those
    with a window of their own keep that (`with_rings`)."""
    if sinks < 0 or window < 1:
        raise BadInput(f"{sinks} sinks and a window of {window}", "the window must hold a token at least")
    changed = _with_reach(spec, Streaming(sinks, window))
    return with_rings(changed) if any(_windowed(layer.mixer) for layer in spec.layers) else changed


def with_rings(spec: DecoderSpec) -> DecoderSpec:
    """Layers with a sliding window keep no more of the past than it shows: a ring of that many keys and values, of constant size. The
    same numbers: a window is streaming without sinks."""
    return _each_mixer(spec, lambda m: replace(m, window=None, reach=Streaming(0, m.window)), _windowed, "with a window")


def with_dual_chunk(spec: DecoderSpec, size: int | None = None, local: int | None = None) -> DecoderSpec:
    """Dual chunk attention (arXiv 2402.17463): no relative position reaches `size`, by default the trained context; `local` tokens
    (default: a sixteenth) keep their distances across the borders of chunks, which are size - local long."""
    size = spec.context if size is None else size
    local = size // 16 if local is None else local
    if size < 1 or not 0 <= 2 * local <= size:
        raise BadInput(f"distances below {size}, of which {local} exact across a border", "local may be half of size at most")
    return _with_reach(spec, DualChunk(size, local))


def with_rope_scaling(spec: DecoderSpec, scaling: dict[str, Any]) -> DecoderSpec:
    """Position scaling in the words of config.json: {"rope_type": "yarn", "factor": 4.0}, or linear, dynamic, llama3, longrope.

    `original_max_position_embeddings` is the model's context unless given; with "yarn", attention_factor 1.0 makes it NTK by
    parts, without its temperature. The context grows by `factor`. Layers with a window keep their rotation.
    """
    def scaled(mixer: Any) -> Any:
        old = mixer.rope
        head = mixer.head_dim if isinstance(mixer, Attn) else old.dim
        fields = {"original_max_position_embeddings": spec.context, **scaling, "rope_theta": old.theta,
                  "partial_rotary_factor": rotary_share(old, head)}
        rope = Config({"rope_parameters": fields, "max_position_embeddings": context}).rope(head, partial=True)
        rope = replace(rope, dim=old.dim, interleaved=old.interleaved)
        if isinstance(mixer, MLA):
            return replace(mixer, rope=rope, scale=(mixer.nope + rope.dim) ** -0.5 * temperature(rope))
        return replace(mixer, rope=rope)

    factor = scaling.get("factor", 1.0)
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or factor <= 0:
        raise BadInput(f"a factor of {factor!r}", "it must be a number above 0")
    dynamic = (scaling.get("rope_type") or scaling.get("type")) == "dynamic"  # its original context is max_position_embeddings
    context = spec.context if dynamic else round(spec.context * max(factor, 1.0))
    changed = _each_mixer(spec, scaled, lambda m: isinstance(m, (Attn, MLA)) and m.rope.dim > 0 and getattr(m, "window", None) is None)
    return replace(changed, context=context)


def _with_reach(spec: DecoderSpec, reach: Streaming | DualChunk) -> DecoderSpec:
    if spec.positions == "learned":
        raise BadInput("this model has a learned vector for each of its positions", "there are none beyond its context")
    unfit = {type(layer.mixer).__name__ for layer in spec.layers if not isinstance(layer.mixer, (Attn, GDN))}
    if unfit:
        raise BadInput(f"layers of {', '.join(sorted(unfit))} have no {type(reach).__name__}", "it is made of attention with keys of its own")
    return _each_mixer(spec, lambda m: replace(m, reach=reach), lambda m: isinstance(m, Attn) and m.window is None)


def _windowed(mixer: Any) -> bool:
    return isinstance(mixer, Attn) and mixer.window is not None


def _each_mixer(
    spec: DecoderSpec, change: Callable[[Any], Any], which: Callable[[Any], bool], kind: str = "without a window",
) -> DecoderSpec:
    if not any(which(layer.mixer) for layer in spec.layers):
        raise BadInput(f"this model has no layer of attention {kind}", "there is nothing to change")
    return replace(spec, layers=tuple(
        replace(layer, mixer=change(layer.mixer)) if which(layer.mixer) else layer for layer in spec.layers))
