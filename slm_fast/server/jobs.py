"""Work for the engine: a job is a request, and each of its pieces is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slm_fast.data import Row
from slm_fast.predict import Answer, RouteTaken
from slm_fast.reading import Reading
from slm_fast.scheduler import Sampling
from slm_fast.server.generation import Generation


class Refused(Exception):
    """A request that gets no answer. The message tells the client why, in one line.

    Args:
        status: HTTP status.
        code, param: fields of OpenAI's error format.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after


def stopping() -> Refused:
    return Refused(503, "the server is stopping", code="shutting_down", retry_after=1)


@dataclass(frozen=True)
class Writing:
    """How to generate text. The seed in `sampling` is that of the request's first row; `stop` lists stop strings."""

    max_new_tokens: int
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What a request asks for.

    Attributes:
        work: "answer", or "route" for weights without an answer.
        task: oracle task ID.
        bare: use the backbone without tasks.
        labels: how many labels to return probabilities of; None: all above 0.
        writing: how a generating backbone generates its answers.
        truncate: if False, refuse rows that would be cut to fit.
        streams: whether to call `on_change` for each token.
        chat: the turns of the row, for the backbone's own chat template, if it has one.
        field: the request's field that has the rows, for messages.
    """

    rows: Sequence[Row]
    work: str = "answer"
    task: str | None = None
    bare: bool = False
    labels: int | None = 1
    writing: Writing | None = None
    truncate: bool = True
    streams: bool = False
    chat: Sequence[Mapping[str, str]] | None = None
    field: str = "input"


@dataclass(frozen=True)
class Routed:
    """A row's route, without an answer. For `distance` see `Prediction`."""

    route: RouteTaken
    distance: float | None
    truncated: bool


Result = Answer | Routed | Refused


@dataclass(eq=False)
class Piece:
    """A row in progress. Other threads read it while the engine's thread adds to it: tokens are only appended.

    Attributes:
        number: order of arrival.
        reserved: its tokens in the queue.
        tokens: generated so far.
    """

    job: Job
    place: int
    number: int
    reserved: int
    reading: Reading | None = None
    tokens: list[int] = field(default_factory=list)
    head: Answer | None = None  # task and route of a text that has begun
    stopped: str | None = None  # the text before a stop string
    result: Result | None = None
    credited: int = 0

    @property
    def row(self) -> Row:
        return self.job.ask.rows[self.place]

    @property
    def length(self) -> int:
        return 0 if self.reading is None else len(self.reading.ids)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings before which its text ends."""
        return () if self.job.ask.writing is None else self.job.ask.writing.stop


@dataclass(eq=False)
class Job:
    """An admitted request. All of its rows are answered by one generation of tasks.

    Attributes:
        on_change: called in the engine's thread when all rows have results and, if the request streams, for each token.
    """

    ask: Ask
    generation: Generation
    on_change: Callable[[], None]
    pieces: list[Piece] = field(default_factory=list)
    left: int = 0  # rows without a result
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return self.left == 0
