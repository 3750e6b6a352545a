"""Streaming decode and the coloured cut."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import CHINESE, EMOJI, MIXED, TEXTS

from pellucid.tokenizers.stream import StreamDecoder


def test_never_half_a_character(ours):
    """Every piece is whole characters, as soon as they are whole."""
    for text in (CHINESE, EMOJI, MIXED):
        ids, stream, seen = ours.encode(text), ours.stream(), b""
        for i, token in enumerate(ids):
            piece = stream.add(token)
            assert "\ufffd" not in piece
            seen += piece.encode()
            raw = b"".join(map(ours.token_bytes, ids[:i + 1]))
            assert raw.startswith(seen) and len(raw) - len(seen) < 4
        assert seen.decode() == text and stream.finish() == ""


@settings(max_examples=300, deadline=None)
@given(data=st.lists(st.binary(max_size=3) | st.sampled_from([b"\xe4", b"\xbd\xa0", b"\xf0\x9f", b"\x98\x80", b"a"])))
def test_pieces_joined_are_the_whole(data):
    """For broken bytes as well; and a finished decoder starts anew."""
    stream = StreamDecoder(lambda i: data[i])
    for _ in range(2):
        assert "".join(map(stream.add, range(len(data)))) + stream.finish() == b"".join(data).decode(errors="replace")


def test_unfinished_characters_are_given_up_at_the_end(ours):
    stream = ours.stream()
    assert [stream.add(b) for b in "a你".encode()[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


def test_show_holds_every_token_and_id(ours):
    for text in [*TEXTS, ""]:
        plain = ours.show(text, colour=False)
        assert [int(i) for i in re.findall(r"·(\d+)(?=\||\n|$)", plain)] == ours.encode(text)
        coloured = re.sub(r"\x1b\[[0-9;]*m", "", ours.show(text)).replace("\n", " ").split(" ")
        assert len(coloured) >= len(ours.encode(text))


def test_show_makes_the_invisible_visible(ours):
    assert ours.show("a\x1b[31m\n\t b 😀", colour=False).isprintable() is False  # only for the line ends
    shown = ours.show("\x1b[31m\u202e", colour=False)
    assert "<U+001B>" in shown and "\x1b" not in shown and "\u202e" not in shown
    first, second = ours.show("x\n42", colour=False).split("\n")
    assert first.endswith(f"⏎·{ours.encode('x' + chr(10))[-1]}") and second == "42·298"
