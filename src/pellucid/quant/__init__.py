"""Quantization: INT8 weights with 8-bit activations, and what they cost."""

from pellucid.quant.folder import compress, is_int8
from pellucid.quant.int8 import Int8Linear, int8_linear_reference, is_quantized, quantize, quantize_rows, stored_bytes
from pellucid.quant.kernels import choose_kernel
from pellucid.quant.measure import measure

__all__ = [
    "Int8Linear",
    "choose_kernel",
    "compress",
    "int8_linear_reference",
    "is_int8",
    "is_quantized",
    "measure",
    "quantize",
    "quantize_rows",
    "stored_bytes",
]
