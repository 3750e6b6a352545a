"""Cached equals uncached, for every way to cut a sequence into chunks, with padding, after rows left or were repeated."""

import pytest
import torch
from small_specs import SPECS, assert_equal, built, tokens

from pellucid.nn import KVCache

T = 75  # longer than a tile of attention


def chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


@torch.no_grad()
def through_cache(model, x, cache, sizes):
    out, start, before = [], 0, cache.length
    for n in sizes:
        out.append(model(x[:, start : start + n], cache=cache))
        start += n
    assert cache.length == before + start
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1, 7, 64, T])
def test_every_chunking(name, size):
    model, x = built(name), tokens(2, T)
    with torch.no_grad():
        want = model(x)
    assert_equal(through_cache(model, x, KVCache(model.spec, 2, T + 9), chunks(T, size)), want)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1, 7, T])
def test_left_padding(name, size):
    """Each row equals its own tokens by themselves; what stands in the padding does not matter."""
    model, x = built(name), tokens(4, T)
    first = torch.tensor([0, 3, T - 1, 40])
    got = through_cache(model, x, KVCache(model.spec, 4, T, first=first), chunks(T, size))
    assert got.isfinite().all()
    for row, start in enumerate(first.tolist()):
        with torch.no_grad():
            assert_equal(got[row, start:], model(x[row : row + 1, start:])[0])


@pytest.mark.parametrize("name", SPECS)
def test_rows_that_go_on(name):
    """After `keep`, in a new order and with a row twice, decoding goes on as if nothing had happened."""
    model, x = built(name), tokens(4, 30)
    first = torch.tensor([0, 3, 9, 1])
    cache = KVCache(model.spec, 4, 40, first=first)
    through_cache(model, x[:, :20], cache, [12, 8])
    rows = torch.tensor([2, 0, 2])
    cache.keep(rows)
    assert cache.batch == 3 and cache.length == 20 and cache.capacity == 40
    got = through_cache(model, x[rows, 20:], cache, [1, 1, 5, 3])
    for row, source in enumerate(rows.tolist()):
        with torch.no_grad():
            assert_equal(got[row], model(x[source : source + 1, int(first[source]) :])[0, -10:])
    cache.keep(torch.tensor([], dtype=torch.int64))
    assert cache.batch == 0


def test_positions_and_masks_by_hand():
    """Rotations see distances only, so logits cannot show where counting starts: at each row's first real token."""
    cache = KVCache(SPECS["qwen3"], 2, 40, first=torch.tensor([0, 3]))
    assert cache.positions(5).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert cache.key_mask(5).int().flatten(1).tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    cache.advance(5)
    assert cache.positions(1).tolist() == [[5], [2]]
    assert cache.key_mask(1).int().flatten(1).tolist() == [[1] * 6 + [0] * 10, [0] * 3 + [1] * 3 + [0] * 10]
    plain = KVCache(SPECS["qwen3"], 2, 16)
    assert plain.key_mask(9) is None and plain.positions(2).tolist() == [[0, 1]]
    plain.advance(15)
    assert plain.key_mask(1) is None


def test_room_grows_to_the_capacity_and_not_beyond():
    model, x = built("qwen3"), tokens(1, 50)
    cache = KVCache(model.spec, 1, 50)
    rooms = []
    for t in range(50):
        with torch.no_grad():
            model(x[:, t : t + 1], cache=cache)
        rooms.append(cache.room)
    assert sorted(set(rooms)) == [16, 32, 48, 50] and all(room > t for t, room in enumerate(rooms))


def test_a_full_cache_says_so_and_nothing_else_changes():
    model, x = built("qwen3"), tokens(1, 10)
    cache = KVCache(model.spec, 1, 10)
    through_cache(model, x, cache, [10])
    with pytest.raises(ValueError, match="cache of 10 tokens cannot hold 11"):
        model(x[:, :1], cache=cache)
    assert cache.length == 10


def test_what_is_computed():
    """The cache is really used: a step runs one position through every layer, and no more."""
    model, x = built("qwen3"), tokens(1, 20)
    seen = []
    for layer in model.layers:
        layer.ffn.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    through_cache(model, x, KVCache(model.spec, 1, 20), [15, 1, 4])
    assert seen == [15, 15, 1, 1, 4, 4]


def test_a_cache_in_half_precision():
    """bfloat16 keys and values under float32 activations: 3 % of the norm."""
    model, x = built("qwen3"), tokens(2, 20)
    with torch.no_grad():
        want = model(x)
        got = through_cache(model, x, KVCache(model.spec, 2, 20, dtype=torch.bfloat16), [13, 1, 1, 5])
    assert got.dtype == torch.float32
    assert 0 < (got - want).norm() < 0.03 * want.norm()


def test_a_cache_and_masks_do_not_mix():
    model, x = built("qwen3"), tokens(1, 5)
    for extra in ({"mask": torch.ones(1, 5)}, {"documents": torch.zeros(1, 5)}):
        with pytest.raises(ValueError, match="cache carries its own mask"):
            model(x, cache=KVCache(model.spec, 1, 9), **extra)


def test_generation_and_training_in_turns():
    """What inference mode leaves behind (cached tables) must not break the next backward pass."""
    model, x = built("window"), tokens(2, 70)
    with torch.inference_mode():
        model(x)
        model(x, documents=torch.zeros_like(x))
    model(x).sum().backward()
    model(x, documents=torch.zeros_like(x)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
