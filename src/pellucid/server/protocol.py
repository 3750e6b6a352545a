"""What clients may ask: OpenAI's chat completions and completions, each field honoured or refused, never ignored.

Beyond OpenAI's own fields, as vLLM has them: `top_k`, `min_p`, `typical_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`,
`ignore_eos`, `structured_outputs`, `priority`, `cache_salt`, `prompt_logprobs`, `add_special_tokens`, `return_token_ids`,
`truncate_prompt_tokens`, `skip_special_tokens`, `include_stop_str_in_output`, `continue_final_message`, and `chat_template_kwargs` (`enable_thinking`, and what else the template reads).
What is not given is as the checkpoint recommends (server/defaults.py), else as OpenAI has it.
`user`, `metadata`, `prompt_cache_key` and `safety_identifier` are the client's own notes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field, field_validator, model_validator

from pellucid.engine import SamplingParams
from pellucid.engine.params import StructuredOutput
from pellucid.server.conversation import Body, Message, NamedTool, Tool
from pellucid.server.defaults import NOTHING, Defaults

MOST_CHOICES = 128
SHORT = 16
"""Tokens of a completion where nobody says how many, as OpenAI and vLLM have it; all other answers may take what the context leaves."""
MOST_LOGPROBS = 20
MOST_STOPS = 16  # OpenAI takes 4, vLLM any number


class StreamOptions(Body):
    """continuous_usage_stats: every part tells the usage so far, as vLLM's do."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: bool = False


class Structured(Body):
    """One of them: what the answer must be."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    json_schema: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=10_000)
    choice: list[str] | None = Field(None, min_length=1, max_length=1000)
    grammar: str | None = Field(None, max_length=100_000)
    json_object: bool | None = None

    @model_validator(mode="after")
    def one(self) -> Structured:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give one of json, regex, choice, grammar, json_object")
        return self


class Sampling(Body):
    """What all requests for text share."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    structured_outputs: Structured | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def some_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("give at least 1, or -1 for as many as the context leaves")
        return value

    @field_validator("store")
    @classmethod
    def not_kept(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("nothing is stored here; leave it out or give false")
        return value

    @field_validator("stop")
    @classmethod
    def few_texts(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > MOST_STOPS or not all(texts):
            raise ValueError(f"give at most {MOST_STOPS} texts, none of them empty")
        return value

    @field_validator("logit_bias")
    @classmethod
    def biases(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 20) or not -100 <= bias <= 100:
                raise ValueError("keys are token ids, values lie from -100 to 100")
        return value

    @model_validator(mode="after")
    def one_stream(self) -> Sampling:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; ask with stream false")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> int | None:
        return self.max_tokens

    def usual_limit(self, defaults: Defaults) -> int | None:
        """Most tokens where the request does not say; None: what the context leaves."""
        return defaults.max_tokens

    @property
    def samples(self) -> int:
        """Samples to draw for each prompt."""
        return self.n or 1

    @property
    def asked_logprobs(self) -> int | None:
        """How many of the most probable tokens to tell for each place, beside the one that was drawn; None: no probabilities."""
        return None

    @property
    def needed_logprobs(self) -> int | Literal[False]:
        """The same for the engine, which needs them too where the best of several are returned."""
        if self.asked_logprobs is not None:
            return self.asked_logprobs
        return 0 if self.samples > (self.n or 1) else False

    @property
    def needed_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    def constraint(self) -> dict[str, Any] | None:
        """What the answer must be, as `StructuredOutput` takes it: json_schema, json_object, regex, choice or grammar."""
        return None if self.structured_outputs is None else self.structured_outputs.model_dump(exclude_none=True)

    def params(self, room: int, thinking: bool = False, defaults: Defaults = NOTHING) -> SamplingParams:
        """For a prompt that leaves `room` tokens. Stop texts are not among them: the parser looks for those.
        thinking: the form that is asked for holds behind a thought."""
        form, most = self.constraint(), self.limit()
        if most is None:
            most = min(room, self.usual_limit(defaults) or room)

        def chosen(name: str, usual: Any = None) -> Any:
            return next((v for v in (getattr(self, name), getattr(defaults, name)) if v is not None), usual)

        top_k = chosen("top_k", 0)
        asked: dict[str, Any] = {
            "temperature": chosen("temperature", 1.0), "top_k": top_k if top_k > 0 else None, "top_p": chosen("top_p"), "min_p": chosen("min_p"),
            "typical_p": self.typical_p, "seed": self.seed, "n": self.samples,
            "stop_token_ids": tuple(self.stop_token_ids or ()), "ignore_eos": bool(self.ignore_eos), "min_tokens": self.min_tokens or 0,
            "frequency_penalty": self.frequency_penalty or 0.0, "presence_penalty": self.presence_penalty or 0.0,
            "repetition_penalty": chosen("repetition_penalty", 1.0),
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()} if self.logit_bias else None,
            "logprobs": self.needed_logprobs, "prompt_logprobs": self.needed_prompt_logprobs,
            "structured": None if form is None else StructuredOutput(**form, thinking=thinking)}
        return SamplingParams(max(1, most), **asked)


class JsonSchema(Body):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    name: str = "answer"
    description: str | None = None
    body: dict[str, Any] | bool = Field(validation_alias=AliasChoices("schema", "body"), serialization_alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema, and only it, needs json_schema: {name, schema}")
        return self

    def constraint(self) -> dict[str, Any] | None:
        if self.type == "json_object":
            return {"json_object": True}
        return None if self.json_schema is None else {"json_schema": self.json_schema.body}


class TemplateOptions(Body):
    """What else the template reads may be given too; see `Desk.chat`."""

    model_config = ConfigDict(extra="allow", strict=True)
    enable_thinking: bool | None = None
    thinking: bool | None = None  # DeepSeek's word for it

    @property
    def switch(self) -> bool | None:
        return self.thinking if self.enable_thinking is None else self.enable_thinking


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = Field(None, max_length=256)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def last_message_fits(self) -> ChatRequest:
        last = self.messages[-1]
        if self.goes_on and (last.role != "assistant" or last.tool_calls or self.add_generation_prompt):
            raise ValueError("continue_final_message needs a last message of the assistant without tool_calls, and no add_generation_prompt")
        return self

    @property
    def goes_on(self) -> bool:
        """The last message is the beginning of the answer."""
        return bool(self.continue_final_message)

    @model_validator(mode="after")
    def agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) != len(names):
            raise ValueError("two tools have one name")
        if self.tool_choice in ("required",) and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and self.structured_outputs:
            raise ValueError("response_format and structured_outputs both say what the answer must be; give one of them")
        if self.forced is not None and (constrained or self.structured_outputs):
            raise ValueError("a forced tool call leaves no place for an answer of another form")
        return self

    def limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def reads_calls(self) -> bool:
        """Also without `tools`: a model may have learned a tool by heart."""
        return self.tool_choice != "none"

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Parameters of the tools offered, by name."""
        tools = self.tools if self.tools and self.reads_calls else []
        return {tool.function.name: tool.function.parameters or {"type": "object", "properties": {}} for tool in tools}

    @property
    def forced(self) -> str | None:
        """The tool that must be called; the empty text: any of them."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    def constraint(self) -> dict[str, Any] | None:
        if self.forced is not None:
            return {"json_schema": forced_schema(self.schemas, self.forced, self.parallel_tool_calls is not False)}
        return super().constraint() or (self.response_format.constraint() if self.response_format else None)

    def for_template(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool | None, dict[str, Any]]:
        """(messages, tools, thinking, what else is given to the template)"""
        tools = self.tools if self.tools and self.reads_calls else None
        schemas = None if tools is None else [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]
        options = self.chat_template_kwargs or TemplateOptions()
        thinking = options.switch
        if thinking is None and self.reasoning_effort is not None:
            thinking = self.reasoning_effort != "none"
        return [message.plain() for message in self.messages], schemas, thinking, dict(options.model_extra or {})


def forced_schema(schemas: dict[str, dict[str, Any]], name: str, parallel: bool) -> dict[str, Any]:
    """What a forced answer is: the arguments of the one tool, or a list of {"name", "parameters"} of any."""
    if name:
        return schemas[name]
    calls = [{"type": "object", "properties": {"name": {"const": tool}, "parameters": parameters},
              "required": ["name", "parameters"], "additionalProperties": False} for tool, parameters in schemas.items()]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else schema | {"maxItems": 1}


class CompletionRequest(Sampling):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def some_prompts(self) -> CompletionRequest:
        if isinstance(self.prompt, list) and not 1 <= len(self.prompts) * self.samples <= MOST_CHOICES:
            raise ValueError(f"give 1 to {MOST_CHOICES} prompts (times n)")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must be at least n")
        if self.stream and self.samples > (self.n or 1):
            raise ValueError("best_of cannot be streamed: the best are known at the end")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 asks for nothing, without echo")
        return self

    def usual_limit(self, defaults: Defaults) -> int:
        return SHORT

    @property
    def samples(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def needed_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs

    def constraint(self) -> dict[str, Any] | None:
        return super().constraint() or (self.response_format.constraint() if self.response_format else None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return [*self.prompt]  # type: ignore[list-item]
