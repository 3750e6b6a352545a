"""`LLM`: prompts in, texts out. Tokens and text meet here; everything below works on ids.

    llm = LLM("runs/grow/model")
    print(llm.generate(["12 + 30 ="], SamplingParams(max_tokens=16))[0].outputs[0].text)
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pellucid.engine.batch import Batch, Sample, check_length, run_all
from pellucid.engine.params import SamplingParams
from pellucid.errors import BadInput
from pellucid.models import embed_texts, load
from pellucid.models.embedding import read_recipe
from pellucid.models.hub import local_folder, read_config
from pellucid.nn import Decoder
from pellucid.quant import is_int8, quantize
from pellucid.runtime import choose_device
from pellucid.tokenizers import Tokenizer

Prompt = str | list[int]


@dataclass
class Completion:
    """One sample: `token_ids` hold the end token where one was generated, `text` does not show it."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[Completion]


@dataclass
class Chunk:
    """A piece of a streamed answer: whole characters only. The last piece carries `finish_reason`."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None


class LLM:
    """A decoder with its tokenizer. `model` may be a folder, a Hub id, or a `Decoder` (then give the tokenizer)."""

    def __init__(
        self, model: str | os.PathLike[str] | Decoder, tokenizer: Tokenizer | None = None, *, dtype: str = "float32",
        device: str = "cpu", max_batch: int = 512, allow_missing: bool = False,
    ):
        if isinstance(model, Decoder):
            if tokenizer is None:
                raise TypeError("LLM(model, tokenizer): a model object needs its tokenizer")
            self.model, self.tokenizer = model, tokenizer
            self.folder: Path | None = None
        else:
            self.model = open_model(model, dtype, device, allow_missing)
            self.folder = local_folder(model)
            self.tokenizer = tokenizer or Tokenizer.load(model)
        self.max_batch = max_batch

    @property
    def context(self) -> int:
        return getattr(self.model.spec, "limit", self.model.spec.context)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput a prompt, in order; all of them run in the same batches. Default: greedy, 256 tokens."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        ids = [self._ids(p) for p in ([prompts] if single else prompts)]  # type: ignore[arg-type, list-item]
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(ids)
        if len(each) != len(ids):
            raise ValueError(f"{len(ids)} prompts but {len(each)} sampling parameters")
        samples = [self._samples(p, q) for p, q in zip(ids, each)]
        was_training = self.model.training
        self.model.eval()
        try:
            flat = [s for group in samples for s in group]
            run_all(self.model, flat, self.tokenizer.eos_ids, self._stopped, self.max_batch)
        finally:
            self.model.train(was_training)
        return [RequestOutput(p, [self._completion(i, s) for i, s in enumerate(g)]) for p, g in zip(ids, samples)]

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """texts -> (N, D) float32 of length 1, with the pooling that the folder states, else of each text's last token. Encoders,
        which can do nothing else here, and all options: `pellucid.models.embed_texts`."""
        recipe = None if self.folder is None else read_recipe(self.folder)[0]
        return embed_texts(self.model, texts, tokenizer=self.tokenizer, recipe=recipe, batch_size=batch_size)

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, *, tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> RequestOutput:
        """The answer to a conversation in OpenAI's message format, through the tokenizer's chat template."""
        return self.generate([self.chat_ids(messages, tools, thinking)], params)[0]

    def chat_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None) -> list[int]:
        """The prompt of the next assistant turn; nothing that a message says can become a special token."""
        return self.tokenizer.encode_chat(messages, tools=tools, thinking=thinking, add_generation_prompt=True)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """The answer piece by piece. Closing the iterator stops the work. What is wrong with the request raises here."""
        (sample,) = self._samples(self._ids(prompt), replace(params or SamplingParams(), n=1))
        return self._stream(sample)

    def _stream(self, sample: Sample) -> Iterator[Chunk]:
        decoder, shown, text, held = self.tokenizer.stream(), 0, "", []
        longest_stop = max((len(s) for s in sample.params.stop), default=0)
        for _ in Batch(self.model, [sample], self.tokenizer.eos_ids, self._stopped).run():
            token = sample.tokens[-1]
            held.append(token)
            done = sample.finish_reason
            if not (done == "stop" and token in self.tokenizer.eos_ids):
                text += decoder.add(token)
            if done:
                text = cut(text + decoder.finish(), sample.params.stop)
            ready = text if done else text[: max(shown, len(text) - longest_stop)]  # a stop text may be under way
            if len(ready) > shown or done:
                yield Chunk(ready[shown:], held, done)
                shown, held = len(ready), []

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        for i in ids:
            if not 0 <= i < self.model.spec.vocab:
                raise BadInput(f"the prompt holds {i}, which is no token of this model",
                               f"its ids go from 0 to {self.model.spec.vocab - 1}", "use the model's own tokenizer")
        return ids

    def _samples(self, ids: list[int], params: SamplingParams) -> list[Sample]:
        check_length(len(ids), params.max_tokens, self.context)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        return [Sample(ids, params, seed + j) for j in range(params.n)]

    def _stopped(self, sample: Sample) -> bool:
        """Whether a stop text has appeared. Only the tail is decoded: a stop text of n characters has at most 4n bytes."""
        tail = sample.tokens[-(4 * max(map(len, sample.params.stop)) + 4) :]
        text = self.tokenizer.decode(tail)
        return any(s in text for s in sample.params.stop)

    def _completion(self, index: int, s: Sample) -> Completion:
        ended = bool(s.tokens) and s.tokens[-1] in self.tokenizer.eos_ids and s.finish_reason == "stop"
        text = cut(self.tokenizer.decode(s.tokens[:-1] if ended else s.tokens), s.params.stop)
        return Completion(index, text, s.tokens, s.logprobs if s.params.logprobs else None, s.finish_reason or "cancelled")


def open_model(
    path_or_id: str | os.PathLike[str], dtype: str = "float32", device: str = "cpu", allow_missing: bool = False,
) -> Decoder:
    """The model of a folder or Hub id as it is to run: with INT8 products where the folder holds INT8 weights."""
    folder = local_folder(path_or_id)
    if not is_int8(read_config(folder)):
        return load(folder, dtype=dtype, device=device, allow_missing=allow_missing)  # type: ignore[no-any-return]
    if choose_device(device).value.type != "cpu" and device != "auto":
        raise BadInput(f"INT8 models do not run on {device} yet", "their products are made for the CPU",
                       "use --device cpu, or the float checkpoint")
    return quantize(load(folder))


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop text."""
    ends = [i for i in (text.find(s) for s in stops) if i >= 0]
    return text[: min(ends)] if ends else text
