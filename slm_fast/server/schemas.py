"""Request and response bodies. Unknown fields are refused by name, and values of another type are not converted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _is_off(value: bool) -> bool:
    if value:
        raise PydanticCustomError("false", "Input should be false")
    return value


def _unset(nothing: Any = None) -> AfterValidator:
    """For a field that is not supported: it may be null, or `nothing`, which also means that it is not set."""

    def check(value: Any) -> None:
        if value is not None and (value != nothing or type(value) is not type(nothing)):
            raise PydanticCustomError("unsupported", "not supported by this server; leave it out")

    return AfterValidator(check)


# Literal[1] would accept true and 1.0, and Literal[False] would accept 0.
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1)]
Absent = Annotated[Any, _unset(), Field(json_schema_extra={"enum": [None]})]
NoText = Annotated[Any, _unset(""), Field(json_schema_extra={"enum": [None, ""]})]
NoItems = Annotated[Any, _unset([]), Field(json_schema_extra={"enum": [None, []]})]
NoFields = Annotated[Any, _unset({}), Field(json_schema_extra={"enum": [None, {}]})]
Off = Annotated[bool, AfterValidator(_is_off), Field(json_schema_extra={"const": False})]
Model = Annotated[
    str, Field(description="auto finds the task; a task's name forces it; base is the bare backbone", max_length=512)
]
Temperature = Annotated[
    float, Field(ge=0, le=100, description="0, or left out: the likeliest token; otherwise a draw at this temperature")
]
Stop = str | Annotated[list[str], Field(max_length=16)] | None


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Instruction(Body):
    """A row of an instruction task."""

    instruction: str
    input: str = ""


Text = str | Instruction
Texts = Text | Annotated[list[Text], Field(min_length=1)]


class Classify(Body):
    """A classification request in vLLM's format."""

    model: Model = "auto"
    input: Texts
    labels: int | None = Field(None, ge=1, description="how many labels to tell the probabilities of; all that are > 0")
    truncate: bool = Field(True, description="false refuses texts that are longer than the model reads")
    user: str | None = None


class Route(Body):
    model: Literal["auto"] = "auto"
    input: Texts
    truncate: bool = True
    user: str | None = None


class Predict(Body):
    """A request in Text Embeddings Inference's format: a text, or a batch [[text], [text], ...]."""

    inputs: str | Annotated[list[str], Field(min_length=1)] | Annotated[list[list[str]], Field(min_length=1)]
    raw_scores: Off = False
    truncate: bool | None = False
    truncation_direction: Literal["right", "Right"] = "right"


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Off | None = None


class Writing(Body):
    """Fields that completions and chats share. Those with one allowed value are for clients that always send them."""

    model: Model = "auto"
    max_tokens: int | None = Field(None, ge=1)
    temperature: Temperature | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    stop: Stop = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logit_bias: NoFields = None
    service_tier: Literal["auto", "default"] | None = None
    n: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    user: str | None = None

    @property
    def length(self) -> tuple[str, int | None]:
        """The field that limits the tokens of a text, and its value."""
        return "max_tokens", self.max_tokens


class Completion(Writing):
    prompt: str | Annotated[list[str], Field(min_length=1)]
    echo: Off | None = None
    best_of: One | None = None
    logprobs: Absent = None
    suffix: NoText = None


class Part(Body):
    type: Literal["text"]
    text: str


class Turn(Body):
    """A turn of a chat. The fields that must be null are those of an answer, which clients send back as they are."""

    role: str
    content: str | list[Part]
    name: str | None = None
    refusal: Absent = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: NoItems = None


class Plain(Body):
    type: Literal["text"]


class Chat(Writing):
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Off | None = None
    top_logprobs: Absent = None
    response_format: Plain | None = None
    tools: NoItems = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tool_choice: Literal["none"] | None = None
    store: Off | None = None

    @property
    def length(self) -> tuple[str, int | None]:
        given = self.max_completion_tokens
        return super().length if given is None else ("max_completion_tokens", given)


class AddTask(Body):
    name: str


class Weight(BaseModel):
    """A slot of a route: its task and its weight."""

    task: str
    slot: int
    weight: float


class Classified(BaseModel):
    """A classified text. labels, probs: most probable first. distance: how far it is from its task, if reported."""

    index: int
    label: str | None
    text: str | None
    probs: list[float]
    labels: list[str]
    num_classes: int
    task: str | None
    task_sha256: str | None
    score: float
    route: list[Weight]
    distance: float | None
    truncated: bool


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Classification(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class Score(BaseModel):
    label: str
    score: float


class Error(BaseModel):
    """An error in OpenAI's format."""

    error: dict[str, Any]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": about}
    for status, about in {
        400: "the request cannot be right",
        401: "no key, or a wrong one",
        404: "no such model",
        408: "the body did not come in time",
        413: "too many inputs, or too long ones",
        422: "a row that cannot be answered",
        429: "too much waits; see Retry-After",
        503: "not ready, or stopping",
        504: "not answered before the deadline",
    }.items()
}
