"""Options of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slm_fast.errors import InputError


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server.

    Attributes:
        queue_rows, queue_tokens: maximum rows admitted but not answered yet, and their tokens (prompts plus what may be
            generated). Requests beyond these are refused with 429. Default for queue_tokens: 64 batches.
        batch_tokens: token budget per batch, including padding. Longer rows are refused. Default: an eighth of the
            tokens that wait, or what takes 0.08 seconds if that is more; at most what suits the device.
        batch_rows: maximum texts generated at once. Default: 64, or as many as have their KV cache in an eighth of the
            free memory.
        max_new_tokens: maximum that a request may ask for, and its default.
        deadline: seconds after which an unanswered request is given up with 504.
        requests: maximum concurrent requests; more are refused with 429.
        inputs: maximum inputs per request.
        body: maximum bytes per request.
        patience: seconds that a client may take to send a request, or to read a part of its answer.
        poll: seconds between checks of the store. Default: 0.5, or 5 for a store at a URL.
        drain: seconds between SIGTERM and the end of listening, in which load balancers see 503 from /ready.
    """

    queue_rows: int = 2048
    queue_tokens: int | None = None
    batch_tokens: int | None = None
    batch_rows: int | None = None
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
