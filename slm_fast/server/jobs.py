"""What is asked of the engine: a job is a request, a piece of it one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slm_fast.data import Row
from slm_fast.predict import Answer, RouteTaken
from slm_fast.reading import Reading
from slm_fast.scheduler import Sampling
from slm_fast.server.generation import Generation


class Refused(Exception):
    """A request that gets no answer, and why: one line for whoever sent it.

    status: HTTP's. code, param: OpenAI's. retry_after: seconds.
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
    """How a text is written. sampling: its seed is that of the request's first row. stop: texts that end it."""

    max_new_tokens: int
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What a request wants.

    Attributes:
        work: "answer" or "route", weights without an answer.
        task: a name forces it (an oracle task ID). bare: the backbone as it is.
        labels: how many labels' probabilities are wanted; None for all that are not 0.
        writing: of a backbone that writes its answers. truncate: False refuses rows that would be cut to fit.
        streams: whether `on_change` wants to hear of each token.
        chat: the turns of the row, where the backbone's own template is to be used, if it has one.
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


@dataclass(frozen=True)
class Routed:
    """A row's weights, without an answer. distance: see `Prediction`."""

    route: RouteTaken
    distance: float | None
    truncated: bool


Result = Answer | Routed | Refused


@dataclass(eq=False)
class Piece:
    """A row on its way. What the engine's thread adds to is read by others as it is then: tokens are only appended.

    reserved: its tokens in the queue. number: the order of arrival. written: tokens so far.
    """

    job: Job
    place: int
    number: int
    reserved: int
    reading: Reading | None = None
    tokens: list[int] = field(default_factory=list)
    head: Answer | None = None  # of a text that has begun: its task and route
    stopped: str | None = None  # the text up to where a stop text stood
    result: Result | None = None
    credited: int = 0

    @property
    def row(self) -> Row:
        return self.job.ask.rows[self.place]

    @property
    def length(self) -> int:
        return 0 if self.reading is None else len(self.reading.ids)


@dataclass(eq=False)
class Job:
    """A request that was admitted. All its rows are answered by one generation of tasks.

    on_change: called, in the engine's thread, when all rows have their results, and for each token of one that streams.
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
