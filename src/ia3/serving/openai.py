"""What stands in requests and answers: OpenAI's shapes, vLLM's for adapters, and one of labels with probabilities."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ia3.documents import parse_json
from ia3.errors import shorten
from ia3.serving.limits import RequestLimits
from ia3.serving.requests import Answer, Served

# An adapter, an alias or the base; what names there may be the server says.
Name = Annotated[str, Field(min_length=1, max_length=512)]
# Beyond float32 no number is meant; and an integer of a thousand digits is no float.
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Seconds = Annotated[float, Field(gt=0, le=1e6, description="Seconds until nobody waits any more.")]
_MOST_FIELDS, _MOST_BRACKETS = 100, 100_000
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
One = Annotated[int, Field(ge=1, le=1)]


class BadRequestError(Exception):
    """A request that can't be understood, or asks for what is not offered.

    Args:
        message: what was wrong, what was expected, what to do.
        param: the field.
        status: HTTP's number.
        code: a word for programs.
        headers: more of the answer's headers.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers


def _given(field: str, kind: str) -> dict[str, JsonValue]:
    """What a body's schema says where a field is there, and no null."""
    return {"required": [field], "properties": {field: {"type": kind}}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class _Asking(_Body):
    """Fields of all that asks a model. Answers are the likeliest, so that sampling can only be asked for at 0."""

    model: Name
    timeout: Seconds | None = None
    user: str | None = None


class _Writing(_Asking):
    """Fields that OpenAI's two routes share. What would change an answer and isn't offered has one value alone."""

    max_tokens: Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Number = 0.0
    top_p: Number | None = None  # of the likeliest token alone nothing is cut off
    seed: int | None = None
    n: One = 1
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    stop: str | Texts | None = None
    logit_bias: dict[str, Number] = {}
    # What says nothing of the answer.
    metadata: dict[str, JsonValue] = {}
    store: bool = False

    def check_offered(self) -> None:
        """Refuse what would change the answer in vain.

        Raises:
            BadRequestError: such a field.
        """
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise BadRequestError(
                    f"{name} is {shorten(getattr(self, name))}: answers are the likeliest words, without sampling and "
                    "penalties. Send 0, or leave it out.",
                    param=name,
                )
        for name in ("stop", "logit_bias", "echo", "logprobs", "tools"):
            if getattr(self, name, None):
                said = f"{name} is not offered: an answer is what is written, to its own end. Leave it out."
                raise BadRequestError(said, param=name)


class StreamOptions(_Body):
    """OpenAI's."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(_Writing):
    """`POST /v1/completions`."""

    prompt: str | Texts
    best_of: One = 1
    echo: bool = False


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation. Templates of chats have no place for who of several users speaks."""

    name: str | None = None
    role: Literal["developer", "system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> tuple[str, str]:
        """As tasks of conversations have it."""
        return ("system" if self.role == "developer" else self.role), self.text


class ChatBody(_Writing):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    response_format: dict[Literal["type"], Literal["text"]] = {}
    logprobs: bool = False
    tools: list[JsonValue] = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True


class ClassifyBody(_Body):
    """`POST /v1/classify`: every text by every model."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("model", "string"), _given("models", "array")]})

    model: Name | None = None
    models: Annotated[list[Name], Field(min_length=1, fail_fast=True)] | None = None
    input: str | Texts
    timeout: Seconds | None = None
    user: str | None = None


class EmbeddingsBody(_Asking):
    """`POST /v1/embeddings`."""

    input: str | Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def check_offered(self) -> None:
        """Refuse what would change the answer in vain.

        Raises:
            BadRequestError: a number of dimensions.
        """
        if self.dimensions is not None:
            said = "dimensions is not offered: a vector has as many numbers as the encoder is wide. Leave it out."
            raise BadRequestError(said, param="dimensions")


class LoadBody(_Body):
    """`POST /v1/load_lora_adapter`: vLLM's name, for every client that knows it; the adapters are (IA)³."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=1024, description="Below the folder that is served.")]
    load_inplace: bool = False


class UnloadBody(_Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: int | None = None  # vLLM's, which names nothing here


class AliasBody(_Body):
    """`PUT /v1/aliases`."""

    alias: Name
    model: Name


_Writing.model_rebuild()
BodyT = TypeVar("BodyT", bound=_Body)


def read_body(content: bytes, kind: type[BodyT]) -> BodyT:
    """A request's body.

    Args:
        content: its bytes.
        kind: what it has to be. A field that is null counts as left out.

    Raises:
        BadRequestError: no JSON, an unknown or missing field, or a value of another type.
    """
    if content.count(b"[") + content.count(b"{") > _MOST_BRACKETS:  # a second's work, for what can't be right
        raise BadRequestError(f"The body has more than {_MOST_BRACKETS:,} brackets: send less.", status=413)
    try:
        found = _without_nulls(parse_json(content, "The body"))
    except ValueError as error:
        raise BadRequestError(str(error)) from None
    if len(found) > _MOST_FIELDS:
        raise BadRequestError(f"The body has {len(found):,} fields. They are {', '.join(kind.model_fields)}.")
    if isinstance(messages := found.get("messages"), list):
        found["messages"] = [_without_nulls(each) if isinstance(each, dict) else each for each in messages]
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not _is_of_a_union(part))
        why = "is not offered, leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        said = f"{shorten(where)}: {why}. The fields are {', '.join(kind.model_fields)}."
        raise BadRequestError(said, param=where[:100] or None) from None


def schema_of(kind: type[_Body]) -> dict[str, Any]:
    """The JSON schema of a body, in which any field that may be left out may be null."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    return schema


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value is not None}


def _is_of_a_union(part: object) -> bool:
    """Whether a part of a place is what pydantic calls a type between others, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "constrained-str"))


def texts_of(given: str | Sequence[str], name: str, limits: RequestLimits) -> list[str]:
    """The texts of a field, within the limits.

    Raises:
        BadRequestError: none, too many, or one that is too long.
    """
    texts = [given] if isinstance(given, str) else list(given)
    if not 1 <= len(texts) <= limits.texts:
        raise BadRequestError(f"{name} has {len(texts):,} texts, expected 1 to {limits.texts:,} a request.", param=name)
    check_characters(max(map(len, texts)), name, limits)
    return texts


def check_characters(count: int, name: str, limits: RequestLimits) -> None:
    """Refuse more characters than a text may have."""
    if count > limits.characters:
        raise BadRequestError(
            f"{name} has {count:,} characters, expected at most {limits.characters:,}: send less.", param=name
        )


def conversation_of(body: ChatBody, limits: RequestLimits) -> tuple[str, list[tuple[str, str]]]:
    """The last message's text, and the turns before it.

    Raises:
        BadRequestError: the last one isn't the user's, or there is more than the limits say.
    """
    *earlier, last = body.messages
    if last.role != "user":
        raise BadRequestError(f"The last of messages is the {last.role}'s: expected the user's.", param="messages")
    if len(body.messages) > limits.messages:
        raise BadRequestError(
            f"There are {len(body.messages):,} messages, expected at most {limits.messages:,}.", param="messages"
        )
    check_characters(sum(len(each.text) for each in body.messages), "messages", limits)
    return last.text, [each.turn for each in earlier]


def new_tokens_of(body: CompletionBody | ChatBody, limits: RequestLimits) -> int | None:
    """How many tokens may be written; None where the request doesn't say.

    Raises:
        BadRequestError: more than the limit, or two numbers.
    """
    asked = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        if asked not in (None, body.max_completion_tokens):
            raise BadRequestError("There are both max_tokens and max_completion_tokens: send one.", param="max_tokens")
        asked = body.max_completion_tokens
    if asked is not None and asked > limits.new_tokens:
        raise BadRequestError(
            f"max_tokens is {asked:,}, expected at most {limits.new_tokens:,}: ask for fewer.", param="max_tokens"
        )
    return asked


# Answers


def error_of(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def card_of(served: Served, created: int) -> dict[str, Any]:
    """What the list of models says of one: who it is by content, never where it lies."""
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "ia3",
        "parent": served.parent,
        "digest": served.digest,
        "aliases": list(served.aliases),
        "task": served.task_kind,
    }


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens read and written."""
    read, written = sum(each.prompt_tokens for each in answers), sum(each.completion_tokens for each in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Written:
    """The objects of one answer in words, whole or in chunks, which share an id.

    Args:
        model: what the client called it.
        chat: a conversation's, against a completion's.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        name = "chatcmpl" if chat else "cmpl"
        self._begun: set[int] = set()
        self._head = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All of it; the fingerprint is the digest of who answered."""
        choices = [
            {
                "index": index,
                **self._said(each.text, "message"),
                "finish_reason": each.finish_reason,
                "logprobs": None,
                **_times_of(each),
            }
            for index, each in enumerate(answers)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        more = {"usage": usage_of(answers), "system_fingerprint": answers[0].digest}
        return {**self._head, "object": kind, "choices": choices, **more}

    def piece(self, index: int, text: str, answer: Answer | None = None) -> dict[str, Any]:
        """The next words of a choice; with its answer the last ones."""
        said = self._said(text, "delta")
        if self._chat and index in self._begun:  # clients join the pieces of all fields
            del said["delta"]["role"]
        self._begun.add(index)
        choice = {"index": index, **said, "finish_reason": None, "logprobs": None}
        if answer is None:
            return self._chunk([choice], None)
        return self._chunk([choice | {"finish_reason": answer.finish_reason, **_times_of(answer)}], answer.digest)

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk behind the last one."""
        return {**self._chunk([], answers[0].digest), "usage": usage_of(answers)}

    def _chunk(self, choices: list[dict[str, Any]], digest: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "system_fingerprint": digest}

    def _said(self, text: str, part: str) -> dict[str, Any]:
        return {part: {"role": "assistant", "content": text}} if self._chat else {"text": text}


def label_of(index: int, model: str, answer: Answer) -> dict[str, Any]:
    """One answer of `/v1/classify`. Who may write its label can write something else, which then is no label.

    Args:
        index: the text's.
        model: what the client called it.
        answer: its answer.
    """
    return {
        "index": index,
        "model": model,
        "adapter": answer.adapter,
        "digest": answer.digest,
        "label": answer.label,
        "text": answer.text,
        "probabilities": answer.probabilities,
        **_times_of(answer),
    }


def vector_of(index: int, answer: Answer, encoding: str) -> dict[str, Any]:
    """One vector of `/v1/embeddings`: numbers, or the base64 of their bytes as little-endian float32."""
    assert answer.vector is not None
    numbers = list(answer.vector)
    packed = struct.pack(f"<{len(numbers)}f", *numbers)
    embedding = base64.b64encode(packed).decode() if encoding == "base64" else numbers
    return {"object": "embedding", "index": index, "embedding": embedding}


def _times_of(answer: Answer) -> dict[str, float]:
    """How long a text waited and ran: beside what OpenAI's answers have."""
    return {"queued_ms": round(answer.queued_s * 1e3, 3), "ran_ms": round(answer.ran_s * 1e3, 3)}
