"""Text out of a stream of tokens, one token at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Bytes of tokens in, whole characters out.

    A Chinese character or an emoji is three or four bytes, which a token boundary may cut. `add` returns what has
    become certain and keeps the rest; `finish` gives up on unfinished bytes (U+FFFD). The pieces joined are what
    decoding all ids at once gives.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters completed by `token`; often one word, sometimes nothing."""
        return self._utf8.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left: nothing, or U+FFFD for bytes that never became a character. The decoder is fresh again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class WindowDecoder:
    """The same for tokenizers whose tokens mean text only beside their neighbours (WordPiece, SentencePiece).

    The ids shown last, which end with a whole character, are decoded again before the new ones; what is longer
    than they are alone is new text.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._shown: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._decode(self._shown + self._new)
        if text.endswith("\ufffd"):  # perhaps half a character
            return ""
        return self._show(text)

    def finish(self) -> str:
        rest = self._show(self._decode(self._shown + self._new)) if self._new else ""
        self._shown = []
        return rest

    def _show(self, text: str) -> str:
        before = self._decode(self._shown) if self._shown else ""
        self._shown, self._new = self._new, []
        return text[len(before):]
