"""Text generation with continuous batching. Each text belongs to a generation of tasks, and stays with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.errors import NOT_FINITE, InputError, WorkError, one_line
from slm_fast.generate import Written, tail_of
from slm_fast.memory import AMPLE, ample
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route
from slm_fast.options import PredictOptions
from slm_fast.predict import Answer, answer_written
from slm_fast.scheduler import Generated, Request, Scheduler, row_seed
from slm_fast.server.generation import Generation
from slm_fast.server.jobs import Piece, Refused, Result
from slm_fast.server.passes import found_routes
from slm_fast.server.text import cut_at

log = logging.getLogger("slm_fast.server")
ROWS = 64  # more rows hardly raise the throughput of a CPU
CACHE = 0.125  # share of the free memory

Ended = list[tuple[Piece, Result]]


class Running(NamedTuple):
    """A text being generated. `distance` is that of its row, [1]."""

    generation: Generation
    number: int
    generated: Generated
    distance: Tensor | None


class Writers:
    """A scheduler for each generation that has unfinished texts; the last one keeps its buffers. Not thread-safe.

    Args:
        options: for distances and abstention.
        max_rows: maximum rows of a generation that run together. None: `ROWS`, or as many as have their KV cache in
            `CACHE` of the free memory, as the first text shows.
        max_new_tokens: maximum tokens of a text.
    """

    def __init__(
        self, model: AdaptedModel, options: PredictOptions, *, max_rows: int | None, max_new_tokens: int
    ) -> None:
        self.model, self.options = model, options
        free = ample(model.backbone.device) if max_rows is None else None
        self.max_rows, self.max_new_tokens = max_rows or ROWS, max_new_tokens
        self._cache_bytes = None if free is None else int(CACHE / AMPLE * free)
        self._schedulers: dict[Generation, Scheduler] = {}
        self._running: dict[Piece, Running] = {}
        self._stopped: list[Piece] = []  # by a stop string, in the current step

    @property
    def pieces(self) -> Sequence[Piece]:
        """The rows whose texts are waiting or being generated."""
        return list(self._running)

    @property
    def rows(self) -> int:
        return len(self._running)

    @torch.inference_mode()
    def add(self, generation: Generation, pieces: Sequence[Piece]) -> Ended:
        """Begin texts for rows of one generation. Returns the results of those that fail."""
        failed: dict[Piece, Result] = {}
        with self.model.pinned(generation.known), self.model.lock:
            scheduler = self._schedulers.get(generation)
            if scheduler is None:
                self.drop_idle()
                longest = self.model.config.max_length or 1
                rows = min(self.max_rows, self.model.known.most_rows or self.max_rows)
                scheduler = self._schedulers[generation] = Scheduler(
                    self.model,
                    max_rows=rows,
                    max_prompt=longest,
                    max_new_tokens=self.max_new_tokens,
                    cache_bytes=self._cache_bytes,
                )
            ahead = [piece for piece in pieces if self._is_found_ahead(piece)]
            found: dict[Piece, tuple[Route, Tensor | None]] = {}
            for start in range(0, len(ahead), self.max_rows):
                found |= self._routes(ahead[start : start + self.max_rows], failed)
            for piece in pieces:
                if piece in failed:
                    continue
                route, distance = found.get(piece, (None, None))
                try:
                    number = scheduler.add_request(self._request(piece, route))
                except InputError as error:  # the others begin all the same
                    failed[piece] = WorkError(str(error))
                else:
                    self._running[piece] = Running(generation, number, scheduler.generated[number], distance)
        return list(failed.items())

    def _is_found_ahead(self, piece: Piece) -> bool:
        if piece.job.ask.bare or not self.model.pool.slots:
            return False
        before = piece.reading is not None and piece.reading.query_input is not None
        return before or self.options.measures

    def _routes(self, pieces: list[Piece], failed: dict[Piece, Result]) -> dict[Piece, tuple[Route, Tensor | None]]:
        readings = [piece.reading for piece in pieces if piece.reading is not None]
        places, route, distance = found_routes(self.model, readings, self.options, self._mask(pieces))
        found = {
            pieces[place]: (
                Route(route.slot_ids[i], route.weights[i]),
                None if distance is None else distance[i : i + 1],
            )
            for i, place in enumerate(places)
        }
        failed |= {piece: WorkError(NOT_FINITE) for piece in pieces if piece not in found}
        return found

    def _mask(self, pieces: Sequence[Piece]) -> Tensor | None:
        names = [piece.job.ask.task for piece in pieces]
        if not any(names):
            return None
        pool = self.model.pool
        every = torch.ones_like(pool.slot_task, dtype=torch.bool)
        return torch.stack([every if name is None else pool.slots_of(name) for name in names])

    def _request(self, piece: Piece, route: Route | None) -> Request:
        ask, reading = piece.job.ask, piece.reading
        assert ask.writing is not None
        assert reading is not None
        stop = piece.stops
        tail = tail_of(stop)
        if ask.bare:
            empty = self.model.empty_route(1)
            route = Route(empty.slot_ids[0], empty.weights[0])
        sampling = ask.writing.sampling
        if sampling is not None:  # as in `predict`
            sampling = replace(sampling, seed=row_seed(sampling.seed, piece.place))
        masked = None if ask.task is None or route is not None else self.model.pool.slots_of(ask.task)

        def on_token(token: int, _: float) -> None:
            piece.tokens.append(token)
            if piece.head is None:
                piece.head = self._answer(piece, "")
            if stop and piece.stopped is None and cut_at(self._text(piece, tail), stop) is not None:
                piece.stopped = cut_at(self._text(piece), stop)
                if piece.stopped is not None:
                    self._stopped.append(piece)
            if ask.streams:
                piece.job.on_change()

        return Request(reading.ids, ask.writing.max_new_tokens, sampling, route, masked, on_token=on_token)

    def cancel(self, piece: Piece) -> None:
        running = self._running.pop(piece, None)
        if running is not None:
            self._schedulers[running.generation].cancel(running.number)

    def step(self) -> Ended:
        """Run a step of each generation's texts. Returns those that have ended, with their results."""
        ended: Ended = []
        for generation, scheduler in list(self._schedulers.items()):
            if not scheduler.unfinished:
                continue
            with self.model.pinned(generation.known):
                try:
                    ended += self._step(generation, scheduler)
                except Exception as error:
                    log.exception("writing failed")
                    refusal = Refused(500, f"writing failed: {one_line(error)}")
                    ended += [(piece, refusal) for piece in self._of(generation).values()]
                    scheduler.close()
            for piece, _ in ended:
                self._running.pop(piece, None)
            self.max_rows = min(self.max_rows, scheduler.cache_rows or self.max_rows)
        if len(self._schedulers) > 1:
            self.drop_idle()
        return ended

    def drop_idle(self) -> None:
        """Free the buffers, and let go of the tasks, of generations without unfinished texts."""
        for generation, scheduler in list(self._schedulers.items()):
            if not scheduler.unfinished:
                scheduler.close()
                del self._schedulers[generation]

    def close(self) -> None:
        """Free all buffers."""
        for scheduler in self._schedulers.values():
            scheduler.close()
        self._schedulers.clear()
        self._running.clear()

    def _step(self, generation: Generation, scheduler: Scheduler) -> Ended:
        pieces = self._of(generation)
        self._stopped.clear()
        ended = [pieces[number] for number in scheduler.step()]
        for piece in self._stopped:
            if piece not in ended:
                scheduler.cancel(self._running[piece].number)
                ended.append(piece)
        return [(piece, self._whole(piece)) for piece in ended]

    def _of(self, generation: Generation) -> dict[int, Piece]:
        return {running.number: piece for piece, running in self._running.items() if running.generation is generation}

    def _text(self, piece: Piece, last: int = 0) -> str:
        """The text of the last tokens; of all tokens if `last` is 0."""
        tokens = piece.tokens[-last:]
        text: str = self.model.backbone.tokenizer.batch_decode([tokens], skip_special_tokens=True)[0]
        return text.strip()

    def _whole(self, piece: Piece) -> Answer:
        """The answer of a text that has ended."""
        text = self._text(piece)
        piece.stopped = cut_at(text, piece.stops)
        return self._answer(piece, text if piece.stopped is None else piece.stopped)

    def _answer(self, piece: Piece, text: str) -> Answer:
        """The answer with the text so far."""
        generated, distance = self._running[piece].generated, self._running[piece].distance
        reason = "stop" if piece.stopped is not None else generated.finish_reason
        route = generated.route or self.model.empty_route(1)
        route = Route(route.slot_ids.view(1, -1), route.weights.view(1, -1))
        failed = {} if generated.error is None else {0: generated.error}
        written = Written([text], [generated.tokens], [generated.score], [reason], route, failed)
        assert piece.reading is not None
        return answer_written(self.model, piece.row, piece.reading, written, distance)
