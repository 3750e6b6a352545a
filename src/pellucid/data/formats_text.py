"""Records as a model reads them: through the chat template where they are conversations, as they are where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.data.formats import Content, Record, common_prefix
from pellucid.tokenizers import Tokenizer

PARTS = ("completion", "chosen", "rejected")


def templated(record: Record, tokenizer: Tokenizer) -> dict[str, Any]:
    """The texts of a record: prompt, completion, chosen, rejected, text (equal to trl's `maybe_apply_chat_template`).

    A prompt ends where the assistant begins to write, or, where its last message is the assistant's, within that.
    What a template writes differently behind a prompt that has an answer belongs to the answer.
    """
    fields = vars(record)
    if "messages" in fields:
        return {"text": tokenizer.render(fields["messages"], record.tools, add_generation_prompt=False)}
    texts = {name: value for name, value in fields.items() if name not in ("tools", "extra")}
    if not isinstance(fields.get("prompt"), list):
        return texts
    prompt = prompt_text(fields["prompt"], record.tools, tokenizer)
    whole = {name: tokenizer.render([*fields["prompt"], *fields[name]], record.tools, add_generation_prompt=False)
             for name in PARTS if name in fields}
    prompt = prompt[: min(common_prefix(prompt, text) for text in whole.values())] if whole else prompt
    return texts | {"prompt": prompt} | {name: text[len(prompt):] for name, text in whole.items()}


def prompt_text(messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: Tokenizer) -> str:
    """Up to where the assistant goes on writing."""
    if messages[-1]["role"] != "assistant":
        return tokenizer.render(messages, tools, add_generation_prompt=True)
    text, begun = tokenizer.render(messages, tools, add_generation_prompt=False), messages[-1]["content"].lstrip()
    at = text.rindex(begun.rstrip())
    written = begun if text.startswith(begun, at) else begun.rstrip()  # some templates strip what was said
    return text[:at] + written


def encode_pair(prompt: Content, completion: Content, tokenizer: Tokenizer,
                tools: list[dict[str, Any]] | None = None) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the completion with its end), such that both together are what the model reads.

    Messages go through the template (text inside them never becomes a control token); plain texts are encoded apart
    from one another, and the completion ends with the end-of-text token.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        assert isinstance(prompt, str) and isinstance(completion, str)
        end = tokenizer.named.get("eos_token", tokenizer.end_of_turn_id)
        ids = tokenizer.encode(completion)
        return tokenizer.encode(prompt), ids if end is None or ids[-1:] == [end] else [*ids, end]
    whole, _ = tokenizer.encode_chat([*prompt, *completion], tools=tools)
    start, _ = tokenizer.encode_chat(prompt, tools=tools, add_generation_prompt=prompt[-1]["role"] != "assistant")
    same = common_prefix(start, whole)
    return whole[:same], whole[same:]
