"""`Tokenizer`: text <-> ids, conversations -> ids with the assistant's mask."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from pellucid.errors import BadInput
from pellucid.files import write_atomic
from pellucid.tokenizers import chat, check, layout
from pellucid.tokenizers.check import AGAIN
from pellucid.tokenizers.engines import LibraryEngine, choose_engine, token_table
from pellucid.tokenizers.framing import Batch, Frame, assemble, frame_of, pad, shorten
from pellucid.tokenizers.layout import AddedToken, ByteLevelBPE
from pellucid.tokenizers.show import show_tokens
from pellucid.tokenizers.sources import Source, open_source
from pellucid.tokenizers.spans import PROBE, Guard, Rendered, either, segments, spans_by_comparison, unmark
from pellucid.tokenizers.stream import StreamDecoder, WindowDecoder
from pellucid.tokenizers.train import mended
from pellucid.tokenizers.vocabularies import END_OF_TEXT

UNKNOWN = "\ufffd".encode()
"""What an id without a token decodes to: models have more embedding rows than there are tokens."""

PARALLEL_LENGTH = 8192
"""Threads pay for texts of at least this mean length: on short ones they queue for Python's lock."""


class Tokenizer:
    """A tokenizer as saved beside a model.

    special: control tokens, text -> id.  added: these and the other added tokens (`<think>` ...).
    eos_ids: tokens that end an answer.  end_of_turn_id: the one that the chat template writes.
    pad_id: fills rows; what is trained is told by the mask, never by comparing with it.
    prefix_ids: what stands before a plain text (Llama 3: the begin token); `encode` leaves it out.
    frame: all that stands around a text, or two of them; `encode_batch` puts it there.
    backend: which engine encodes, and why.
    """

    def __init__(self, source: Source):
        self.source = source
        try:
            self._engine, self.backend = choose_engine(source.data)
            self._table = token_table(source.data)
            self.added = [AddedToken.read(entry) for entry in source.data.get("added_tokens") or []]
        except BadInput:
            raise
        except Exception as error:  # a file may be wrong in any way
            raise BadInput("tokenizer.json is broken", f"{type(error).__name__}: {error}"[:300], AGAIN) from error
        self.special = {token.content: token.id for token in self.added if token.special}
        self._ids = {token.content: token.id for token in self.added}
        self._any = either(self._ids)
        self._words = either(name for name in self._ids if name not in self.special)

    @classmethod
    def load(cls, path_or_id: str | os.PathLike[str]) -> Tokenizer:
        """From a folder, a tokenizer.json or a Hub id (the Hub's cache and offline mode are respected).

        Raises `BadInput` when there is none, or it is broken.
        """
        return cls(open_source(Path(path_or_id) if isinstance(path_or_id, os.PathLike) else path_or_id))

    @classmethod
    def from_bpe(cls, bpe: ByteLevelBPE, template: str = chat.OUR_TEMPLATE, **config: Any) -> Tokenizer:
        """Of parts; config: fields of tokenizer_config.json (`eos_token`, `pad_token` ...)."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
        return cls(Source(layout.write(bpe), config, {"default": template}))

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja: what `tokenizers` and transformers open."""
        folder = Path(folder)
        write_atomic(folder / "tokenizer.json", json.dumps(self.source.data, ensure_ascii=False))
        config = {key: value for key, value in self.source.config.items() if key != "chat_template"}
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        for name, template in self.source.templates.items():
            place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            write_atomic(folder / place, template)

    # ---- text <-> ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`, nothing put before or behind.

        The text of a special token is plain text unless `allow_special`; other added tokens are always found.
        Equal to `tokenizers` with `encode_special_tokens = not allow_special`.
        """
        try:
            if isinstance(self._engine, LibraryEngine):
                return self._engine.encode(text, allow_special)
            return self._encode_segments(text, self._any if allow_special else self._words)
        except UnicodeEncodeError:
            return self.encode(mended(text), allow_special)

    def _encode_segments(self, text: str, names: Any) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in names.finditer(text):
            if match.start() > at:
                ids += self._engine.plain(text[at:match.start()])
            ids.append(self._ids[match.group()])
            at = match.end()
        if at == 0:
            return self._engine.plain(text)
        return ids + self._engine.plain(text[at:])

    def encode_each(self, texts: Iterable[str], allow_special: bool = False) -> list[list[int]]:
        """`encode` of each; long texts in threads (the engines leave Python's lock)."""
        texts = check.texts(texts, "the texts")
        if isinstance(self._engine, LibraryEngine):
            return self._engine.encode_batch([mended(text) for text in texts], allow_special)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(cores, len(texts))
        if threads < 2 or sum(map(len, texts)) < PARALLEL_LENGTH * len(texts):
            return [self.encode(text, allow_special) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, allow_special), texts))

    def encode_batch(self, texts: Iterable[str], pairs: Iterable[str] | None = None, max_length: int | None = None,
                     padding: bool | str = True, allow_special: bool = False) -> Batch:
        """What an encoder reads: (ids, mask, types), each (B, T), with special tokens ([CLS] a [SEP] b [SEP]).

        pairs: the second text of each.  max_length: longer rows are cut, the longer of two texts first.
        padding: True, to the longest row; "max_length", to that, or to the model's own; False: rows must be equally
        long.  Sides and tokens are the config's.  Equal to transformers' fast tokenizers, except that the text of a
        special token is plain text unless `allow_special`.
        """
        first = self.encode_each(texts, allow_special)
        second = [[] for _ in first] if pairs is None else self.encode_each(pairs, allow_special)
        if len(first) != len(second):
            raise BadInput(f"there are {len(first)} texts and {len(second)} second texts", next="give one for each")
        parts = self.frame.single if pairs is None else self.frame.pair
        around = sum(len(part.ids) for part in parts)
        if padding not in (True, False, "max_length"):
            raise BadInput(f"padding is {padding!r:.40}", next='give True, False or "max_length"')
        length = max_length or self.model_max_length if padding == "max_length" else max_length
        if (length is None and padding == "max_length") or (length is not None and length < max(1, around)):
            raise BadInput(f"max_length is {length}", f"{around} special tokens stand around a text",
                           f"give max_length={max(1, around)} or more")
        if length is not None:
            left = self.source.config.get("truncation_side") == "left"
            both = [shorten(a, b, length - around, left) for a, b in zip(first, second)]
        else:
            both = list(zip(first, second))
        rows = [assemble(parts, a, b) for a, b in both]
        lengths = {len(ids) for ids, _ in rows}
        if padding is False and len(lengths) > 1:
            raise BadInput("the rows have different lengths", f"{sorted(lengths)[:8]} tokens", "leave padding=True")
        width = length if padding == "max_length" and length else max(lengths, default=0)
        return pad(rows, width, self.pad_id, left=self.source.config.get("padding_side") == "left")

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text; bytes that are no UTF-8, and ids without a token, become U+FFFD."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise BadInput(f"{int(min(ids))} is no token id", next="leave out labels such as -100 before decoding")
        if skip_special:
            skipped = set(self.special.values())
            ids = [i for i in ids if i not in skipped]
        if self._table is None:
            return self._decode_words([int(i) for i in ids])
        try:
            raw = b"".join([self._table[i] for i in ids])  # type: ignore[misc]
        except (IndexError, TypeError):  # an id without a token
            raw = b"".join(map(self.token_bytes, ids))
        text = raw.decode("utf-8", errors="replace")
        return text.strip() if self._spells_ends else text

    @cached_property
    def _spells_ends(self) -> bool:
        """Whether words end in a mark (`cat</w>`, CLIP) which stands for the space behind them."""
        return bool(self.source.data["model"].get("end_of_word_suffix"))

    def _decode_words(self, ids: list[int]) -> str:
        known = [i if i < self.vocab_size and self._library.full.id_to_token(i) is not None else -1 for i in ids]
        runs = itertools.groupby(known, key=lambda i: i >= 0)
        return "".join(self._library.full.decode([*run], skip_special_tokens=False) if real else "\ufffd" * len([*run])
                       for real, run in runs)

    @property
    def _library(self) -> LibraryEngine:
        """The engine of a tokenizer without a table of bytes."""
        assert isinstance(self._engine, LibraryEngine)
        return self._engine

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for (for WordPiece and the like: its text, as it stands alone)."""
        if self._table is None:
            known = self._library.full.id_to_token(token) if token < self.vocab_size else None
            return UNKNOWN if known is None else known.encode()
        found = self._table[token] if token < len(self._table) else None
        return UNKNOWN if found is None else found

    def stream(self) -> StreamDecoder | WindowDecoder:
        """A decoder of one token at a time: `.add(id) -> str`, `.finish() -> str`."""
        if self._table is None or self._spells_ends:
            return WindowDecoder(self.decode)
        return StreamDecoder(self.token_bytes)

    def show(self, text: str, colour: bool = True) -> str:
        """How `text` is cut: each token on its own colour with its id behind it."""
        return show_tokens(((self.token_bytes(i), i) for i in self.encode(text)), colour)

    # ---- numbers

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        if self._table is not None:
            return len(self._table)
        return 1 + max(self._library.full.get_vocab(with_added_tokens=True).values())

    @cached_property
    def named(self) -> dict[str, int]:
        """bos_token, eos_token, pad_token ... -> id, as far as the files name them."""
        found = {name: self.id_of(text) for name, text in self.source.named().items()}
        return {name: number for name, number in found.items() if number is not None}

    def id_of(self, token: str) -> int | None:
        """The id of an added token or a word of the vocabulary, by its text."""
        if token in self._ids:
            return self._ids[token]
        vocab = self.source.data["model"].get("vocab")
        return vocab.get(token) if isinstance(vocab, dict) else None

    @cached_property
    def frame(self) -> Frame:
        return frame_of(self.source.data.get("post_processor"))

    @cached_property
    def prefix_ids(self) -> list[int]:
        before = itertools.takewhile(lambda part: not part.text, self.frame.single)
        return [i for part in before for i in part.ids]

    @cached_property
    def model_max_length(self) -> int | None:
        """The longest row that the model was made for; None where the config does not say."""
        length = self.source.config.get("model_max_length")
        return int(length) if isinstance(length, int | float) and 0 < length < 1e9 else None

    @cached_property
    def bos_id(self) -> int | None:
        return self.named.get("bos_token")

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """What ends the assistant's turn in the chat template; without a template, the end of text."""
        if self.source.templates:
            try:
                text = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}],
                                   add_generation_prompt=False)
            except BadInput:
                text = ""  # a template for other conversations than these
            found = either(self.special).search(text, text.rfind(PROBE) + 1) if PROBE in text else None
            if found:
                return self.special[found.group()]
        return self.named.get("eos_token")

    @cached_property
    def eos_ids(self) -> list[int]:
        # A model that has only read documents ends with the token between documents, whatever its template writes.
        ends = [self.end_of_turn_id, self.named.get("eos_token"), self.special.get(END_OF_TEXT), *self.source.eos_ids]
        return list(dict.fromkeys(i for i in ends if i is not None))

    @cached_property
    def pad_id(self) -> int:
        """The padding token, else the end of text, else 0."""
        return self.named.get("pad_token", self.named.get("eos_token", 0))

    def facts(self) -> dict[str, Any]:
        """What an inspector tells of a tokenizer."""
        model, templates = self.source.data["model"], self.source.templates
        kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
        template = self.template() if templates else ""
        return {
            "kind": f"byte-level {kind}" if kind == "BPE" and self._table is not None else kind,
            "vocabulary": self.vocab_size, "merges": len(model.get("merges") or []),
            "added": len(self.added), "special": len(self.special), "named": self.source.named(),
            "ends_an_answer": [self._text_of(i) for i in self.eos_ids],
            "around_a_text": " ".join(part.text.replace("A", "text") or self._text_of(i)
                                      for part in self.frame.single for i in (part.ids or (0,))),
            "max_length": self.model_max_length, "engine": self.backend,
            "templates": sorted(templates), "template_reads_tools": "tools" in template,
            "template_switches_thinking": "enable_thinking" in template or "thinking is" in template,
            "template_marks_answers": bool(template) and chat.has_generation(template)}

    def _text_of(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", errors="replace")

    # ---- conversations

    def render(self, messages: Sequence[chat.Message], tools: list[dict] | None = None, thinking: bool | None = None,
               add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation by the chat template, equal to transformers' `apply_chat_template`.

        thinking: True or False where the template knows the switch; None leaves the template's default.
        variables: what this template reads besides (Llama's `date_string`, `documents` ...).
        """
        return self._render(messages, tools, thinking, add_generation_prompt, variables, tracking=False)

    def _render(self, messages: Sequence[chat.Message], tools: list[dict] | None, thinking: bool | None, prompt: bool,
                variables: Mapping[str, Any], tracking: bool) -> str:
        switch = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        read: dict[str, Any] = {**self.source.named(), **switch, **variables, "add_generation_prompt": prompt}
        return chat.render(self.template(tools), messages, tools, tracking, **read)

    def template(self, tools: list[dict] | None = None) -> str:
        templates = self.source.templates
        if not templates:
            raise BadInput("this tokenizer has no chat template", "its model was not made for conversations",
                           "give it plain text, or put a chat_template.jinja beside tokenizer.json")
        if tools and "tool_use" in templates:
            return templates["tool_use"]
        return templates.get("default") or next(iter(templates.values()))

    def encode_chat(self, messages: Sequence[chat.Message], tools: list[dict] | None = None,
                    thinking: bool | None = None, add_generation_prompt: bool = False,
                    **variables: Any) -> tuple[list[int], list[bool]]:
        """(ids, mask), of equal length; mask True: the assistant's own tokens, its end of turn included.

        The newline that a template writes behind the end of turn is not the assistant's. Text inside messages and
        tools never becomes a control token (see `spans.py`). The assistant's text is encoded apart from what
        stands before it, as it is when the model writes it: so the ids of a conversation begin with the ids of
        its prompt.
        """
        guard = self._guard(self.template(tools))
        messages = [guard.message(message) for message in chat.checked(messages)]
        tools, variables = guard.foreign(chat.checked_tools(tools)), guard.foreign(chat.plain(variables))

        def render(messages: Sequence[chat.Message], prompt: bool) -> Rendered:
            return unmark(self._render(messages, tools, thinking, prompt, variables, tracking=True))

        rendered = render(messages, add_generation_prompt)
        spans = rendered.spans
        if not chat.has_generation(self.template(tools)):
            ends = [token.content for token in self.added if token.id in self.eos_ids]
            spans = spans_by_comparison(lambda *args: render(*args).text, messages, list(self.special), ends)
        return self._encode_rendered(rendered, spans)

    def _guard(self, template: str) -> Guard:
        if template not in self._guards:
            literals = chat.literals(template)
            words = [t.content for t in self.added if not t.special and t.content in literals and t.content.strip()]
            self._guards[template] = Guard(self.special, words)
        return self._guards[template]

    @cached_property
    def _guards(self) -> dict[str, Guard]:
        return {}

    def _encode_rendered(self, rendered: Rendered, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for start, end, token in segments(rendered, spans, self._any):
            new = [self._ids[token]] if token else self._plain(rendered.text[start:end], first=not ids)
            ids += new
            mask += [any(a <= start < b for a, b in spans)] * len(new)
        return ids, mask

    def _plain(self, text: str, first: bool) -> list[int]:
        try:
            return self._engine.plain(text, first)
        except UnicodeEncodeError:
            return self._engine.plain(mended(text), first)
