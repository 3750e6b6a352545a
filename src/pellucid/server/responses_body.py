"""The body of a request to /v1/responses, and the chat completion that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pellucid.server.conversation import Body, FunctionCall, Message, NamedFunction, NamedTool, Part, Tool, ToolCall
from pellucid.server.errors import Refused
from pellucid.server.protocol import ChatRequest, Effort, JsonSchema, ResponseFormat


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class ThoughtPart(Body):
    type: Literal["reasoning_text", "text"] = "reasoning_text"
    text: str


class InputThought(Body):
    type: Literal["reasoning"]
    summary: list[Any] = []
    content: list[ThoughtPart] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: str | None = None


def kind_of(item: Any) -> str:
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return found if isinstance(found, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")] | Annotated[InputThought, Tag("reasoning")], Discriminator(kind_of)]


class FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Body):
    type: Literal["function"]
    name: str


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: PlainFormat | SchemaFormat | None = Field(None, discriminator="type")
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """summary: "auto" gives one where there is one; a local model makes none, its thought is told as it is."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class StreamObfuscation(Body):
    include_obfuscation: Literal[False] = False


class ResponsesRequest(Body):
    model: str
    input: str | list[Item] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[FunctionTool] | None = Field(None, max_length=256)
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamObfuscation | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: list[str] | None = Field(None, max_length=0)
    metadata: dict[str, str] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def something(self) -> ResponsesRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream true")
        return self

    def as_chat(self, before: list[Message]) -> ChatRequest:
        """The same request as a chat completion, behind the messages of the conversation so far."""
        form = self.text.format if self.text else None
        options: dict[str, Any] = {name: getattr(self, name) for name in (
            "model", "temperature", "top_p", "parallel_tool_calls", "user", "priority", "cache_salt")}
        if self.tools:
            options["tools"] = [Tool(type="function", function=t.model_dump(exclude={"type"})) for t in self.tools]  # type: ignore[arg-type]
        choice = self.tool_choice
        options["tool_choice"] = NamedTool(type="function", function=NamedFunction(name=choice.name)) if isinstance(choice, NamedChoice) else choice
        if isinstance(form, SchemaFormat):
            options["response_format"] = ResponseFormat(type="json_schema", json_schema=JsonSchema.model_validate({"name": form.name, "schema": form.body}))
        elif form is not None:
            options["response_format"] = ResponseFormat(type=form.type)
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        try:
            return ChatRequest(messages=[*first, *before, *self.messages()], max_completion_tokens=self.max_output_tokens, stream=self.stream,
                               reasoning_effort=self.reasoning.effort if self.reasoning else None, **options)
        except ValueError as error:  # what only chat completions check
            detail = error.errors()[0] if hasattr(error, "errors") else {"msg": str(error)}
            raise Refused(400, detail["msg"].removeprefix("Value error, "), None, "invalid_value") from error

    def messages(self) -> list[Message]:
        """The input as chat messages; calls, and the thought before them, belong to one turn."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        found: list[Message] = []
        thought: str | None = None
        for item in self.input:
            if isinstance(item, InputThought):
                thought = "".join(part.text for part in item.content or [])
                continue
            message = message_of(item)
            previous = found[-1] if found else None
            if isinstance(item, InputCall) and previous is not None and previous.role == "assistant":
                previous.tool_calls = [*(previous.tool_calls or []), *(message.tool_calls or [])]
                continue
            if message.role == "assistant" and thought:
                message.reasoning_content = thought
            thought = None
            found.append(message)
        return found


def message_of(item: InputMessage | InputCall | InputResult) -> Message:
    if isinstance(item, InputCall):
        return Message(role="assistant", content=None, tool_calls=[ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))])
    content = item.output if isinstance(item, InputResult) else item.content
    text: Any = content if isinstance(content, str) else [Part(type="text", text=part.text) for part in content]
    if isinstance(item, InputResult):
        return Message(role="tool", content=text, tool_call_id=item.call_id)
    return Message(role=item.role, content=text)
