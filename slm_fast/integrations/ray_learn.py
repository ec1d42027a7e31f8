"""Workers of `slm_fast.jobs` as Ray actors: each learns a task at a time, and the process that started them commits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError

from slm_fast.errors import SlmWarning, one_line
from slm_fast.integrations.ray_cluster import ActorEnded, Shares, answer_of
from slm_fast.jobs import Ended, Worker
from slm_fast.loading import located
from slm_fast.worker import Learner, Message


class LearnActor:
    """A worker's model in a Ray process."""

    def __init__(self) -> None:
        self._learner = Learner()

    def ask(self, message: Message, data: bytes) -> tuple[Message, bytes, list[str]]:
        """Answer a request. Also returns warnings."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SlmWarning)
            answer, found = self._learner.answer(message, data)
        return answer, found, [str(one.message) for one in caught if issubclass(one.category, SlmWarning)]


class RayWorker(Worker):
    """A worker in an actor. If it dies, `slm_fast.jobs` starts another."""

    def __init__(self, opening: Message, start: bytes, shares: Shares) -> None:
        super().__init__({**opening, "threads": shares.threads, "jobs": 1}, start)
        self.actor: Any = ray.remote(LearnActor).options(**shares.resources).remote()

    def ask(self, message: Mapping[str, Any], data: bytes, told: Callable[[str], None]) -> tuple[Message, bytes]:
        try:
            answer, found, warned = answer_of(self.actor.ask.remote(message, data))
        except ActorEnded as error:
            raise Ended(f"died ({error})") from None
        except RayTaskError as error:  # a bug, or a device that failed: a new process may do better
            self.kill()  # which frees what the next one needs
            raise Ended(f"failed ({type(error.cause).__name__}: {one_line(error.cause)})") from None
        for one in warned:
            told(one)
        return answer, found

    def kill(self) -> None:
        ray.kill(self.actor)

    def close(self) -> None:
        """Nothing to do: Ray cleans up."""


def maker(jobs: int, threads: int | None, device: str) -> Callable[[Message, bytes], RayWorker]:
    """Return a function that starts workers of `slm_fast.jobs.Workers` on the cluster this process is connected to.

    Args:
        jobs: number of workers.
        threads: CPUs of all workers together. Default: all.

    Raises:
        InputError: there are more jobs than CPUs or GPUs.
    """
    shares = Shares.of(jobs, threads, device, flag="--jobs")

    def make(opening: Message, start: bytes) -> RayWorker:
        return RayWorker({**opening, "backbone": located(opening["backbone"])}, start, shares)

    return make
