"""Answers of a given form: JSON of a schema, a regular expression, a grammar, one of several texts.

At each place the tokens that the form cannot go on with are forbidden, so that what is written always fits it. The automaton
is llguidance's (Rust; an Earley parser over a lexer of derivatives, with the vocabulary as a trie); it works on bytes, so
that tokens which end inside a character are allowed. What a schema asks and the library cannot promise is refused.

    grammars = Grammars(tokenizer, vocab, eos)
    form = grammars.constraint(StructuredOutput(regex="[0-9]{4}"), prompt)

White space between the parts of JSON: one space, or a line break with at most 64 spaces; without a limit a model could
write spaces for ever and still be on its way to valid JSON.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.engine.params import StructuredOutput
from pellucid.errors import BadInput
from pellucid.tokenizers import Tokenizer

OPEN, CLOSE = b"<think>", b"</think>"
WHITE = r"[ ]?|\n[ ]{0,64}"
MOST_FORMS = 64  # compiled ones that are kept


class Grammars:
    """The vocabulary, prepared once, and the forms that were asked for lately.  vocab: of the model's logits."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]):
        self.library = library()
        if not eos:
            raise BadInput("a structured output needs a token that ends the answer", "this tokenizer has none")
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, list(eos)
        self.forms: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self.words = self.library.LLTokenizer(self.library.TokenizerWrapper(Words(tokenizer, vocab, eos[0])), n_vocab=vocab, eos_token=list(eos))
        self.opening = tokenizer.encode(OPEN.decode())

    def constraint(self, wanted: StructuredOutput, prompt: Sequence[int]) -> Constraint:
        """BadInput where it is no valid form, or one that the library cannot hold an answer to."""
        key = self._key(wanted)
        if key not in self.forms:
            self.forms[key] = self._compile(*key)
            if len(self.forms) > MOST_FORMS:
                self.forms.popitem(last=False)
        self.forms.move_to_end(key)
        opened = wanted.thinking and self.tokenizer.decode(prompt[-8:]).rstrip().endswith(OPEN.decode())
        return Constraint(self, self.forms[key].deep_copy(), "thought" if opened else "start" if wanted.thinking else "form")

    def _key(self, wanted: StructuredOutput) -> tuple[str, str]:
        if wanted.regex is not None:
            return "regex", wanted.regex
        if wanted.grammar is not None:
            return "grammar", wanted.grammar
        if wanted.choice:
            return "choice", json.dumps(wanted.choice)
        schema = {"type": "object"} if wanted.json_object else wanted.json_schema
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise BadInput("the JSON schema is no JSON", str(error)) from None
        return "json_schema", json.dumps(schema)

    def _compile(self, kind: str, text: str) -> Any:
        matcher = self.library.LLMatcher
        try:
            if kind == "regex":
                grammar = matcher.grammar_from_regex(text)
            elif kind == "json_schema":
                grammar = matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": True, "whitespace_pattern": WHITE})
            elif kind == "choice":
                grammar = matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in json.loads(text)))
            else:
                grammar = matcher.grammar_from_lark(self.library.gbnf_to_lark.any_to_lark(text))
        except Exception as error:  # the library's, of whatever kind: they are about the text that was given
            raise BadInput(f"the {kind} of the structured output cannot be used", str(error)) from None
        made = matcher(self.words, grammar, log_level=0)
        if made.is_error():
            raise BadInput(f"the {kind} of the structured output cannot be used", made.get_error().split("\n")[0])
        if warnings := made.get_grammar_warnings():
            raise BadInput(f"the {kind} of the structured output cannot be promised", "; ".join(warnings))
        return made


class Words:
    """The tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int):
        self.encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        added = {token.id for token in tokenizer.added}
        known = range(min(vocab, tokenizer.vocab_size))
        self.tokens = [tokenizer.token_bytes(i) for i in known] + [b""] * (vocab - len(known))
        unreal = {i for i in range(vocab) if i >= len(known) or self.tokens[i] == b"" or self.tokens[i] == "\ufffd".encode()}
        self.special_token_ids = sorted(i for i in added | unreal if i < vocab)
        for i in self.special_token_ids:  # control tokens never stand for text, whatever they look like
            self.tokens[i] = b"\xff" + (self.tokens[i] or b"<unused>")

    def __call__(self, text: str) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode())


class Constraint:
    """One answer on its way.  phase: `start` (it may open a thought, or begin), `thought` (free), `form`."""

    def __init__(self, grammars: Grammars, matcher: Any, phase: str):
        self.grammars, self.matcher, self.phase = grammars, matcher, phase
        self.opened = 0  # tokens of the thought's opening that stand
        self.tail = b""  # the thought's last bytes

    @property
    def complete(self) -> bool:
        """Nothing can follow any more."""
        return self.phase == "form" and bool(self.matcher.is_stopped())

    @property
    def error(self) -> str:
        """Why the library cannot go on (a form too complex to follow); empty as a rule."""
        return self.matcher.get_error() if self.matcher.is_error() else ""

    def fill(self, masks: Tensor, drafts: Sequence[int] = ()) -> None:
        """masks (1 + drafts, words) int32, a bit a token: those that can stand behind the answer and behind each draft. Behind a draft
        that cannot stand itself the mask is left as it is: nothing is drawn from there."""
        before, consumed = (self.phase, self.opened, self.tail), 0
        for row, mask in enumerate(masks):
            self._fill(mask)
            if row < len(drafts):
                formed = self.phase == "form" or (self.phase == "start" and not self._opens(drafts[row]))
                if not self.accept(drafts[row]):
                    break
                consumed += formed
        if consumed:
            self.matcher.rollback(consumed)
        self.phase, self.opened, self.tail = before

    def _fill(self, mask: Tensor) -> None:
        opening = self.grammars.opening
        if self.phase == "thought":
            mask.fill_(-1)
            for end in self.grammars.eos:  # the answer is still to come
                allow(mask, end, False)
        elif self.phase == "start" and self.opened:
            mask.zero_()
            allow(mask, opening[self.opened])
        else:
            self.matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * 4)
            if self.phase == "start":
                allow(mask, opening[0])

    def _opens(self, token: int) -> bool:
        return token == self.grammars.opening[self.opened] and (self.opened > 0 or self.matcher.validate_tokens([token]) == 0)

    def accept(self, token: int) -> bool:
        """The token stands behind the answer. False, and nothing has changed, where it cannot."""
        if self.phase == "start":
            if self._opens(token):
                self.opened += 1
                if self.opened == len(self.grammars.opening):
                    self.phase, self.opened = "thought", 0
                return True
            if self.opened:
                return False
        if self.phase == "thought":
            self.tail = (self.tail + self.grammars.tokenizer.token_bytes(token))[-64:]
            if CLOSE in self.tail:
                self.phase, self.tail = "form", b""
            return True
        if self.matcher.validate_tokens([token]) == 0 or not self.matcher.consume_token(token):
            return False
        self.phase = "form"
        return True


def allow(mask: Tensor, token: int, allowed: bool = True) -> None:
    bit = 1 << token % 32
    bit = bit - (1 << 32) if bit >> 31 else bit  # words are signed
    if allowed:
        mask[token // 32] |= bit
    else:
        mask[token // 32] &= ~bit


def forbid(logits: Tensor, masks: Tensor) -> Tensor:
    """logits (B, V) and masks (B, words) int32 -> logits, -inf where the bit is 0."""
    octets = masks.to(logits.device).view(torch.uint8)  # little endian: the first byte holds the first eight tokens
    bits = (octets[..., None] & (1 << torch.arange(8, dtype=torch.uint8, device=logits.device))) != 0
    return logits.masked_fill(~bits.flatten(1)[:, : logits.shape[1]], -torch.inf)


def library() -> Any:
    try:
        found = importlib.import_module("llguidance")
        importlib.import_module("llguidance.gbnf_to_lark")
    except ImportError:
        raise BadInput("structured output needs the package llguidance", "it is not installed here",
                       "pip install 'pellucid[structured]'") from None
    return found
