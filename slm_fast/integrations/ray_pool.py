"""Windows of rows answered by Ray actors, each with a model of the same tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray

from slm_fast import __version__
from slm_fast.errors import WorkError, warn
from slm_fast.integrations.ray_cluster import (
    LOCAL,
    TRIES,
    ActorEnded,
    Opening,
    Shares,
    answer_of,
    check_alike,
    connected,
)
from slm_fast.model import Report
from slm_fast.options import PredictOptions
from slm_fast.predict import Answer, answer, in_order
from slm_fast.predict_file import (
    Answering,
    FileAnswered,
    Reading,
    Sink,
    Source,
    check_paths,
    predict_file,
    what_decides,
)
from slm_fast.slm import ScalableLM
from slm_fast.windows import Window

START = 60.0  # seconds for actors to start
AT_ONCE = 2  # windows per actor: it tokenises the second while it answers the first


class StoreActor:
    """The model of a store, opened at the first request so that errors are returned as answers."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._lock = threading.Lock()
        self._slm: ScalableLM | None = None
        self._warnings: list[str] = []

    def version(self) -> str:
        return __version__

    def about(self) -> dict[str, Any]:
        """What the process that distributes windows needs to know about the model."""
        slm = self._model()
        about = {"tasks": slm.tasks, "kind": slm.model.backbone.kind, "has_heads": bool(slm.classes_)}
        return about | {"in_store": (slm.store or slm.source) is not None, "warnings": self._warnings}

    def decides(self, options: PredictOptions) -> dict[str, Any]:
        """Everything besides the input that determines the bytes of its answers."""
        slm = self._model()
        store = slm.store or slm.source
        files = {} if store is None else {name: store.files[name] for name in slm.tasks}
        return what_decides(slm.model, options, files)

    def answer(self, window: Window, options: PredictOptions) -> tuple[dict[str, Any], list[Answer]]:
        """Answer a window. Also returns what determined the answers: a restarted actor may have found another store."""
        [answers] = answer(self._model().model, [window], options)
        return self.decides(options), answers

    def _model(self) -> ScalableLM:
        with self._lock:
            if self._slm is None:
                self._slm, self._warnings = self._opening.open()
            return self._slm


class _Sent(NamedTuple):
    """A window that was sent to an actor."""

    window: Window
    actor: int
    reference: Any


class StorePool:
    """Actors of a Ray cluster, each with the model of one store.

    Use it in a `with` block, which starts and ends the actors. If an actor dies it is restarted and its windows are
    answered again, in up to three attempts.

    Args:
        store: a folder that all workers see under this path, a URL, or a hub name.
        address: of the cluster: HOST:PORT, "auto" for the one running on this machine, or "local" for a new one of this
            machine alone. Ignored in a process that is connected to a cluster.
        actors: number of actors. Default: one per GPU or, without GPUs, one per node.
        threads: CPUs of all actors together. Default: all.
        backbone, dtype, device, skip_damaged, device_memory: as for `ScalableLM.from_pretrained`.

    Raises:
        InputError: there is no store, or there are more actors than CPUs or GPUs.
        WorkError: the cluster cannot be reached, its workers have another version of this package, or their models
            differ.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        address: str = LOCAL,
        actors: int | None = None,
        threads: int | None = None,
        backbone: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        skip_damaged: bool = False,
        device_memory: int | str | None = None,
    ) -> None:
        how: dict[str, Any] = {"dtype": dtype, "device": device, "skip_damaged": skip_damaged}
        self._opening = Opening.of(store, backbone=backbone, **how, device_memory=device_memory)
        self._address, self._asked = address, (actors, threads, device)
        self._about: dict[str, Any] = {}
        self._actors: list[Any] = []
        self._busy: list[list[Any]] = []  # pending answers of each actor
        self._stack = ExitStack()

    def __enter__(self) -> StorePool:
        with ExitStack() as stack:
            stack.enter_context(connected(self._address))
            shares = Shares.of(*self._asked)
            opening = replace(self._opening, threads=shares.threads)
            made = ray.remote(StoreActor).options(
                max_restarts=-1, max_task_retries=TRIES - 1, max_concurrency=AT_ONCE, **shares.resources
            )
            self._actors = [made.remote(opening) for _ in range(shares.actors)]
            self._busy = [[] for _ in self._actors]
            stack.callback(self._end)
            self._wait()
            for version in self._ask("version"):
                if version != __version__:
                    raise WorkError(f"worker: is slm_fast {version}, this is {__version__}")
            self._about = self._ask("about")[0]
            for message in self._about["warnings"]:
                warn(message)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def predict_file(
        self,
        source: Source | str,
        sink: Sink | str,
        options: PredictOptions | None = None,
        *,
        reading: Reading | None = None,
        task: str | None = None,
        shard: tuple[int, int] | None = None,
        strict: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> FileAnswered:
        """Answer a file as `ScalableLM.predict_file` does, to the same bytes. Each can resume a run of the other."""
        source = Path(source) if isinstance(source, str) else source
        sink = Path(sink) if isinstance(sink, str) else sink
        options = options or PredictOptions()
        check_paths(source, sink, overwrite=overwrite, reading=reading, shard=shard)
        how: dict[str, Any] = {"reading": reading, "task": task, "shard": shard, "strict": strict}
        by = self.answering(options)
        return predict_file(by, source, sink, options, **how, overwrite=overwrite, progress=progress)

    def answering(self, options: PredictOptions) -> Answering:
        """The actors as an `Answering`. Raises WorkError if their models differ."""
        decides, *others = self._ask("decides", options)
        for other in others:
            check_alike(other, decides)

        def end(sent: _Sent) -> list[Answer]:
            try:
                got, answers = answer_of(sent.reference)
            except ActorEnded as error:
                rows = f"{sent.window.first + 1} to {sent.window.first + len(sent.window.rows)}"
                raise WorkError(f"rows {rows}: their actor died, {TRIES} times: {error}") from None
            check_alike(got, decides)
            self._busy[sent.actor].remove(sent.reference)
            return answers

        def answered(windows: Iterator[Window | None], report: Report) -> Iterator[list[Answer]]:
            most = AT_ONCE * len(self._actors)
            for answers in in_order(windows, lambda window: self._send(window, options), end, most):
                report(len(answers))
                yield answers

        return Answering(self._about["tasks"], decides if self._about["in_store"] else None, answered)

    @property
    def kind(self) -> str:
        """The backbone's kind: encoder, seq2seq or causal."""
        return self._about["kind"]

    @property
    def has_heads(self) -> bool:
        """Whether any task answers with a head."""
        return self._about["has_heads"]

    def _send(self, window: Window, options: PredictOptions) -> _Sent:
        """Send a window to the actor with the fewest pending ones."""
        loads = [len(ray.wait(some, num_returns=len(some), timeout=0)[1]) if some else 0 for some in self._busy]
        actor = loads.index(min(loads))
        reference = self._actors[actor].answer.remote(window, options)
        self._busy[actor].append(reference)
        return _Sent(window, actor, reference)

    def _wait(self) -> None:
        """Wait for a while until all actors run; then warn about those that do not."""
        started = [actor.version.remote() for actor in self._actors]
        late = ray.wait(started, num_returns=len(started), timeout=START)[1]
        if late:
            warn(f"Ray: {len(late)} of {len(started)} actors do not run yet; the cluster may have no room for them")

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all actors and return their answers."""
        references = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        try:
            return [answer_of(reference) for reference in references]
        except ActorEnded as error:
            raise WorkError(f"Ray: an actor died before it had its model, {TRIES} times: {error}") from None

    def _end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._busy = [], []
