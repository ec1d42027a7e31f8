"""The engine: one queue of admitted requests, and the one thread that runs the model.

Another thread tokenises. Rows for an encoder are answered in length-sorted batches, text is generated with continuous
batching, and both run side by side. Nothing here depends on HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from slm_fast.data import Row
from slm_fast.errors import WorkError, one_line, some_of
from slm_fast.generate import is_plain
from slm_fast.memory import return_freed_memory
from slm_fast.model import AdaptedModel
from slm_fast.options import PredictOptions
from slm_fast.passes import tokens_of_a_batch
from slm_fast.predict import answer_batch
from slm_fast.server.generation import Generation, prepare
from slm_fast.server.jobs import Ask, Job, Piece, Refused, Result, Writing, stopping
from slm_fast.server.options import ServeOptions
from slm_fast.server.passes import answer_routes, read, stopped
from slm_fast.server.queue import Group, Room, Waiting, group_of
from slm_fast.server.writing import Writers

log = logging.getLogger("slm_fast.server")
LETTERS = 3  # characters per token, assumed until a text is tokenised
TOKENISED = 512  # rows that are tokenised together
GENERATIONS = 4  # generations of tasks that may be in use at once
BATCHES = 64  # default size of the queue in batches
USED = 0.8  # fraction of the deadline; requests that would wait longer are refused
TIDY = 10.0  # seconds after which a process that has worked returns freed memory to the system


class Engine:
    """Takes jobs from any thread, and answers them in its own.

    Args:
        options: prediction options: head, abstain, distance.
        serve: limits.
        on_batch: called with the number of rows and tokens of each batch.
    """

    def __init__(
        self,
        model: AdaptedModel,
        generation: Generation,
        options: PredictOptions,
        serve: ServeOptions,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.options, self.serve = model, options, serve
        self.writes = model.backbone.kind != "encoder"
        longest = model.config.max_length or 1
        self.batch_tokens = serve.batch_tokens or max(tokens_of_a_batch(model, options), longest)
        most = serve.queue_tokens or BATCHES * self.batch_tokens
        self.room = Room(serve.queue_rows, most, USED * serve.deadline)
        self.failed: BaseException | None = None  # error of a thread; nothing is answered after it
        self.warm = threading.Event()
        self._plain = self.writes and is_plain(model, longest + serve.max_new_tokens)
        self._changed = threading.Condition()
        self._current = generation
        self._in_use: dict[Generation, int] = {}
        self._fresh: deque[Job] = deque()  # not tokenised yet
        self._waiting = Waiting(self.batch_tokens)
        self._groups: dict[Piece, Group] = {}  # of rows that wait for a batch
        self._batch: Sequence[Piece] = ()  # that runs now
        self._to_write: deque[Piece] = deque()
        self._cancelled: list[Piece] = []
        self._jobs: set[Job] = set()
        self._number = 0
        self._changes = False  # the generation has changed, which the engine's thread has not seen yet
        self._closed = False
        self._is_tidy, self._tidied = True, time.monotonic()
        self._writers = Writers(model, options, max_rows=serve.batch_rows, max_new_tokens=serve.max_new_tokens)
        self._on_batch = on_batch or (lambda rows, tokens: None)
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("tokenise", self._tokenise), ("engine", self._run))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads, and refuse what is not answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(10.0)
        if not any(thread.is_alive() for thread in self._threads):
            self._writers.close()

    # Called by any thread

    @property
    def generation(self) -> Generation:
        return self._current

    @property
    def answers(self) -> bool:
        """Whether any text can be answered: an encoder-only backbone needs a task for that."""
        return self.writes or bool(self._current.files)

    def unanswered(self) -> tuple[list[Piece], list[Piece]]:
        """The admitted rows without a result: those that wait, and those that run, in a batch or as a text begun."""
        with self._changed:
            rows = [piece for job in self._jobs for piece in job.pieces if piece.result is None]
            batch = set(self._batch)
        waiting, running = list[Piece](), list[Piece]()
        for piece in rows:
            (running if piece.tokens or piece in batch else waiting).append(piece)
        return waiting, running

    def publish(self, generation: Generation) -> None:
        """Answer new requests with these tasks. Waits while too many generations are in use."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._in_use) < GENERATIONS or self._closed)
            self._current, self._changes = generation, True
            self._changed.notify_all()

    def check(self, ask: Ask) -> None:
        """Raise Refused for a request that this model cannot serve."""
        names = self._current.files
        if ask.task is not None and ask.task not in names:
            others = "auto, base" if self.writes else "auto"
            message = f"model {ask.task[:100]!r}: expected {others} or a task; tasks: {some_of(names)}"
            raise Refused(404, message, code="model_not_found", param="model")
        if not self.writes and ask.bare:
            raise Refused(400, "model: an encoder-only backbone has no answer of its own", param="model")
        if not names and not (self.writes and ask.work == "answer"):
            raise Refused(503, "no task is learned yet", retry_after=1)

    def submit(self, ask: Ask, on_change: Callable[[], None]) -> Job:
        """Admit a request: reserve room in the queue for all of its rows, or none. Raises Refused."""
        if ask.writing is None and self.writes and ask.work == "answer":
            raise ValueError("writing: expected how the text is written")
        writing = 0 if ask.writing is None else ask.writing.max_new_tokens
        longest = self.model.config.max_length or 1
        sizes = [min(longest, len(row.prompt) // LETTERS + 8) + writing for row in ask.rows]
        with self._changed:
            if self._closed or self.failed is not None:
                raise stopping()
            self.check(ask)
            self.room.reserve(len(sizes), sum(sizes))
            job = Job(ask, self._current, on_change, left=len(sizes))
            self._in_use[job.generation] = self._in_use.get(job.generation, 0) + 1
            for place, size in enumerate(sizes):
                job.pieces.append(Piece(job, place, self._number, size))
                self._number += 1
            self._jobs.add(job)
            self._fresh.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job: waiting rows are dropped, texts are ended, and results of a running batch are ignored."""
        with self._changed:
            job.cancelled = True
            for piece in job.pieces:
                if piece.result is not None:
                    continue
                group = self._groups.pop(piece, None)
                if group is not None:
                    self._waiting.remove(group, piece)
                else:
                    self._cancelled.append(piece)
                self._settle(piece, Refused(499, "the client has gone"))
            self._changed.notify_all()

    # The engine's threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            log.critical("the engine has failed", exc_info=error)
            self.failed = error
        with self._changed:  # what has no answer now never gets one
            self._closed = True
            self._settle_all([piece for job in list(self._jobs) for piece in job.pieces], stopping())
            self._changed.notify_all()

    def _tokenise(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fresh or self._closed)
                if self._closed:
                    return
                jobs: list[Job] = []
                while self._fresh and sum(len(job.pieces) for job in jobs) < TOKENISED:
                    jobs.append(self._fresh.popleft())
            self._read([job for job in jobs if not job.cancelled])

    def _read(self, jobs: Sequence[Job]) -> None:
        try:
            readings = iter(read(self.model, [job.ask for job in jobs]))
        except Exception as error:
            if len(jobs) > 1:  # read the other jobs all the same
                for job in jobs:
                    self._read([job])
                return
            if not isinstance(error, WorkError):
                log.exception("tokenising failed")
                error = WorkError(f"cannot be read: {one_line(error)}")
            field = jobs[0].ask.field
            self._settle_all(jobs[0].pieces, Refused(400, f"{field}: {error}", param=field))
            return
        with self._changed:
            for job in jobs:
                for piece in job.pieces:
                    piece.reading = next(readings)
                self._place(job)
            self._changed.notify_all()

    def _place(self, job: Job) -> None:
        """Queue a job's rows, now that their lengths are known."""
        if job.cancelled:
            return
        ask = job.ask
        for piece in job.pieces:
            reading = piece.reading
            assert reading is not None
            if reading.truncated and not ask.truncate:
                refusal = (
                    f"{ask.field} {piece.place}: longer than {self.model.config.max_length} tokens, and truncate is off"
                )
            elif not self.writes and piece.length > self.batch_tokens:
                refusal = f"{ask.field} {piece.place}: {piece.length} tokens, a batch has {self.batch_tokens}"
            else:
                continue
            return self._settle_all(job.pieces, Refused(413, refusal, code="context_length_exceeded", param=ask.field))
        # Imported adapters have prompts of their own, and some have heads: their rows are answered as in `predict`.
        imported = job.generation.known.pool.imported is not None and not ask.bare
        group: Group | None = None
        for piece in job.pieces:
            writing = 0 if ask.writing is None else ask.writing.max_new_tokens
            self.room.tokens += piece.length + writing - piece.reserved
            piece.reserved = piece.length + writing
            if self._plain and not imported and ask.work == "answer":
                self._to_write.append(piece)
            else:
                group = group_of(piece, self.options) if group is None or group.alone else group
                self._groups[piece] = group
                self._waiting.add(group, piece)

    def _run(self) -> None:
        self._warm_up()
        while self._turn():
            if not self._is_tidy and time.monotonic() - self._tidied >= TIDY:
                return_freed_memory()
                self._is_tidy, self._tidied = True, time.monotonic()

    def _turn(self) -> bool:
        """Begin new texts, run a batch, and generate a token of each text. Returns False once the engine is closed."""
        with self._changed:
            if self._changed.wait_for(self._has_work, None if self._is_tidy else TIDY):
                self._is_tidy = False
            if self._closed:
                return False
            changes, self._changes = self._changes, False
            gone, self._cancelled = self._cancelled, []
            begin, self._to_write = list(self._to_write), deque()
            if self.serve.batch_tokens is None:
                self._waiting.budget = self.room.next_batch(self.model.config.max_length or 1, self.batch_tokens)
            group, self._batch = self._waiting.take()
            for piece in self._batch:
                self._groups.pop(piece, None)
            # Only measure throughput while there is more work than can be done at once.
            is_full = self._waiting.rows > 0 or self._writers.rows + len(begin) > self._writers.max_rows
        clock = time.perf_counter()
        for piece in gone:
            self._writers.cancel(piece)
        if changes:
            self._writers.drop_idle()
        self._begin(begin)
        tokens = self._pass(group, self._batch) if isinstance(group, Group) else 0
        self._batch = ()
        tokens += self._step() if self._writers.rows else 0
        if is_full:
            with self._changed:
                self.room.note(tokens, time.perf_counter() - clock)
        return True

    def _begin(self, pieces: Sequence[Piece]) -> None:
        generations = dict.fromkeys(piece.job.generation for piece in pieces)
        for generation in generations:
            own = [piece for piece in pieces if piece.job.generation is generation and piece.result is None]
            try:
                self._give(self._writers.add(generation, own))
            except Exception as error:
                log.exception("prefill failed")
                self._settle_all(own, Refused(500, f"writing failed: {one_line(error)}"))

    def _step(self) -> int:
        """Run a step of all texts. Returns how many of the reserved tokens it processed."""
        ended, tokens = self._writers.step(), 0
        with self._changed:
            for piece in self._writers.pieces:
                if piece.result is not None:
                    continue  # cancelled, and its room freed
                done = piece.length + len(piece.tokens) if piece.tokens else 0
                tokens += done - piece.credited
                self.room.tokens -= done - piece.credited
                piece.reserved -= done - piece.credited
                piece.credited = done
        tokens += sum(piece.reserved for piece, _ in ended)
        self._give(ended)
        return tokens

    def _pass(self, group: Group, batch: Sequence[Piece]) -> int:
        """Answer a batch. Returns how many of the reserved tokens it processed."""
        readings = [piece.reading for piece in batch if piece.reading is not None]
        names = [piece.job.ask.task or "" for piece in batch] if group.forced else None
        tokens = sum(piece.reserved for piece in batch)
        self._on_batch(len(batch), sum(len(reading.ids) for reading in readings))
        results: Sequence[Result]
        try:
            with self.model.pinned(group.generation.known):
                if group.work == "route":
                    results = answer_routes(self.model, readings, self.options)
                else:
                    # For an encoder, one label if all rows want one, else all labels.
                    most = 1 if self.writes or all(piece.job.ask.labels == 1 for piece in batch) else None
                    rows = [piece.row for piece in batch]
                    answers = answer_batch(self.model, rows, readings, replace(group.options, top_k=most), names)
                    results = [stopped(self.model, one, piece.stops) for piece, one in zip(batch, answers, strict=True)]
        except Exception as error:
            log.exception("a batch failed")
            results = [Refused(500, f"the batch failed: {one_line(error)}")] * len(batch)
        self._give(list(zip(batch, results, strict=True)))
        return tokens

    def _warm_up(self) -> None:
        """Compute what all tasks share, and run each kind of pass once, before the first request."""
        generation, longest = self._current, self.model.config.max_length or 1
        prepare(self.model, generation.known, distances=self.options.measures)
        row = Row("warm " * 2 * longest)
        reading = self.model.tokenize([row])[0]
        if self._plain and generation.known.pool.imported is None:
            job = Job(Ask([row], writing=Writing(2)), generation, lambda: None)
            self._writers.add(generation, [Piece(job, 0, 0, 0, reading._replace(ids=reading.ids[:8]))])
            while self._writers.rows:
                self._writers.step()
        elif not self.writes and generation.files:
            rows = max(1, self.batch_tokens // longest)
            for many in (1, rows, rows):
                clock = time.perf_counter()
                with self.model.pinned(generation.known):
                    answer_batch(self.model, [row] * many, [reading] * many, replace(self.options, top_k=None))
            self.room.note(many * len(reading.ids), time.perf_counter() - clock)
        log.info("ready")
        self.warm.set()

    # Results

    def _give(self, results: Sequence[tuple[Piece, Result]]) -> None:
        with self._changed:
            for piece, result in results:
                self._settle(piece, result)

    def _settle_all(self, pieces: Sequence[Piece], result: Result) -> None:
        self._give([(piece, result) for piece in pieces])

    def _settle(self, piece: Piece, result: Result) -> None:
        """Set a row's result, if it has none yet, and free its room."""
        if piece.result is not None:
            return
        piece.result, job = result, piece.job
        self.room.rows -= 1
        self.room.tokens -= piece.reserved
        piece.reserved = 0
        job.left -= 1
        if job.left:
            return
        self._jobs.discard(job)
        self._in_use[job.generation] -= 1
        if not self._in_use[job.generation]:
            del self._in_use[job.generation]
            self._changed.notify_all()
        job.on_change()

    def _has_work(self) -> bool:
        work = self._waiting.rows or self._to_write or self._cancelled or self._writers.rows
        return bool(self._closed or self._changes or work)
