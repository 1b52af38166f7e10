"""What answers look like, for the description of the routes: OpenAI's objects, and those of labels and health."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from ia3.serving.requests import FinishReason


class Problem(TypedDict):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """Every answer whose status is 400 or more, but for /health."""

    error: Problem


class Usage(TypedDict):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Card(TypedDict):
    """What can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    digest: str | None
    aliases: list[str]
    task: str | None


class CardWithLabels(Card):
    """One of them."""

    labels: list[str]


class Cards(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Card]


class Unloaded(TypedDict):
    """What is served no more."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class Label(TypedDict):
    """One text under one model."""

    index: int
    model: str
    adapter: str
    digest: str | None
    label: str | None
    text: str
    probabilities: dict[str, float] | None
    queued_ms: float
    ran_ms: float


class Labels(TypedDict):
    """Every text under every model."""

    object: Literal["list"]
    data: list[Label]
    usage: Usage


class Words(TypedDict):
    """A completion of one prompt."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: None
    queued_ms: float
    ran_ms: float


class Completion(TypedDict):
    """A completion of each prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Words]
    usage: Usage
    system_fingerprint: str | None


class Said(TypedDict):
    """What the model says in a conversation."""

    role: Literal["assistant"]
    content: str


class Turn(TypedDict):
    """A conversation's next message."""

    index: int
    message: Said
    finish_reason: FinishReason
    logprobs: None
    queued_ms: float
    ran_ms: float


class ChatCompletion(TypedDict):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Turn]
    usage: Usage
    system_fingerprint: str | None


class Vector(TypedDict):
    """Of one text; as base64 the bytes of float32, the lowest first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Read(TypedDict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Vectors(TypedDict):
    """Of each text."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    digest: str | None
    usage: Read


class Busy(TypedDict):
    """How much an adapter answered."""

    adapter: str
    answers: int


class Activity(TypedDict):
    """What happens now, and who answered most in the last seconds."""

    object: Literal["activity"]
    ready: bool
    seconds: int
    queued: int
    running: int
    adapters: int
    refused: int
    resident: int
    data: list[Busy]


class Status(TypedDict):
    """How the server is."""

    status: str


class VersionOfIt(TypedDict):
    """Of this package."""

    version: str


_EVENTS: dict[str, Any] = {"content": {"text/event-stream": {}}}
_OF_ROUTES: dict[str, dict[int | str, dict[str, Any]]] = {
    "/v1/completions": {200: {"model": Completion, "description": "Words, or with stream events.", **_EVENTS}},
    "/v1/chat/completions": {200: {"model": ChatCompletion, "description": "Words, or with stream events.", **_EVENTS}},
    "/v1/classify": {200: {"model": Labels}},
    "/v1/embeddings": {200: {"model": Vectors}},
    "/v1/activity": {200: {"model": Activity}},
    "/v1/load_lora_adapter": {200: {"model": Card}},
    "/v1/unload_lora_adapter": {200: {"model": Unloaded}},
    "/v1/aliases": {200: {"model": Card}},
    "/v1/models": {200: {"model": Cards}},
    "/v1/models/{name:path}": {200: {"model": CardWithLabels}},
    "/health": {200: {"model": Status}, 503: {"model": Status, "description": "No requests are taken."}},
    "/health/ready": {200: {"model": Status}, 503: {"model": Status, "description": "No requests are taken."}},
    "/health/live": {200: {"model": Status}},
    "/version": {200: {"model": VersionOfIt}},
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "What was asked can't be understood, found, or taken at this moment."},
    "5XX": {"model": Error, "description": "The server failed, stops, or was not in time."},
}


def answers_of(path: str) -> dict[int | str, dict[str, Any]]:
    """What a route answers, by its status, as FastAPI describes it."""
    return {**_OF_ROUTES.get(path, {}), **_ERRORS}
