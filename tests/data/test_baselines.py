"""Baselines: the n-gram model against its formula computed with dictionaries; compressors against their own tools."""

import math
import random
import zlib
from collections import Counter

import numpy as np
import pytest

from pellucid import events
from pellucid.data.baselines import Baselines, ByteNGram, gzip_bits, measure, xz_bits
from pellucid.errors import BadInput

TRAIN = b"the cat sat on the mat. the dog sat on the log. a cat and a dog are not a log; they sat, they sat.\n" * 2
TEXT = b"the dog and the cat sat on a mat, zebra."


def by_hand(train, order, history, byte):
    """P(byte | history) straight from the docstring's formula, with dictionaries and recursion."""
    padded = b"\n" * (order - 1) + train
    counts = {order: Counter(padded[i : i + order] for i in range(len(train)))}
    for k in range(order - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])  # how many different bytes stand before

    def discount(k, count):
        t = Counter(counts[k].values())
        i, y = min(count, 3), t[1] / (t[1] + 2 * t[2]) if t[1] else 0.5
        d = i - (i + 1) * y * t[i + 1] / t[i] if t[i] * t[i + 1] else y
        return min(max(d, 0.05), i - 0.05)

    def probability(k):
        if k == 0:
            return 1 / 256
        h = (b"\n" * order + history)[-(k - 1):] if k > 1 else b""
        after = {gram[-1]: c for gram, c in counts[k].items() if gram[:-1] == h}
        if not after:
            return probability(k - 1)
        total = sum(after.values())
        kept = after[byte] - discount(k, after[byte]) if byte in after else 0
        return kept / total + sum(discount(k, c) for c in after.values()) / total * probability(k - 1)

    return probability(order)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_ngram_equals_the_formula(order):
    model = ByteNGram(TRAIN, order)
    expected = [by_hand(TRAIN, order, TEXT[:i], TEXT[i]) for i in range(len(TEXT))]
    np.testing.assert_allclose(model.probabilities(TEXT), expected, rtol=1e-12)
    bits = -sum(map(math.log2, expected)) / len(TEXT)
    assert model.bits_per_byte(TEXT) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("history", [b"", b"the ", b"\xff\x00\xfe", b"sat on"])
def test_probabilities_sum_to_one(history):
    draw = random.Random(0)
    for train in (TRAIN, bytes(draw.randrange(256) for _ in range(5000))):
        model = ByteNGram(train, 4)
        assert sum(model.probabilities(history + bytes([c]))[-1] for c in range(256)) == pytest.approx(1, abs=1e-12)


def test_noise_costs_eight_bits_and_text_less():
    draw = random.Random(0)
    noise = bytes(draw.randrange(256) for _ in range(60_000))
    assert 7.9 < ByteNGram(noise[:50_000], 3).bits_per_byte(noise[50_000:]) < 8.2
    assert ByteNGram(TRAIN, 5).bits_per_byte(TRAIN) < 1.5


def test_compressors_are_the_real_ones():
    raw = zlib.compressobj(9, zlib.DEFLATED, 31)
    assert gzip_bits(TRAIN) == 8 * len(raw.compress(TRAIN) + raw.flush()) / len(TRAIN)
    repeated = bytes(100_000)
    assert gzip_bits(repeated) < 0.02 and xz_bits(repeated) < 0.02


def test_measure_uses_the_same_held_out_bytes_and_a_bounded_training_text():
    seen = []
    with events.subscribed(seen.append):
        result = measure(TRAIN, TEXT, order=3, max_train=50)
    assert seen == [result] and isinstance(result, Baselines)
    assert (result.gzip, result.xz) == (gzip_bits(TEXT), xz_bits(TEXT))
    assert result.ngram == ByteNGram(TRAIN[:50], 3).bits_per_byte(TEXT)
    assert (result.train_bytes, result.heldout_bytes, result.best()) == (50, len(TEXT), min(result.gzip, result.xz, result.ngram))


@pytest.mark.parametrize("call", [lambda: measure(TRAIN, b""), lambda: ByteNGram(TRAIN, 8), lambda: ByteNGram(TRAIN, 0),
                                  lambda: ByteNGram(b"", 3)])
def test_impossible_requests_are_refused(call):
    with pytest.raises(BadInput):
        call()
