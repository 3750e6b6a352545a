"""Packing: against a token-by-token twin, against transformers, and the ways in which packing goes wrong silently."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import events
from pellucid.data.packing import IGNORE, PADDING, Packing, best_fit, pack_samples, pack_stream
from pellucid.errors import BadInput

DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=20)


def flat_pairs(packed):
    used = packed.documents != PADDING
    return list(zip(packed.tokens[used].tolist(), packed.labels[used].tolist()))


def pieces(packed):
    """(row, document id) -> its positions, in the order of the row"""
    found = {}
    for row in range(len(packed)):
        for t, document in enumerate(packed.documents[row].tolist()):
            if document != PADDING:
                found.setdefault((row, document), []).append(t)
    return found


@settings(max_examples=150, deadline=None)
@given(documents=DOCUMENTS, T=st.integers(1, 17), remainder=st.sampled_from(["drop", "pad"]))
def test_stream_predicts_every_pair_once_and_nothing_across_documents(documents, T, remainder):
    pairs = [pair for ids in documents for pair in itertools.pairwise(ids)]
    rows = -(-len(pairs) // T) if remainder == "pad" else len(pairs) // T
    if not rows:
        with pytest.raises(BadInput):
            pack_stream(documents, T, remainder)
        return
    packed = pack_stream(documents, T, remainder)
    assert packed.tokens.shape == packed.labels.shape == packed.positions.shape == packed.documents.shape == (rows, T)
    assert flat_pairs(packed) == pairs[: rows * T]
    assert packed.report.dropped == max(0, len(pairs) - rows * T)
    owner = [number for number, ids in enumerate(documents) for _ in ids[1:]]
    for (row, _), places in pieces(packed).items():
        assert places == list(range(places[0], places[-1] + 1)), "a piece is contiguous"
        assert packed.positions[row, places].tolist() == list(range(len(places))), "positions restart at 0"
        assert len({owner[row * T + t] for t in places}) == 1, "a piece belongs to one document"
    for row in range(rows):  # neighbours of one document share an id, neighbours of two do not
        inside = [t for t in range(T) if row * T + t < len(owner)]
        for t in inside[1:]:
            same = owner[row * T + t] == owner[row * T + t - 1]
            assert same == (packed.documents[row, t] == packed.documents[row, t - 1]).item()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=20), max_size=20), st.integers(1, 15))
def test_samples_stay_whole_and_only_masked_tokens_are_learned(drawn, T):
    samples = [([i for i, _ in one], [m for _, m in one]) for one in drawn]
    expected, long, empty = [], 0, 0
    for ids, mask in samples:
        trained = [t for t in range(1, len(ids)) if mask[t]]
        if not trained:
            empty += 1
        elif trained[-1] > T:
            long += 1
        else:
            expected.append([(ids[t], ids[t + 1] if mask[t + 1] else IGNORE) for t in range(trained[-1])])
    if not expected:
        with pytest.raises(BadInput):
            pack_samples(samples, T)
        return
    packed = pack_samples(samples, T)
    found = []
    for (row, _), places in pieces(packed).items():
        assert places == list(range(places[0], places[-1] + 1))
        assert packed.positions[row, places].tolist() == list(range(len(places)))
        found.append(list(zip(packed.tokens[row, places].tolist(), packed.labels[row, places].tolist())))
    assert sorted(found) == sorted(expected)
    assert (packed.report.too_long, packed.report.without_target) == (long, empty)
    padding = packed.documents == PADDING
    assert (packed.labels[padding] == IGNORE).all() and (packed.positions[padding] == 0).all()
    assert packed.report.used == int((~padding).sum()) == sum(map(len, expected))
    assert packed.report.targets == int((packed.labels != IGNORE).sum())


@pytest.fixture(scope="module")
def reference():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=128, attn_implementation="eager")
    return LlamaForCausalLM(config).eval().double()


def packed_loss(model, packed):
    """Summed loss of all rows under transformers' model, attention limited to equal document ids."""
    T = packed.tokens.shape[1]
    may = (packed.documents[:, :, None] == packed.documents[:, None, :]) & torch.ones(T, T).tril().bool()
    bias = torch.zeros(may.shape, dtype=torch.float64).masked_fill(~may, -1e30)[:, None]
    logits = model(packed.tokens, attention_mask=bias, position_ids=packed.positions).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), packed.labels.flatten(), reduction="sum")


def test_packed_equals_separate_under_transformers(reference):
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 50, (n,), generator=draw).tolist() for n in (9, 2, 14, 5, 1, 30, 7, 3)]
    masks = [[t % 3 > 0 for t in range(len(ids))] for ids in documents]
    whole = masked = 0.0
    with torch.no_grad():
        for ids, mask in zip(documents, masks):
            if len(ids) < 2:
                continue
            logits = reference(torch.tensor([ids])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            whole += losses.sum()
            masked += losses[torch.tensor(mask[1:])].sum()
        # one row, so that no document is broken; the remainder is padded
        torch.testing.assert_close(packed_loss(reference, pack_stream(documents, 70, "pad")), whole)
        samples = pack_samples(zip(documents, masks), 32)
        assert len(samples) > 1
        torch.testing.assert_close(packed_loss(reference, samples), masked)


def test_a_long_document_continues_as_a_new_piece():
    packed = pack_stream([list(range(10, 19)), [1, 2, 3]], T=5)
    assert packed.tokens.tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 1, 2]]
    assert packed.labels.tolist() == [[11, 12, 13, 14, 15], [16, 17, 18, 2, 3]]  # 14 -> 15 across the row, 18 -> 1 never
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert packed.documents.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]


def test_over_long_samples_do_not_starve_the_rest():
    long, short = ([1] * 40, [True] * 40), ([2, 3, 4], [False, True, True])
    packed = pack_samples([long] * 50 + [short] * 50, T=8)
    assert packed.report.too_long == 50 and packed.report.documents == 50
    assert packed.report.utilisation == 100 / (13 * 8)
    with pytest.raises(BadInput, match="no sample to train on"):
        pack_samples([long] * 50, T=8)
    cut = pack_samples([long] * 50, T=8, overlong="truncate")
    assert cut.report.too_long == 50 and cut.report.utilisation == 1.0 and (cut.labels == 1).all()


def test_a_sample_cut_before_its_answer_is_skipped_and_counted():
    late = ([1] * 20, [False] * 18 + [True] * 2)
    packed = pack_samples([late, ([5, 6], [False, True])], T=4, overlong="truncate")
    assert packed.report.without_target == 1 and packed.report.too_long == 1 and len(packed) == 1


def test_all_masked_sample_is_skipped_counted_and_told():
    seen = []
    with events.subscribed(seen.append):
        packed = pack_samples([([1, 2, 3], [False] * 3), ([4, 5], [True, True]), ([], []), ([7, 8], [True, False])], T=4)
    assert packed.report.without_target == 3 and packed.tokens.tolist() == [[4, 0, 0, 0]]
    assert isinstance(seen[-1], Packing) and "3 have no token to learn" in seen[0].text


def test_a_sample_as_long_as_the_row_fits_and_one_more_does_not():
    fits = pack_samples([(list(range(9)), [True] * 9)], T=8)
    assert fits.report.utilisation == 1 and fits.labels[0, -1] == 8
    with pytest.raises(BadInput):
        pack_samples([(list(range(10)), [True] * 10)], T=8)


def test_pad_id_may_be_a_real_token():
    packed = pack_samples([([0, 0, 0], [False, True, True])], T=4, pad_id=0)
    assert packed.labels.tolist() == [[0, 0, IGNORE, IGNORE]] and packed.documents.tolist() == [[0, 0, -1, -1]]


def naive_best_fit(sizes, T):
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= T]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return sorted(map(sum, rows))  # rows with equal room may be swapped, so only what they hold in all is determined


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40))
def test_best_fit_equals_the_naive_one(sizes):
    row, offset, rows = best_fit(torch.tensor(sizes, dtype=torch.int64).numpy(), 12)
    filled = [[] for _ in range(rows)]
    for r, at, size in sorted(zip(row.tolist(), offset.tolist(), sizes)):
        assert at == sum(filled[r]), "samples lie end to end"
        filled[r].append(size)
    assert sorted(map(sum, filled)) == naive_best_fit(sizes, 12)


def test_stream_stops_reading_when_it_has_enough():
    read = []

    def endless():
        while True:
            read.append(1)
            yield [1, 2, 3, 4, 5]

    assert len(pack_stream(endless(), T=4, max_tokens=100)) == 20 and len(read) == 20


@pytest.mark.parametrize("call", [
    lambda: pack_stream([[1, 2]], 0), lambda: pack_stream([[1, 2]], 1, "keep"), lambda: pack_stream([], 4),
    lambda: pack_stream([[1], []], 1, "pad"), lambda: pack_samples([([1, 2], [True])], 4),
    lambda: pack_samples([([1, 2], [True, True])], 4, "split"), lambda: pack_samples([], 4)])
def test_impossible_requests_are_refused(call):
    with pytest.raises(BadInput):
        call()
