"""`LLM`: prompts in, texts out. Tokens and text meet here; everything below works on ids.

    llm = LLM("runs/grow/model")
    print(llm.generate(["12 + 30 ="], SamplingParams(max_tokens=16))[0].outputs[0].text)
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import events
from pellucid.engine.adapters import Adapter, read_adapter
from pellucid.engine.batch import check_length
from pellucid.engine.beam import Search, run_searches
from pellucid.engine.config import EngineConfig, choose_room, drafts_of
from pellucid.engine.core import Engine
from pellucid.engine.drafting import check_proposer
from pellucid.engine.fleet import Fleet
from pellucid.engine.job import best_first
from pellucid.engine.layout import Layout
from pellucid.engine.opening import common_ids, open_draft, open_model, spec_at
from pellucid.engine.outputs import Chunk, Completion, RequestOutput
from pellucid.engine.params import SamplingParams
from pellucid.engine.past_calls import past_calls
from pellucid.engine.request import Request, State
from pellucid.engine.sampler import no_numbers
from pellucid.engine.stopping import cut, early
from pellucid.errors import BadInput
from pellucid.models import embed_texts
from pellucid.models.embedding import read_recipe
from pellucid.models.hub import blank, local_folder
from pellucid.nn import Decoder
from pellucid.quant import bits_named
from pellucid.tokenizers import Tokenizer

Prompt = str | list[int]

# The prompt of Qwen3-Reranker (arXiv 2506.05176).
JUDGE = ('Judge whether the Document meets the requirements based on the Query and the Instruct provided. '
         'Note that the answer can only be "yes" or "no".')
TASK = "Given a web search query, retrieve relevant passages that answer the query"
QUESTION = "<Instruct>: {}\n<Query>: {}\n<Document>: {}"


class LLM:
    """A decoder with its tokenizer. `model` may be a folder, a Hub id, or a `Decoder` (then give the tokenizer).

    config: of the engine that answers.  max_batch: requests that run at a time, if the config does not say.  draft: a smaller model
    of the same vocabulary that proposes tokens (folder, Hub id or `Decoder`); what is written is the same without it.
    quantize: round the weights to int8 or int4 while loading (the draft's too).  tp, dp, dp_attention, disaggregate: work by several
    processes, which run until `close`; see engine/layout.py.
    """

    def __init__(
        self, model: str | os.PathLike[str] | Decoder, tokenizer: Tokenizer | None = None, *, dtype: str = "float32",
        device: str = "cpu", max_batch: int = 512, allow_missing: bool = False, config: EngineConfig | None = None,
        draft: str | os.PathLike[str] | Decoder | None = None, quantize: str | None = None, tp: int = 1, dp: int = 1, dp_attention: int = 1,
        disaggregate: bool = False,
    ):
        self.layout = Layout(tp, dp, dp_attention, disaggregate)
        self.fleet: Fleet | None = None
        if isinstance(model, Decoder) and tokenizer is None:
            raise TypeError("LLM(model, tokenizer): a model object needs its tokenizer")
        bits = bits_named(quantize)
        self.folder: Path | None = None if isinstance(model, Decoder) else local_folder(model)
        self.tokenizer = tokenizer or Tokenizer.load(self.folder)  # type: ignore[arg-type]
        self.max_batch, self.config = max_batch, config or EngineConfig(running=max_batch, budget=2048)
        self.same = None if draft is None else self._common(model, draft)
        if drafts_of(self.config, draft is not None):  # before anything large is loaded
            check_proposer(spec_at(model), self.config.proposer, None if draft is None else spec_at(draft), self.same)
        if self.layout.processes > 1:
            self._spread(model, draft, dict(dtype=dtype, device=device, allow_missing=allow_missing, quantize=quantize))
            return
        self.model = model if isinstance(model, Decoder) else open_model(model, dtype, device, allow_missing, bits)
        self.draft = draft if draft is None or isinstance(draft, Decoder) else open_draft(draft, dtype, device, allow_missing, bits)

    def _spread(self, model: str | os.PathLike[str] | Decoder, draft: Any, options: dict[str, Any]) -> None:
        """The weights will be in other processes, which are started when an engine is asked for."""
        if self.folder is None or isinstance(draft, Decoder):
            raise BadInput("a model object cannot be spread over processes", "each of them reads its part from a folder", "give a folder or Hub id")
        spec = spec_at(model)
        self.layout.check(spec)
        self.model, self.draft, self._options = blank(spec), None, options | {"draft": draft, "same": self.same}  # type: ignore[assignment]

    def close(self) -> None:
        """Ends the processes that work for this object, if there are any."""
        if self.fleet is not None:
            self.fleet.close()
            self.fleet = None

    def _common(self, model: str | os.PathLike[str] | Decoder, draft: str | os.PathLike[str] | Decoder) -> int | None:
        """Ids that mean the same to both models; None where there is no draft, or nothing but its number of tokens tells."""
        if isinstance(draft, Decoder):
            return None
        return min(common_ids(self.tokenizer, Tokenizer.load(draft)), spec_at(model).vocab, spec_at(draft).vocab)

    @property
    def context(self) -> int:
        return getattr(self.model.spec, "limit", self.model.spec.context)

    def engine(self, tokens: int | None = None, config: EngineConfig | None = None, **options: Any) -> Engine:
        """A new engine for this model.  tokens: of its cache, if the config does not say.  options: of the config, that differ. Where
        several processes work it is one for all, with all that memory allows."""
        if self.layout.processes > 1:
            return self._fleet(config or self.config)
        config = replace(config or self.config, **options)
        if config.cache_tokens is None and tokens is not None:
            config = replace(config, cache_tokens=min(tokens, choose_room(self.model, config, self.draft).value))
        return Engine(self.model, self.tokenizer.eos_ids, config, self.tokenizer, draft=self.draft, same=self.same)

    def _fleet(self, config: EngineConfig) -> Fleet:
        if self.fleet is not None and self.fleet.config != config:
            self.close()
        if self.fleet is None:
            assert self.folder is not None
            self.fleet = Fleet(self.folder, self.layout, self.model.spec, self.tokenizer, config, **self._options)
        return self.fleet

    def load_adapter(self, path: str | os.PathLike[str], name: str = "") -> Adapter:
        """For requests of this object's engines (`Request.adapter`); see engine/adapters.py. From any thread."""
        if self.layout.processes > 1:
            return (self.fleet or self._fleet(self.config)).load_adapter(path, name)
        return read_adapter(path, self.model, name)

    def drop_adapter(self, adapter: Adapter) -> None:
        """In the engine's thread. Requests under way end with it."""
        if self.fleet is not None:
            self.fleet.drop_adapter(adapter)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput a prompt, in order; all of them run in the same batches. Default: greedy, 256 tokens."""
        ids = self._all_ids(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(ids)
        if len(each) != len(ids):
            raise ValueError(f"{len(ids)} prompts but {len(each)} sampling parameters")
        groups = [self._requests(p, q) for p, q in zip(ids, each, strict=True)]
        if not groups:
            return []
        engine = self._engine_for([r for group in groups for r in group])
        for group in groups:
            for r in group:
                engine.add(r, None if r is group[0] else group[0])
        with self._evaluating():
            while engine.busy:
                engine.step()
        tell_lost([r.fault == "not_numbers" for group in groups for r in group])
        return [self._output(p, q, group) for p, q, group in zip(ids, each, groups, strict=True)]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], beams: int = 4, max_tokens: int = 256, *, n: int | None = None, length_penalty: float = 1.0,
        early_stopping: bool = False, ignore_eos: bool = False,
    ) -> list[RequestOutput]:
        """The `n` (default: all) best of the continuations that a search with so many beams finds, the best first; see engine/beam.py.
        Where several prompts are searched for, one that lost all its beams has a single output, of the finish_reason "error"."""
        ids = self._all_ids(prompts)
        for p in ids:
            check_length(len(p), max_tokens, self.context)
        searches = [Search(p, beams, max_tokens, () if ignore_eos else self.tokenizer.eos_ids, length_penalty, early_stopping) for p in ids]
        with self._evaluating():
            run_searches(self.engine(sum((len(p) + max_tokens + 32) * beams for p in ids), running=max(1, len(ids) * beams)), searches)
        tell_lost([not s.done for s in searches])
        return [RequestOutput(s.prompt, [
            Completion(i, self._text(b.tokens, b.reason == "stop"), b.tokens, None, b.reason, score=b.score)
            for i, b in enumerate(s.done[:n])] or [Completion(0, "", [], None, "error")]) for s in searches]

    def score(
        self, first: Prompt | Sequence[Prompt], second: Sequence[Prompt], *, how: str = "yes-no", instruction: str = TASK, batch_size: int = 64,
    ) -> list[float]:
        """How well each of `second` fits its `first` (one for all, or one each). What the numbers say is `how`:

        yes-no: p(yes) / (p(yes) + p(no)) as the answer to whether the document `second` meets the query `first`, in the prompt
            that Qwen3-Reranker was trained with (arXiv 2506.05176); `instruction` says what meeting means.
        likelihood: the mean log-probability of second's tokens behind first.
        embedding: the cosine of the vectors of `embed`.
        Cross-encoders are no decoders: `pellucid.models.classify_texts`.
        """
        firsts: list[Prompt] = [first] * len(second) if is_one(first) else list(first)  # type: ignore[list-item, arg-type]
        if len(firsts) != len(second):
            raise BadInput(f"{len(firsts)} first texts but {len(second)} second ones", next="give one first text, or as many as second ones")
        pairs = list(zip(firsts, second, strict=True))
        if how == "likelihood":
            return self._likelihoods([(self._ids(a), self._ids(b, behind=True)) for a, b in pairs])
        texts = [tuple(t if isinstance(t, str) else self.tokenizer.decode(t) for t in pair) for pair in pairs]
        if how == "yes-no":
            return self._yes(texts, instruction)
        if how == "embedding":
            a, b = (self.embed([pair[i] for pair in texts], batch_size) for i in (0, 1))
            return (a * b).sum(-1).tolist()  # type: ignore[no-any-return]
        raise BadInput(f"a score by {how!r} is not known", next="use yes-no, likelihood or embedding")

    def _likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        if any(not a or not b for a, b in pairs):
            raise BadInput("a text to be scored has no tokens", "there is nothing to be likely")
        outputs = self.generate([a + b for a, b in pairs], SamplingParams(max_tokens=1, prompt_logprobs=0)) if pairs else []
        return [sum((o.prompt_logprobs or [])[len(a) - 1 :]) / len(b) for o, (a, b) in zip(outputs, pairs, strict=True)]

    def _yes(self, texts: Sequence[tuple[str, ...]], instruction: str) -> list[float]:
        words = [self.tokenizer.encode(word) for word in ("no", "yes")]
        if any(len(word) != 1 for word in words):
            raise BadInput("this tokenizer writes yes or no as several tokens", "their probabilities cannot be read in one place",
                           "score by likelihood or embedding")
        self._here("a score by yes or no")
        prompts = [self.chat_ids([{"role": "system", "content": JUDGE}, {"role": "user", "content": QUESTION.format(instruction, *pair)}], thinking=False)
                   for pair in texts]
        for p in prompts:
            check_length(len(p), 1, self.context)
        device, head = self.model.embed.weight.device, self.model.head_weight[[word[0] for word in words]]
        scores, order = [0.0] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with self._evaluating(), torch.inference_mode():
            for start in range(0, len(order), 16):
                some = order[start : start + 16]
                longest = len(prompts[some[-1]])
                tokens, mask = torch.zeros(2, len(some), longest, dtype=torch.int64)
                for row, i in enumerate(some):
                    tokens[row, : len(prompts[i])], mask[row, : len(prompts[i])] = torch.tensor(prompts[i]), 1
                hidden = self.model.hidden(tokens.to(device), mask=mask.to(device))[torch.arange(len(some)), mask.sum(1) - 1]
                for i, value in zip(some, (hidden @ head.T.to(hidden.dtype)).float().softmax(-1)[:, 1].tolist(), strict=True):
                    scores[i] = value
        return scores

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """texts -> (N, D) float32 of length 1, with the pooling that the folder states, else of each text's last token. Encoders,
        which can do nothing else here, and all options: `pellucid.models.embed_texts`."""
        self._here("a vector")
        recipe = None if self.folder is None else read_recipe(self.folder)[0]
        return embed_texts(self.model, texts, tokenizer=self.tokenizer, recipe=recipe, batch_size=batch_size)

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, *, tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> RequestOutput:
        """The answer to a conversation in OpenAI's message format, through the tokenizer's chat template. A structured answer may be
        thought about first where the template thinks."""
        params = params or SamplingParams()
        if params.structured is not None and thinking is not False and self._thinks:
            params = replace(params, structured=replace(params.structured, thinking=True))
        return self.generate([self.chat_ids(messages, tools, thinking)], params)[0]

    @property
    def _thinks(self) -> bool:
        return any("<think>" in template for template in self.tokenizer.source.templates.values())

    def chat_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None,
                 add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """The prompt of the next assistant turn; nothing that a message says can become a special token.  add_generation_prompt: with
        what opens this turn.  variables: what the chat template reads besides."""
        return self.tokenizer.encode_chat(past_calls(self.tokenizer, messages, tools), tools, thinking, add_generation_prompt, **variables)[0]

    def open_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None,
                 **variables: Any) -> list[int]:
        """The same for a last message that is the assistant's own and goes on: it is left open."""
        ids, own = self.tokenizer.encode_chat(past_calls(self.tokenizer, messages, tools), tools, thinking, **variables)
        ends = {*self.tokenizer.eos_ids, self.tokenizer.end_of_turn_id}
        ids = ids[: len(own) - own[::-1].index(True)] if any(own) else []
        while ids and ids[-1] in ends:
            ids.pop()
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """A plain text as a prompt, behind what the tokenizer puts before one (the begin token of Llama, Gemma, DeepSeek)."""
        return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """The answer piece by piece. Closing the iterator stops the work. What is wrong with the request raises here."""
        (request,) = self._requests(self._ids(prompt), replace(params or SamplingParams(), n=1, best_of=None))
        engine = self._engine_for([request])
        engine.check(request)
        return self._stream(engine, request)

    def _stream(self, engine: Engine, request: Request) -> Iterator[Chunk]:
        engine.add(request)
        try:
            yield from self._pieces(engine, request)
        finally:
            engine.cancel(request)  # nothing where it has ended

    def _pieces(self, engine: Engine, request: Request) -> Iterator[Chunk]:
        decoder, shown, text = self.tokenizer.stream(), 0, ""
        held: list[int] = []
        ends, stops = {*self.tokenizer.eos_ids, *request.params.stop_token_ids}, request.params.stop
        longest_stop = max((len(s) for s in stops), default=0)
        while request.state is not State.FINISHED:
            with self._evaluating():
                given = engine.step()
            for tokens in [tokens for r, tokens in given if r is request]:
                held += tokens
                done = request.finish_reason
                if request.fault == "not_numbers":
                    raise no_numbers()
                text += "".join(decoder.add(t) for i, t in enumerate(tokens) if not (done == "stop" and i == len(tokens) - 1 and t in ends))
                if done:
                    text = cut(text + decoder.finish(), stops, early(self.tokenizer, request.output, request.params))
                ready = text if done else text[: max(shown, len(text) - longest_stop)]  # a stop text may be under way
                if len(ready) > shown or done:
                    yield Chunk(ready[shown:], held, done)
                    shown, held = len(ready), []

    # --- prompts, requests, answers -------------------------------------------------------------------------------------

    def _all_ids(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        return [self._ids(p) for p in ([prompts] if is_one(prompts) else prompts)]  # type: ignore[arg-type, list-item]

    def _ids(self, prompt: Prompt, behind: bool = False) -> list[int]:
        """behind: it is no prompt, but what follows one."""
        ids = list(prompt) if not isinstance(prompt, str) else self.tokenizer.encode(prompt) if behind else self.prompt_ids(prompt)
        for i in ids:
            if not 0 <= i < self.model.spec.vocab:
                raise BadInput(f"the prompt holds {i}, which is no token of this model",
                               f"its ids go from 0 to {self.model.spec.vocab - 1}", "use the model's own tokenizer")
        return ids

    def _requests(self, ids: list[int], params: SamplingParams) -> list[Request]:
        """A request a sample."""
        check_length(len(ids), params.max_tokens, self.context)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        if params.best_of is not None and params.top is None:
            params = replace(params, logprobs=True)  # what the best are chosen by
        return [Request(ids, params, seed + j) for j in range(params.samples)]

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """With places and a cache for as many of the longest of them as run at a time."""
        block = self.config.block
        longest = sorted((-(-r.limit // block) * block for r in requests), reverse=True)[: self.config.running]
        return self.engine(max(sum(longest), 1), running=max(len(longest), 1))

    def _here(self, what: str) -> None:
        if self.layout.processes > 1:
            raise BadInput(f"{what} needs the whole model in this process", "it works in others here", "use one process, or a score by likelihood")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _output(self, ids: list[int], params: SamplingParams, group: list[Request]) -> RequestOutput:
        if params.best_of is not None:
            group = sorted(group, key=best_first)[: params.n]
        first = group[0]
        asked = params.prompt_logprobs is not None
        return RequestOutput(ids, [self._completion(i, r, params) for i, r in enumerate(group)],
                             first.prompt_logprobs if asked else None, first.prompt_tops if asked else None)

    def _completion(self, index: int, r: Request, params: SamplingParams) -> Completion:
        tokens = r.output
        ended = bool(tokens) and r.finish_reason == "stop" and tokens[-1] in (*self.tokenizer.eos_ids, *params.stop_token_ids)
        text = cut(self._text(tokens, ended), params.stop, early(self.tokenizer, tokens, params))
        return Completion(index, text, tokens, r.logprobs if params.top is not None else None,
                          r.finish_reason or "cancelled", r.tops if params.top else None)

    def _text(self, tokens: list[int], ended: bool) -> str:
        """ended: the last token is what ended it."""
        return self.tokenizer.decode(tokens[:-1] if ended else tokens)


def tell_lost(lost: list[bool]) -> None:
    """Which answers broke off because their logits were no numbers: an error where nobody is answered, else a warning."""
    if lost and all(lost):
        raise no_numbers()
    if any(lost):
        events.note(f"{sum(lost)} of {len(lost)} answers broke off, because their logits were not numbers", "warning")


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """A text, or the ids of one."""
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
