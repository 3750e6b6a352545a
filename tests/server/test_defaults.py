"""What holds where a request says nothing: the checkpoint's own settings, OpenAI's lengths, and the begin token before a text."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served_models import random_llm
from test_openai_client import ASK, client_of
from transformers import AutoTokenizer

import pellucid
from pellucid.engine import LLM, SamplingParams
from pellucid.engine.async_llm import AsyncLLM
from pellucid.engine.config import EngineConfig
from pellucid.errors import BadInput
from pellucid.server import running_server
from pellucid.server.defaults import NOTHING, Defaults, read_defaults

post = functools.partial(httpx.post, timeout=60)  # kernels may have to be compiled first

RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_k": 2, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 23, "eos_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer puts a begin token before a text, as Llama's does."""
    folder: Path = tmp_path_factory.mktemp("defaults") / "model"
    made = random_llm()
    pellucid.save(made.model, folder, tokenizer=made.tokenizer)
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    begin = next(t for t in data["added_tokens"] if t["special"])
    data["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": begin["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                              "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                              "special_tokens": {begin["content"]: {"id": begin["content"], "ids": [begin["id"]], "tokens": [begin["content"]]}}}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[openai.OpenAI]:
    with running_server(llm, "tiny") as url:
        yield client_of(url)


def test_a_text_stands_behind_the_begin_token(client: openai.OpenAI, llm: LLM, folder: Path):
    """Ids equal to transformers', in Python, in the server, and where texts are scored."""
    theirs = AutoTokenizer.from_pretrained(folder)("one two three")["input_ids"]
    bare = llm.tokenizer.encode("one two three")
    assert theirs == [*llm.tokenizer.prefix_ids, *bare] and len(theirs) == len(bare) + 1
    assert llm.generate("one two three", SamplingParams(max_tokens=1))[0].prompt_token_ids == theirs
    (piece,) = [r.prompt_token_ids for r in llm.beam_search("one two three", 2, 1)]
    assert piece == theirs
    answer = client.completions.create(model="tiny", prompt="one two three", max_tokens=4, temperature=0)
    assert answer.usage and answer.usage.prompt_tokens == len(theirs)
    assert answer.choices[0].text == llm.generate([theirs], SamplingParams(max_tokens=4))[0].outputs[0].text
    without = client.completions.create(model="tiny", prompt="one two three", max_tokens=4, temperature=0, extra_body={"add_special_tokens": False})
    assert without.usage and without.usage.prompt_tokens == len(bare)
    given = client.completions.create(model="tiny", prompt=bare, max_tokens=4, temperature=0)
    assert given.choices[0].text == without.choices[0].text, "ids are taken as they are"
    tail = llm.tokenizer.encode(" three")
    scored = llm.generate([theirs[: len(theirs) - len(tail)] + tail], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert scored and llm.score("one two", [" three"], how="likelihood")[0] == pytest.approx(sum(scored[-len(tail):]) / len(tail))


def test_echo_shows_the_text_that_was_sent(client: openai.OpenAI, llm: LLM):
    asked: dict[str, Any] = {"model": "tiny", "prompt": "one two", "max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0}
    whole = client.completions.create(**asked).choices[0]
    assert whole.text.startswith("one two") and whole.logprobs and whole.logprobs.tokens and whole.logprobs.text_offset
    assert len(whole.logprobs.tokens) == len(llm.prompt_ids("one two")) + 2 and whole.logprobs.text_offset[:2] == [0, 0]
    for token, offset in list(zip(whole.logprobs.tokens, whole.logprobs.text_offset))[1 : len(llm.prompt_ids("one two"))]:
        assert whole.text[offset:].startswith(token)
    parts = [c.choices[0] for c in client.completions.create(stream=True, **asked)]
    assert "".join(p.text for p in parts) == whole.text
    assert [o for p in parts if p.logprobs for o in p.logprobs.text_offset or []] == whole.logprobs.text_offset


def test_lengths_where_nobody_asks(client: openai.OpenAI, llm: LLM):
    """A completion has 16 tokens, as OpenAI and vLLM have it, a chat what the context leaves."""
    free = {"ignore_eos": True}
    assert client.completions.create(model="tiny", prompt="one", extra_body=free).usage.completion_tokens == 16  # type: ignore[union-attr]
    chat = client.chat.completions.create(model="tiny", messages=ASK, extra_body=free)
    assert chat.usage and chat.usage.total_tokens == llm.context
    said = client.responses.create(model="tiny", input="one", temperature=0)
    assert said.usage and (said.status == "completed" or said.usage.total_tokens == llm.context)


def test_a_cache_smaller_than_the_context_bounds_them_too(llm: LLM):
    for prefix in ("chain", "radix"):
        with running_server(llm, "tiny", engine=EngineConfig(cache_tokens=96, prefix=prefix)) as url:
            chat = client_of(url).chat.completions.create(model="tiny", messages=ASK, extra_body={"ignore_eos": True})
            assert chat.usage and chat.usage.total_tokens == 96 < llm.context and chat.choices[0].finish_reason == "length"
            assert post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 120}).status_code == 400


def test_the_longest_request_is_the_longest_that_is_let_in(llm: LLM):
    for cache in (16, 40, 96, 300):
        engine = AsyncLLM(llm, config=EngineConfig(cache_tokens=cache))
        try:
            assert engine.longest == min(cache // 16 * 16 if cache % 16 == 0 else -(-cache // 16) * 16, llm.context)
        finally:
            engine.close()


def recommending(folder: Path, tmp_path: Path, settings: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    return copy


def test_what_the_checkpoint_recommends(folder: Path, tmp_path: Path):
    """A request that says nothing is answered as one that gives the file's settings; what it gives comes first; the others can be left."""
    made = LLM(recommending(folder, tmp_path, RECOMMENDED))
    asked = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 23, "extra_body": {"top_k": 2, "repetition_penalty": 1.2}}
    with running_server(made, "tiny") as url:
        c = client_of(url)

        def text(**more: Any) -> Any:
            answer = c.chat.completions.create(model="tiny", messages=ASK, seed=3, **more)
            return answer.choices[0].message.content, answer.usage and answer.usage.completion_tokens

        silent = text()
        assert silent == text(**asked) and silent[1] <= 23
        own = text(temperature=1.9, top_p=1, max_tokens=40, extra_body={"top_k": 0, "repetition_penalty": 1.0})
        assert c.completions.create(model="tiny", prompt="one", extra_body={"ignore_eos": True}).usage.completion_tokens == 16  # type: ignore[union-attr]
        told = c.responses.create(model="tiny", input="one")
        assert (told.temperature, told.top_p) == (0.6, 0.95) and told.usage and told.usage.output_tokens <= 23
        assert c.responses.create(model="tiny", input="one", temperature=0.1).temperature == 0.1
    with running_server(made, "tiny", recommended=False) as url:
        c = client_of(url)
        assert text(temperature=1.9, max_tokens=40) == own and text(max_tokens=23) != silent and text(**asked) == silent


@pytest.mark.parametrize("settings, read", [
    ({}, NOTHING), ({"temperature": None, "top_k": 0, "max_new_tokens": None, "max_length": 20}, NOTHING), ({"top_k": 50.0, "temperature": 0}, Defaults(0.0, top_k=50)),
    ("{", "cannot be used"), ("[]", "cannot be used"), ({"temperature": "hot"}, "no number"), ({"top_p": 2.0}, "top_p = 2.0"), ({"top_k": True}, "no number")])
def test_files_of_all_kinds(folder: Path, tmp_path: Path, settings: Any, read: Any):
    copy = recommending(folder, tmp_path, settings)
    if isinstance(read, Defaults):
        assert read_defaults(copy) == read
    else:
        with pytest.raises(BadInput) as error:
            read_defaults(copy)
        assert read in f"{error.value.what}. {error.value.why}" and "generation_config.json" in error.value.what
    assert read_defaults(None) == read_defaults(tmp_path) == NOTHING
