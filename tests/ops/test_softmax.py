"""Softmax and online softmax against exact sums in pure Python, on inputs chosen to break them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.ops import log_softmax, online_softmax, softmax

INF = math.inf
ADVERSARIAL = {
    "plain": [0.3, -1.2, 2.5, 0.0],
    "huge": [1e300, 1e300, -1e300, 0.0],
    "largest": [1.7e308, 1.7e308, 1.6e308],
    "far apart": [-1e4, 0.0, 1e4],
    "one": [3.0],
    "equal": [5.0] * 9,
    "some hidden": [-INF, 1.0, -INF, 2.0, -INF],
    "hidden first": [-INF, -INF, -INF, 0.5],
    "hidden last": [0.5, -INF, -INF, -INF],
    "all hidden": [-INF] * 5,
    "one hidden": [-INF],
    "denormal inputs": [5e-324, -5e-324, 2.2e-308, 0.0],
    "denormal results": [0.0, -708.5, -740.0, -745.0, -746.0],
    "rising": [float(i * 50) for i in range(12)],
    "falling": [float(-i * 50) for i in range(12)],
    "negative zeros": [-0.0, 0.0, -0.0],
}


def exact(row: list[float]) -> list[float]:
    """Softmax by correctly rounded sums; the empty distribution for a row that is all -inf."""
    m = max(row)
    if m == -INF:
        return [0.0] * len(row)
    e = [math.exp(x - m) for x in row]
    total = math.fsum(e)
    return [x / total for x in e]


def close(got: torch.Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=1e-322)


@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_safe_softmax_on_adversarial_rows(row):
    close(softmax(torch.tensor(row, dtype=torch.float64)), exact(row))


@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_online_softmax_with_every_block_size(row):
    x = torch.tensor(row, dtype=torch.float64)
    for block in range(1, len(row) + 2):
        close(online_softmax(x, block), exact(row))


numbers = st.one_of(st.floats(-1e308, 1e308), st.floats(-60, 60), st.just(-INF), st.floats(-1e-300, 1e-300))


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=17), st.integers(1, 18))
def test_any_row_any_block(row, block):
    x = torch.tensor(row, dtype=torch.float64)
    close(softmax(x), exact(row))
    close(online_softmax(x, block), exact(row))


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_what_has_no_softmax_gives_nan_and_not_a_number(bad):
    x = torch.tensor([0.0, bad, 1.0], dtype=torch.float64)
    assert softmax(x).isnan().all()
    assert all(online_softmax(x, block).isnan().all() for block in (1, 2, 3))


def test_other_dimension_and_batch():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(softmax(x, 1), torch.softmax(x, 1))
    torch.testing.assert_close(online_softmax(x, 2), torch.softmax(x, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    x = torch.tensor([[-INF, -INF], [60000.0, 0.0]]).to(dtype)
    for y in (softmax(x), online_softmax(x, 1)):
        assert y.dtype == dtype
        assert y.tolist() == [[0, 0], [1, 0]]


def test_log_softmax_where_the_logarithm_of_softmax_fails():
    x = torch.tensor([0.0, -800.0, -1e300], dtype=torch.float64)
    assert softmax(x)[1].log() == -INF
    assert log_softmax(x).tolist() == [0.0, -800.0, -1e300]
    y = torch.randn(4, 7, dtype=torch.float64) * 100
    torch.testing.assert_close(log_softmax(y), torch.log_softmax(y, -1))
    torch.testing.assert_close(log_softmax(y, 0), torch.log_softmax(y, 0))
