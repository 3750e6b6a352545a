"""Pure functions on tensors. Each has a reference of a few lines; a fast twin, where one exists, has its signature."""

from pellucid.ops.activation import ACTIVATIONS, swiglu
from pellucid.ops.attention import attention, attention_reference, attention_sdpa, visible
from pellucid.ops.loss import chunked_cross_entropy, cross_entropy_reference, token_logprobs
from pellucid.ops.norm import rms_norm, rms_norm_reference
from pellucid.ops.rope import apply_rope, rope_angles, rope_frequencies
from pellucid.ops.softmax import log_softmax, online_softmax, softmax

__all__ = [
    "ACTIVATIONS",
    "apply_rope",
    "attention",
    "attention_reference",
    "attention_sdpa",
    "chunked_cross_entropy",
    "cross_entropy_reference",
    "log_softmax",
    "online_softmax",
    "rms_norm",
    "rms_norm_reference",
    "rope_angles",
    "rope_frequencies",
    "softmax",
    "swiglu",
    "token_logprobs",
    "visible",
]
