"""The split: by content only, disjoint, stable for ever."""

import hashlib
import random

import pytest

from pellucid import events
from pellucid.data.reading import Document
from pellucid.data.split import divide, divide_by, fraction, is_heldout
from pellucid.errors import BadInput


def test_the_rule_is_the_documented_one_and_never_changes():
    for text in ("hello world", "x", "a b c"):
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"pellucid.split").digest()
        assert fraction(text) == pytest.approx(int.from_bytes(digest, "big") / 2**64, abs=1e-15)
    assert fraction("hello world") == pytest.approx(HELLO, abs=1e-9)  # a change here moves held-out text into training


HELLO = 0.70086800921388


def test_the_same_text_in_other_clothes_is_on_the_same_side():
    same = ["caf\u00e9 au lait\nsecond line\n", "\ufeffcaf\u00e9 au lait\r\nsecond line\r\n", "cafe\u0301 au lait\n\n  second line"]
    assert len({fraction(text) for text in same}) == 1
    assert fraction("caf\u00e9 au lait second lime") != fraction(same[0])


def test_the_share_is_kept_and_the_sides_are_nested():
    texts = [f"document number {n}" for n in range(20_000)]
    small, large = ({t for t in texts if is_heldout(t, share)} for share in (0.05, 0.2))
    assert small < large and abs(len(small) / 20_000 - 0.05) < 0.006 and abs(len(large) / 20_000 - 0.2) < 0.012
    assert not is_heldout("x", 0.0) and is_heldout("x", 1.0) and not is_heldout("x", fraction("x"))
    assert is_heldout("\ud800 lone surrogate", 1.0)
    for share in (-0.1, 1.5):
        with pytest.raises(BadInput):
            is_heldout("x", share)


def documents(count, seed=0):
    draw = random.Random(seed)
    return [Document(" ".join(str(draw.randrange(10**6)) for _ in range(30)), f"{n}.txt") for n in range(count)]


def test_divide_is_disjoint_complete_and_independent_of_order_and_names():
    corpus = documents(2000) + documents(2000)  # every document stands in two places
    train, heldout = divide(corpus)
    assert len(train) + len(heldout) == 4000 and len(heldout) % 2 == 0
    assert not {d.text for d in train} & {d.text for d in heldout}
    shuffled = [Document(d.text, "other") for d in random.Random(1).sample(corpus, 4000)]
    assert {d.text for d in divide(shuffled)[1]} == {d.text for d in heldout}
    grown = divide(corpus + documents(500, seed=7))
    assert {d.text for d in heldout} <= {d.text for d in grown[1]}


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_one_long_document_is_split_by_paragraphs(separator, share):
    text = separator.join(f"paragraph {n} says {n * n}" for n in range(1000))
    seen = []
    with events.subscribed(seen.append):
        train, heldout = divide([Document(text, "book.txt")], share)
    assert "split by paragraphs" in seen[0].text
    held = sum(len(d.text) for d in heldout) / len(text)
    assert share * 0.8 < held < share * 1.4
    lines = lambda side: {line for d in side for line in d.text.splitlines() if line}
    assert not lines(train) & lines(heldout) and len(lines(train) | lines(heldout)) == 1000


def test_a_huge_document_on_the_held_out_side_does_not_eat_the_corpus():
    small = [d for d in documents(400) if not is_heldout(d.text)]
    n = next(n for n in range(10**4) if is_heldout("\n\n".join(f"{n} {i} huge" for i in range(20_000))))
    huge = Document("\n\n".join(f"{n} {i} huge" for i in range(20_000)), "huge.txt")
    train, heldout = divide([*small, huge])
    assert sum(len(d.text) for d in heldout) < 0.1 * sum(len(d.text) for d in train)


def test_one_large_document_for_training_and_crumbs_held_out():
    crumbs = [d for d in documents(400) if is_heldout(d.text)][:3]
    n = next(n for n in range(100) if not is_heldout("\n\n".join(f"{n} {i} huge" for i in range(20_000))))
    train, heldout = divide([*crumbs, Document("\n\n".join(f"{n} {i} huge" for i in range(20_000)), "huge.txt")])
    assert sum(len(d.text) for d in heldout) > 0.03 * sum(len(d.text) for d in train)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.99, 1.0])
def test_two_paragraphs_are_enough_for_two_sides(share):
    train, heldout = divide([Document("first\n\nsecond", "a")], share)
    assert len(train) == len(heldout) == 1


@pytest.mark.parametrize("corpus", [[], [Document("one line", "a")], [Document("same", "a"), Document("same", "b")]])
def test_a_corpus_that_cannot_be_split_is_refused(corpus):
    with pytest.raises(BadInput, match="too small"):
        divide(corpus)


@pytest.mark.parametrize("keys", [2, 3, 300])
def test_records_with_equal_keys_are_on_one_side_however_few_there_are(keys):
    records = [(f"question {k}", answer) for answer in range(3) for k in range(keys)]
    train, heldout = divide_by(records, lambda record: record[0], "chats.jsonl", "rows")
    asked, held = ({question for question, _ in side} for side in (train, heldout))
    assert asked and held and not asked & held and sorted(train + heldout) == sorted(records)
    assert held == {q for q in asked | held if is_heldout(q)} or held == {min(asked | held, key=fraction)}
    assert divide_by(reversed(records), lambda record: record[0], "", "") == (
        [r for r in reversed(records) if r in train], [r for r in reversed(records) if r in heldout])


def test_records_that_are_all_held_out_leave_something_to_train_on():
    keys = [f"question {k}" for k in range(400) if is_heldout(f"question {k}")][:3]
    train, heldout = divide_by(keys, str, "chats.jsonl", "rows")
    assert heldout == [min(keys, key=fraction)] and len(train) == 2


@pytest.mark.parametrize("records", [[], ["one"], ["same", "same"]])
def test_records_of_one_key_cannot_be_split(records):
    with pytest.raises(BadInput, match=r"chats\.jsonl holds too few rows"):
        divide_by(records, str, "chats.jsonl", "rows")
