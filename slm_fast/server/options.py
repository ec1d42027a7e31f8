"""What whoever starts a server may set."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slm_fast.errors import InputError


@dataclass(frozen=True)
class ServeOptions:
    """How much a server takes at once.

    Attributes:
        queue_rows, queue_tokens: rows that are admitted and not answered yet, and their tokens (prompts, and what may
            be written); beyond them requests are refused with 429. queue_tokens: None takes 64 batches.
        batch_tokens: of a batch, padding included; None takes what suits the device. A row that is longer is refused.
        batch_rows: texts that are written at once.
        max_new_tokens: the most that a request may ask for, and what it gets unless it says less.
        deadline: seconds after which a request that is not answered is given up with 504.
        requests: concurrent ones; more are refused with 429. inputs: of a request. body: bytes of a request.
        patience: seconds that a client may take to send a request, or to read a part of its answer.
        poll: seconds between two looks at the store; None takes 0.5, or 5 of one at a URL.
        drain: seconds between SIGTERM and the end of listening, in which balancers see that /ready says 503.
    """

    queue_rows: int = 2048
    queue_tokens: int | None = None
    batch_tokens: int | None = None
    batch_rows: int = 16
    max_new_tokens: int = 256
    deadline: float = 60.0
    requests: int = 512
    inputs: int = 32
    body: int = 2_000_000
    patience: float = 20.0
    poll: float | None = None
    drain: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, number = getattr(self, field.name), "float" in str(field.type)
            if value is None and "None" in str(field.type):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float) if number else int):
                raise InputError(f"{field.name}: expected {'a number' if number else 'an integer'}, got {value!r}")
            least = 0 if field.name == "drain" else 0.01 if number else 1
            if not least <= value < 1e12:
                raise InputError(f"{field.name}: expected at least {least:g}, got {value!r}")
