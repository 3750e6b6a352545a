"""What clients may ask: OpenAI's chat completions and completions, each field honoured or refused, never ignored.

Beyond OpenAI's own fields, as vLLM has them: `top_k`, `min_p`, and `chat_template_kwargs: {"enable_thinking": bool}`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pellucid.engine import SamplingParams

MOST_CHOICES = 128
DEFAULT_TOKENS = 512


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """What both kinds of request share. `user`, `metadata` and `store` are the client's own notes."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def neutral(cls, value: Any) -> Any:
        if value:
            raise ValueError("only its neutral value (0, or empty) is supported")
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
        if len(texts) > 4 or not all(texts):
            raise ValueError("give at most 4 texts, none of them empty")
        return value

    @model_validator(mode="after")
    def one_stream(self) -> Sampling:
        if self.stream and (self.n or 1) > 1:
            raise ValueError("n > 1 cannot be streamed; ask with stream false")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> int | None:
        return self.max_tokens

    def params(self, room: int) -> SamplingParams:
        """For a prompt that leaves `room` tokens. Stop texts are not among them: the parser looks for those."""
        most = self.limit() or min(room, DEFAULT_TOKENS)
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(most, temperature, self.top_k, self.top_p, self.min_p, self.seed, self.n or 1)


class Part(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    function_call: None = None

    @model_validator(mode="after")
    def has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant calls tools")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        text = self.content if not isinstance(self.content, list) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text or ""}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message | ({"name": self.name} if self.name else {})


class Function(Body):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("strict")
    @classmethod
    def not_enforced(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("strict schemas are not enforced here; leave it out or give false")
        return value


class Tool(Body):
    type: Literal["function"]
    function: Function


class TextFormat(Body):
    type: Literal["text"]


class TemplateOptions(Body):
    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def one_limit(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    def limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def reads_calls(self) -> bool:
        """Also without `tools`: a model may have learned a tool by heart."""
        return self.tool_choice != "none"

    def for_template(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool | None]:
        """(messages, tools, thinking)"""
        tools = self.tools if self.tools and self.reads_calls else None
        schemas = None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools]
        thinking = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        return [message.plain() for message in self.messages], schemas, thinking


class CompletionRequest(Sampling):
    prompt: str | list[int] | list[str]
    echo: Literal[False] | None = None
    logprobs: None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def some_prompts(self) -> CompletionRequest:
        if isinstance(self.prompt, list) and not 1 <= len(self.prompts) * (self.n or 1) <= MOST_CHOICES:
            raise ValueError(f"give 1 to {MOST_CHOICES} prompts (times n)")
        if self.stream and len(self.prompts) > 1:
            raise ValueError("several prompts cannot be streamed; ask with stream false")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return [*self.prompt]
