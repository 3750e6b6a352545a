"""The C++ kernels' products against the definitions, in every variant that this processor runs, on shapes that divide by nothing."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellucid.ops.int4 import int4_decode
from pellucid.ops.native import build
from pellucid.ops.native.library import (
    Library,
    choose_native,
    pack_int4,
    pack_int8,
    plain,
    unpack_int4,
    unpack_int8,
)

pytestmark = pytest.mark.skipif(choose_native().value is None, reason=choose_native().reason)
VARIANTS = ("avx512", "avx2", "base")
SHAPES = [(1, 1), (3, 5), (64, 64), (65, 63), (130, 257), (200, 96), (67, 1000)]


@pytest.fixture(params=VARIANTS)
def library(request):
    chosen: Library = choose_native().value
    before = chosen.variant
    try:
        chosen.variant = chosen.use(request.param)
    except LookupError as error:
        assert request.param != "base"
        chosen.use(before)
        pytest.xfail(str(error))
    yield chosen
    chosen.variant = chosen.use(before)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(y: Tensor, exact: Tensor, most: float) -> None:
    """Within `most` of the size of what was summed."""
    assert y.shape == exact.shape and y.dtype == torch.float32
    assert float((y.double() - exact.double()).abs().max()) <= most * float(exact.abs().max() + 1e-30)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_as_they_lie(library, n: int, k: int, dtype: torch.dtype, bias: bool):
    """float32 sums of products; bfloat16 weights meet x rounded to bfloat16, and nothing else is rounded."""
    w, b = rows(n, k).to(dtype), rows(n, seed=1).to(dtype) if bias else None
    for m in (1, 2, 5, 6, 7, 33):
        x = rows(m, k, seed=2)
        exact = x.to(dtype).double() @ w.double().mT + (b.double() if b is not None else 0)
        close(library.product(plain(w, b), x), exact, 2e-6)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_is_exact_inside(library, n: int, k: int, bias: bool):
    """Whole numbers, and scales that are powers of two: everything is exact in float32, whatever the order."""
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    codes[0] = 127
    scale = 2.0 ** torch.randint(-3, 3, (n,), generator=g)
    b = torch.randint(-9, 9, (n,), generator=g).float() if bias else None
    for m in (1, 2, 5, 6, 7, 33):
        a = torch.randint(-127, 128, (m, k), generator=g).float()
        a[0], a[-1] = 127, -127
        exact = (a.double() @ codes.double().mT) * scale.double() + (b.double() if b is not None else 0)
        packed = pack_int8(codes, scale)
        assert torch.equal(library.product(packed.with_bias(b), a, whole=True), exact.float())
    codes_back, scale_back = unpack_int8(packed)
    assert torch.equal(codes_back, codes) and torch.equal(scale_back, scale)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 33), n=st.integers(1, 140), k=st.integers(1, 300), seed=st.integers(0, 2**31), size=st.floats(1e-25, 1e25))
def test_int8_rounds_each_row_by_its_own_largest(m: int, n: int, k: int, seed: int, size: float):
    """Against the definition in PyTorch: integers inside, so only the last scaling may differ by its rounding."""
    g = torch.Generator().manual_seed(seed)
    x, codes = torch.randn(m, k, generator=g) * size, torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    scale = torch.rand(n, generator=g) + 0.5
    factor = torch.tensor(127.0) / x.abs().amax(1, keepdim=True).clamp_min(1e-30)
    a = (x * factor).round()
    exact = (a.double() @ codes.double().mT) * scale.double() / factor.double()
    close(choose_native().value.product(pack_int8(codes, scale).matrix, x), exact, 1e-6)


def by_group(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The definition: activations rounded to 8 bits by groups of 32, products of integers, scales of both."""
    parts = x.view(len(x), -1, 32)
    factor = torch.tensor(127.0) / parts.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    rounded = (parts * factor).round().double() / factor.double()
    return rounded.flatten(1) @ int4_decode(codes, scale).double().mT


@pytest.mark.parametrize(("n", "k"), [(1, 32), (64, 64), (83, 96), (200, 160), (130, 1024)])
@pytest.mark.parametrize("bias", [False, True])
def test_int4_by_groups(library, n: int, k: int, bias: bool):
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    codes[0], codes[-1] = 15, 0
    scale, b = (torch.rand(n, k // 32, generator=g) - 0.5).bfloat16(), rows(n, seed=1) if bias else None
    packed = pack_int4(codes, scale)
    codes_back, scale_back = unpack_int4(packed)
    assert torch.equal(codes_back, codes) and torch.equal(scale_back, scale)
    for m in (1, 2, 5, 6, 7, 33):
        x = rows(m, k, seed=2)
        x[0] = x[0].sign()  # all at the ends of the range
        close(library.product(packed.with_bias(b), x), by_group(x, codes, scale) + (b.double() if b is not None else 0), 2e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(library, kind: str):
    """Bit for bit, however many rows there are and whatever stands in them."""
    n, k = 131, 96
    w, keep = rows(n, k), None
    if kind in ("float32", "bfloat16"):
        keep = w.to(getattr(torch, kind))
        matrix = plain(keep, None)
    elif kind == "int8":
        keep = pack_int8((w * 30).round().clamp(-127, 127).to(torch.int8), torch.rand(n) + 0.5)
        matrix = keep.matrix
    else:
        keep = pack_int4((w * 3 + 8).round().clamp(0, 15).to(torch.uint8), torch.rand(n, k // 32).bfloat16())
        matrix = keep.matrix
    x = rows(33, k, seed=3) * torch.logspace(-4, 4, 33)[:, None]
    together = library.product(matrix, x)
    for start, stop in ((0, 1), (7, 8), (32, 33), (3, 5), (10, 17), (0, 32)):
        assert torch.equal(library.product(matrix, x[start:stop]), together[start:stop])


def test_threads_give_the_same_bits(library):
    packed, x = pack_int8(torch.randint(-127, 128, (300, 70), dtype=torch.int8), torch.rand(300)), rows(9, 70)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            found.append(library.product(packed.matrix, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_zeros_and_what_is_not_a_number(library, kind: str):
    w = rows(70, 40)
    packed = pack_int8((w * 30).round().clamp(-127, 127).to(torch.int8), torch.ones(70))
    matrix = plain(w, None) if kind == "plain" else packed.matrix
    x = rows(3, 40)
    x[0] = 0
    x[1, 7] = float("nan")
    y = library.product(matrix, x)
    assert y[0].eq(0).all() and y[1].isnan().all() and y[2].isfinite().all()


def test_wrong_inputs_are_refused():
    library, w = choose_native().value, rows(4, 6)
    for x in (rows(2, 5), rows(2, 6).double(), rows(6), rows(2, 6).bfloat16()):
        with pytest.raises(TypeError, match="the product takes"):
            library.product(plain(w, None), x)
    assert library.product(plain(w, None), rows(0, 6)).shape == (0, 4)


@pytest.mark.parametrize("change", [lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_device("meta")])
def test_pytorchs_defaults_do_not_decide_where_results_are_written(change):
    """They are written as float32: memory for bfloat16 numbers would end half way."""
    library, w, x = choose_native().value, rows(300, 64), rows(4, 64)
    want = library.product(plain(w, None), x)
    try:
        change()
        y = library.product(plain(w, None), x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert y.dtype == torch.float32 and torch.equal(y, want)


def test_a_child_process_has_threads_of_its_own():
    """Threads stay with the parent at a fork: without new ones a child would wait for ever."""
    library, w, x = choose_native().value, rows(300, 64), rows(4, 64)
    want = library.product(plain(w, None), x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(library.product(plain(w, None), x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(library.product(plain(w, None), x), want)


# --- building -------------------------------------------------------------------------------------------------------------


def test_switched_off_or_another_variant(library, monkeypatch):
    for asked, variant, reason in (("0", None, "turned off by PELLUCID_NATIVE=0"), ("base", "base", "compiled for base"),
                                   ("amx", None, "no variant 'amx'")):
        monkeypatch.setenv("PELLUCID_NATIVE", asked)
        choice = choose_native.__wrapped__()
        assert reason in choice.reason and (choice.value and choice.value.variant) == variant


def test_without_a_compiler_and_with_a_failing_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match="compiler was found"):
        build.build(tmp_path)
    failing = tmp_path / "cxx"
    failing.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: this compiler is too old' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(OSError, match="this compiler is too old"):
        build.build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["cxx"], "nothing half-made stays"
    monkeypatch.setattr(build, "find", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice = choose_native.__wrapped__()
    assert choice.value is None and "too old" in choice.reason
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert "no C++ kernels: " in choose_native.__wrapped__().reason


def test_a_library_of_other_sources_is_not_loaded(tmp_path, monkeypatch):
    found = build.find()
    assert found is not None
    copy = tmp_path / "native"
    shutil.copytree(build.HERE, copy)
    shutil.copy(found, copy)  # which may lie in the cache folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "HERE", copy)
    assert build.find() == copy / found.name
    with (copy / "lanes.h").open("a") as f:
        f.write("// changed\n")
    assert build.find() is None
