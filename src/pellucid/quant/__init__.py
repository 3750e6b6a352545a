"""Quantization: INT8 weights with 8-bit activations, INT4 weights in groups, and what they cost."""

from pellucid.quant.folder import bits_of, compress, is_int8
from pellucid.quant.int4 import Int4Linear, choose_int4, int4_linear_reference, quantize_groups
from pellucid.quant.int8 import (
    Int8Linear,
    bits_named,
    held_bytes,
    int8_linear_reference,
    is_quantized,
    largest_of,
    left_float,
    quantize,
    quantize_rows,
    rounded_layer,
    stored_bytes,
)
from pellucid.quant.kernels import choose_kernel
from pellucid.quant.measure import GOALS, measure, quality, rows_of

__all__ = [
    "GOALS",
    "Int4Linear",
    "Int8Linear",
    "bits_named",
    "bits_of",
    "choose_int4",
    "choose_kernel",
    "compress",
    "held_bytes",
    "int4_linear_reference",
    "int8_linear_reference",
    "is_int8",
    "is_quantized",
    "largest_of",
    "left_float",
    "measure",
    "quality",
    "quantize",
    "quantize_groups",
    "quantize_rows",
    "rounded_layer",
    "rows_of",
    "stored_bytes",
]
