"""Formats of a cache: errors as the docstring says, torch's own float8, the compiled words against PyTorch's."""

import math

import numpy as np
import pytest
import torch

from pellucid.errors import BadInput
from pellucid.ops import choose_jit
from pellucid.ops.cache_codes import CACHE_DTYPES, FORMATS, cache_codes

BOUNDS = {  # name -> largest error of x, given amax
    "bf16": lambda x, amax: x * 2**-8,
    "fp8": lambda x, amax: torch.maximum(x * 2**-4, amax / 458_752) * 1.01,  # the scale is rounded too
    "int8": lambda x, amax: amax / 253 + 0 * x,
}


def vectors(seed: int = 0) -> torch.Tensor:
    """(200, 3, 16) of very different sizes, within a vector too."""
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(200, 3, 16, generator=g) * 10 ** (4 * torch.rand(200, 3, 1, generator=g) - 2)
    t[:50] *= 10 ** (-6 * torch.rand(50, 3, 16, generator=g))
    t[50], t[51] = 0.0, 3e-38
    return t


@pytest.mark.parametrize("name", BOUNDS)
def test_errors_are_within_what_is_said(name):
    codes, t = cache_codes(name), vectors()
    kept, scales = codes.encode(t)
    back = codes.decode(kept, scales, torch.float32)
    amax = t.abs().amax(-1, keepdim=True)
    wide = amax[..., 0] > 1e-26  # below, the smallest scale rounds them off
    wrong = (back - t).abs()
    assert (wrong <= BOUNDS[name](t.abs(), amax))[wide].all()
    assert (wrong > 0.5 * BOUNDS[name](t.abs(), amax))[wide].any(), "the bound says nothing"
    assert (back[50] == 0).all() and back[51].abs().max() <= 1e-25 and back.isfinite().all()
    assert (kept.nbytes + (0 if scales is None else scales.nbytes)) == 200 * codes.bytes(3, 16)


def test_f32_is_exact_and_auto_is_what_is_computed():
    t = vectors()
    assert torch.equal(cache_codes("f32").encode(t)[0], t) and cache_codes("f32").encode(t)[1] is None
    assert cache_codes("auto", torch.bfloat16).kept == torch.bfloat16 and cache_codes("auto").name == "float32"
    assert [cache_codes(n).kept.itemsize for n in CACHE_DTYPES[1:]] == [4, 2, 1, 1]
    with pytest.raises(BadInput, match="int3"):
        cache_codes("int3")


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_are_none_stay_so(name):
    t = torch.tensor([[1.0, math.nan], [math.inf, 2.0]])
    back = FORMATS[name].decode(*FORMATS[name].encode(t), torch.float32)
    assert not back[0, 1].isfinite() and not back[1, 0].isfinite()


@pytest.mark.skipif(not choose_jit().value, reason=choose_jit().reason)
def test_compiled_words_are_torchs():
    from numba import njit

    from pellucid.ops.jit.lanes import narrow, wide

    @njit
    def both(x, as_e4m3, as_int8, back):
        for i in range(len(x)):
            as_e4m3[i], as_int8[i] = narrow(x[i], as_e4m3[i]), narrow(x[i], as_int8[i])
            back[i] = wide(as_e4m3[i])

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    middle = (every.sort().values[1:] + every.sort().values[:-1]) / 2  # ties, to even
    x = torch.cat((every, middle, middle * 1.0001, middle * 0.9999, torch.tensor([448.9, -460.0, 1e-9]), torch.randn(500) * 50)).numpy()
    as_e4m3, as_int8, back = np.zeros(len(x), np.uint8), np.zeros(len(x), np.int8), np.zeros(len(x), np.float32)
    both(x, as_e4m3, as_int8, back)
    want = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(torch.from_numpy(back), want.float())
    assert torch.equal(torch.from_numpy(as_int8), torch.from_numpy(x).round().clamp(-127, 127).to(torch.int8))
