r"""What a language model must beat: compressors and a byte n-gram model, in bits per byte of the same held-out text.

A compressor has seen nothing before; the n-gram model has seen the training text that the language model sees.

Interpolated Kneser-Ney (Chen & Goodman 1998, section 3, "modified", which is the strongest of the smoothed n-gram
models there), over bytes, with h the k-1 bytes before c and h' the same without the oldest:

    P_k(c | h) = max(0, N_k(h c) - D_k(N_k(h c))) / N_k(h .)  +  g_k(h) P_{k-1}(c | h')         P_0(c) = 1 / 256
    g_k(h)     = (D_k(1) n_1(h) + D_k(2) n_2(h) + D_k(3) n_3(h)) / N_k(h .)                     1 if h was never seen

N_k(h c) is the count of h c in the training text for the longest k, and the number of different bytes seen before h c
for the shorter ones. n_i(h) is how many c have N_k(h c) = i (n_3: three or more). The discounts come from the counts of
counts t_i: Y = t_1 / (t_1 + 2 t_2), D(i) = i - (i + 1) Y t_{i+1} / t_i. Nothing is tuned on the held-out text. Deviation: D(i) is
kept 0.05 away from 0 and i, and is Y where a small text has no t_i or t_{i+1}.
"""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass

import numpy as np

from pellucid import events
from pellucid.errors import BadInput

MAX_ORDER = 7  # bytes of an n-gram: seven fit in an int64 with room to shift
PAD = b"\n"  # what stands before the first byte of a text


@dataclass
class Baselines(events.Event):
    """Bits per byte of the same held-out bytes; lower is better."""

    kind = "baselines"
    gzip: float  # gzip -9, the whole held-out text as one file
    xz: float  # xz -9e, likewise
    ngram: float  # the Kneser-Ney model of `order`, trained on `train_bytes`
    order: int
    train_bytes: int
    heldout_bytes: int

    def best(self) -> float:
        return min(self.gzip, self.xz, self.ngram)


def measure(train: bytes, heldout: bytes, order: int = 5, max_train: int = 10_000_000) -> Baselines:
    """All baselines for `heldout`. train: the first `max_train` bytes are used (about one second for each 2 MB)."""
    if not heldout:
        raise BadInput("there is no held-out text to measure on", next="give more text, or a larger held-out share")
    train = train[:max_train]
    model = ByteNGram(train, order)
    result = Baselines(gzip_bits(heldout), xz_bits(heldout), model.bits_per_byte(heldout), order, len(train), len(heldout))
    events.emit(result)
    return result


def gzip_bits(text: bytes) -> float:
    """Bits per byte of `gzip -9`, header and checksum (18 bytes) included."""
    return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


def xz_bits(text: bytes) -> float:
    """Bits per byte of `xz -9e`, container included."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


class ByteNGram:
    """The model above: n-grams of up to `order` bytes, that is contexts of up to `order` - 1 bytes."""

    def __init__(self, train: bytes, order: int = 5):
        if not 1 <= order <= MAX_ORDER:
            raise BadInput(f"an n-gram order of {order} is not possible", next=f"give 1 to {MAX_ORDER}")
        if len(train) < 2:
            raise BadInput("there is no text to train the n-gram model on", next="give more text")
        self.order = order
        grams, counts = np.unique(_grams(train, order), return_counts=True)
        self.levels = [_Level(grams, counts)]
        for k in range(order - 1, 0, -1):
            # Each distinct (k+1)-gram gives one vote to its last k bytes: Kneser and Ney's continuation counts.
            grams, counts = np.unique(grams & ((1 << 8 * k) - 1), return_counts=True)
            self.levels.append(_Level(grams, counts))
        self.levels.reverse()  # levels[k - 1] holds the k-grams

    def bits_per_byte(self, text: bytes) -> float:
        """Mean of -log2 P(byte | the bytes before it), every byte of `text` predicted."""
        return float(-np.log2(self.probabilities(text)).mean())

    def probabilities(self, text: bytes) -> np.ndarray:
        """P(text[i] | text[:i]) for each i. (len(text),) float64"""
        grams, back = np.unique(_grams(text, self.order), return_inverse=True)
        probability = np.full(len(grams), 1 / 256)
        for k, level in enumerate(self.levels, 1):
            probability = level.interpolate(grams & ((1 << 8 * k) - 1), probability)
        return probability[back]


class _Level:
    """Counts of the k-grams, as sorted int64 (the bytes as digits to the base 256)."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        self.grams = grams
        discount = _discounts(counts)
        taken = discount[np.minimum(counts, 3)]
        starts = np.flatnonzero(np.diff(grams >> 8, prepend=-1))
        self.contexts = grams[starts] >> 8
        total = np.add.reduceat(counts, starts)
        self.backoff = np.add.reduceat(taken, starts) / total
        self.share = (counts - taken) / np.repeat(total, np.diff(np.append(starts, len(grams))))

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P_k of each gram's last byte, given P_{k-1} of the same bytes."""
        return _look_up(self.grams, self.share, grams, 0.0) + _look_up(self.contexts, self.backoff, grams >> 8, 1.0) * lower


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2), D(3 and more) from the counts of counts; Y itself where a count of counts is zero."""
    t = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    y = t[1] / (t[1] + 2 * t[2]) if t[1] else 0.5
    found = [i - (i + 1) * y * t[i + 1] / t[i] if t[i] and t[i + 1] else y for i in (1, 2, 3)]
    return np.array([0, *(min(max(d, 0.05), i - 0.05) for i, d in enumerate(found, 1))])  # no P of zero, none of one


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, otherwise: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], otherwise)


def _grams(text: bytes, order: int) -> np.ndarray:
    """The `order` bytes that end at each place of `text`, as one integer. (len(text),) int64"""
    padded = np.frombuffer(PAD * (order - 1) + text, np.uint8).astype(np.int64)
    grams = np.zeros(len(text), np.int64)
    for i in range(order):
        grams = (grams << 8) | padded[i : i + len(text)]
    return grams
