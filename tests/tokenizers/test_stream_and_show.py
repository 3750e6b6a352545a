"""Streaming decode and the coloured cut."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import CHINESE, EMOJI, MIXED, TEXTS, clip, wordpiece

from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.stream import StreamDecoder
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers


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


def loaded(library, folder) -> Tokenizer:
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_show_of_words_and_of_clip(tmp_path):
    """WordPiece shows `##` where a word goes on, CLIP a space where one ends; every token and id is there."""
    bert = loaded(wordpiece(), tmp_path)
    shown = bert.show("unaffable 中文!", colour=False)
    cells = [cell.rsplit("·", 1) for cell in shown.split("|")]
    assert [int(i) for _, i in cells] == bert.encode("unaffable 中文!")
    assert "".join(text.removeprefix("##") for text, _ in cells) == "unaffable中文!" and cells[1][0].startswith("##")
    words = loaded(clip(), tmp_path)
    cells = [cell.rsplit("·", 1) for cell in words.show("A cat's  中", colour=False).split("|")]
    assert [int(i) for _, i in cells] == words.encode("A cat's  中") and "".join(t for t, _ in cells).startswith("a␣")
    assert "\x1b[48;5;" in words.show("a cat") and "<e4>" in words.show("中", colour=False)
    for tok in (bert, words):
        for text in [*TEXTS, ""]:
            assert [int(i) for i in re.findall(r"·(\d+)(?=\||\n|$)", tok.show(text, colour=False))] == tok.encode(text)


def test_streams_of_words_and_of_clip(tmp_path):
    """A letter at a time, no half character, no space at the ends; joined they are the decoded text."""
    for library in (wordpiece(), clip()):
        tok = loaded(library, tmp_path)
        for text in (CHINESE, EMOJI, MIXED, "don't stop, a cat's 12 !"):
            ids, stream = tok.encode(text), tok.stream()
            parts = [stream.add(i) for i in ids]
            whole = "".join(parts) + stream.finish()
            assert whole == tok.decode(ids)
            if "\ufffd" not in tok.decode(ids):
                assert not any("\ufffd" in part for part in parts)


def test_a_stream_that_ends_within_a_character_after_others(tmp_path):
    """SentencePiece's way: what the vocabulary lacks is spelled in bytes, of which the last may be missing."""
    vocab = {"<unk>": 0, "\u2581a": 1, "b": 2, "\u2581": 3, "a": 4, **{f"<0x{b:02X}>": 5 + b for b in range(256)}}
    library = Library(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok = loaded(library, tmp_path)
    ids = tok.encode("ab \u4e2db")
    assert len(ids) == 7 and tok.decode(ids) == "ab \u4e2db"
    stream = tok.stream()
    assert [stream.add(i) for i in ids] == ["a", "b", " ", "", "", "\u4e2d", "b"] and stream.finish() == ""
    parts = [stream.add(i) for i in ids[:5]]
    assert parts == ["a", "b", " ", "", ""] and stream.finish() == tok.decode(ids[:5])[3:] != ""
    assert [stream.add(ids[0]), stream.finish()] == ["a", ""]  # fresh again
    ids = tok.encode("ab\u4e2d")
    assert [stream.add(i) for i in ids[:4]] == ["a", "b", "", ""] and stream.finish() == tok.decode(ids[:4])[2:] == "\ufffd\ufffd"


def test_facts(ours, tmp_path):
    facts = ours.facts()
    assert facts["kind"] == "byte-level BPE" and facts["vocabulary"] == 700 and facts["added"] == 9 and facts["special"] == 3
    assert facts["ends_an_answer"] == ["<|im_end|>", "<|endoftext|>"] and facts["around_a_text"] == "text"
    assert facts["template_reads_tools"] and facts["template_switches_thinking"] and facts["template_marks_answers"]
    bert = loaded(wordpiece(), tmp_path).facts()
    assert bert["kind"] == "WordPiece" and bert["around_a_text"] == "[CLS] text [SEP]" and bert["templates"] == []
    assert loaded(clip(), tmp_path).facts()["around_a_text"] == "<|startoftext|> text <|endoftext|>"
