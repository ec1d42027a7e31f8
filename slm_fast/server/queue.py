"""Waiting rows: how many are admitted, and which of them share a batch."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable
from dataclasses import asdict, replace
from typing import NamedTuple

from slm_fast.options import PredictOptions
from slm_fast.scheduler import row_seed
from slm_fast.server.generation import Generation
from slm_fast.server.jobs import Piece, Refused

PADDING = 256  # tokens of padding that cost about as much as a pass of their own
PART, PAUSE = 1 / 8, 0.08  # of a batch: fraction of the tokens that wait, and seconds it may take in any case
MEMORY = 10.0  # seconds of work over which the rate is averaged


class Room:
    """Counts rows and tokens that are admitted but not answered yet, and their throughput. The caller holds a lock."""

    def __init__(self, rows: int, tokens: int, seconds: float) -> None:
        self.most_rows, self.most_tokens, self.seconds = rows, tokens, seconds
        self.rows = self.tokens = 0
        self._done = self._busy = 0.0

    @property
    def rate(self) -> float | None:
        """Recent tokens per second; None until enough have been processed to tell."""
        return self._done / self._busy if self._busy > 0.05 and self._done > 0 else None

    @property
    def wait(self) -> float:
        """Seconds until all rows admitted so far are answered; 0 while unknown."""
        return self.tokens / self.rate if self.rate else 0.0

    @property
    def full(self) -> bool:
        return self.rows >= self.most_rows or self.tokens >= self.most_tokens or self.wait >= self.seconds

    def reserve(self, rows: int, tokens: int) -> None:
        """Reserve room for all of a request's rows, or raise Refused and reserve none."""
        if rows > self.most_rows or tokens > self.most_tokens:
            raise Refused(
                413, f"the request: {rows} rows of about {tokens} tokens are more than ever fit into the queue"
            )
        if self.full or self.rows + rows > self.most_rows or self.tokens + tokens > self.most_tokens:
            raise self.busy()
        self.rows += rows
        self.tokens += tokens

    def busy(self) -> Refused:
        after = min(60, max(1, math.ceil(self.wait / 2)))
        message = f"the queue is full ({self.rows} rows, {self.tokens} tokens wait); try again in {after} s"
        return Refused(429, message, code="rate_limit_exceeded", retry_after=after)

    def next_batch(self, least: int, most: int) -> int:
        """Tokens of the next batch: as many as take a moment or, where the queue is long, a fraction of it. While a
        batch runs nobody gets an answer, but large ones have more throughput."""
        if self.rate is None:
            return most
        return max(least, min(most, round(max(PART * self.tokens, PAUSE * self.rate))))

    def note(self, tokens: int, seconds: float) -> None:
        """Record that `tokens` took `seconds`."""
        kept = math.exp(-seconds / MEMORY)
        self._done = self._done * kept + tokens
        self._busy = self._busy * kept + seconds


class Waiting:
    """Rows that wait for a batch, in groups of those that may share one. The caller holds a lock."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens of a batch, padding included
        self._groups: dict[Hashable, list[tuple[int, int, Piece]]] = {}  # sorted by length
        self._arrived: deque[tuple[Hashable, Piece]] = deque()
        self.rows = 0

    def add(self, group: Hashable, piece: Piece) -> None:
        insort(self._groups.setdefault(group, []), (piece.length, piece.number, piece))
        self._arrived.append((group, piece))
        self.rows += 1

    def remove(self, group: Hashable, piece: Piece) -> bool:
        """Remove a row. Returns False if it is not waiting."""
        rows = self._groups.get(group, [])
        i = bisect_left(rows, (piece.length, piece.number))
        if i == len(rows) or rows[i][2] is not piece:
            return False
        self._cut(group, i, i + 1)
        return True

    def take(self) -> tuple[Hashable, list[Piece]]:
        """Take the next batch: the row that has waited longest, and the rows of its group closest to it in length,
        within the token budget and as long as the padding is worth it. Empty if none waits."""
        while self._arrived:
            group, first = self._arrived[0]
            rows = self._groups.get(group, [])
            i = bisect_left(rows, (first.length, first.number))
            if i < len(rows) and rows[i][2] is first:
                break
            self._arrived.popleft()  # it went with an earlier batch, or was cancelled
        else:
            return None, []
        low, high, tokens = i, i + 1, max(1, first.length)
        while high - low < len(rows):
            longest = rows[high - 1][0]
            below = longest - rows[low - 1][0] if low else math.inf
            above = rows[high][0] - longest if high < len(rows) else math.inf
            down = low > 0 and below <= above * (high - low)  # the padding that a row adds, either way
            if not down and high == len(rows):
                break
            length = longest if down else rows[high][0]
            tokens += rows[low - 1][0] if down else rows[high][0]
            whole = length * (high - low + 1)
            if whole > self.budget or whole - tokens > max(PADDING, whole // 4):
                break
            low, high = (low - 1, high) if down else (low, high + 1)
        pieces = [piece for _, _, piece in rows[low:high]]
        self._cut(group, low, high)
        return group, pieces

    def _cut(self, group: Hashable, low: int, high: int) -> None:
        rows = self._groups[group]
        del rows[low:high]
        self.rows -= high - low
        if not rows:
            del self._groups[group]
        if not self.rows:
            self._arrived.clear()  # drop references to rows that have gone


class Group(NamedTuple):
    """What the rows of a batch have in common."""

    generation: Generation
    work: str
    forced: bool
    options: PredictOptions
    alone: int = 0  # number of a row that is not batched with others


def group_of(piece: Piece, options: PredictOptions) -> Group:
    """The group of a row that waits for a batch."""
    job, ask, writing = piece.job, piece.job.ask, piece.job.ask.writing
    options = replace(options, bare=ask.bare)
    alone = 0
    if ask.work == "answer" and writing is not None:
        options = replace(options, max_new_tokens=writing.max_new_tokens)
        if writing.sampling is not None:  # rows of a batch would share one random generator
            drawn = asdict(replace(writing.sampling, seed=row_seed(writing.sampling.seed, piece.place)))
            options = replace(options, sample=True, **drawn)
            alone = piece.number + 1
    return Group(job.generation, ask.work, ask.task is not None, options, alone)
