"""Ray: connecting to a cluster, dividing its CPUs and GPUs among actors, and errors in one line."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

import slm_fast
from slm_fast.errors import InputError, SlmError, SlmWarning, WorkError, one_line

if TYPE_CHECKING:
    from slm_fast.slm import ScalableLM

LOCAL = "local"
TRIES = 3  # attempts at each request, if the actor dies before it answers
PATIENCE = 10.0  # seconds to connect to a cluster


class ActorEnded(Exception):
    """An actor or its node died before it answered, in every attempt. The message says how."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster at `address`: HOST:PORT, "auto" for the one running on this machine, or "local" for a new
    one of this machine alone, which ends with the block. An existing connection is used and kept instead.

    Raises:
        WorkError: the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    how: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics from clusters started here
        # Let workers import this package from the same place.
        paths = [str(Path(slm_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        how |= {"include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}}
    try:
        _check_reachable(address)
        ray.init(address, **how)
    except Exception as error:  # Ray raises many types of errors
        raise WorkError(f"Ray {address!r}: cannot be reached: {one_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Fail early if nothing listens at the address; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), PATIENCE).close()


@dataclass(frozen=True)
class Shares:
    """How a cluster's CPUs and GPUs are divided: the number of actors, and the CPUs (`threads`) and GPUs of each."""

    actors: int
    threads: int
    gpus: int = 0

    @classmethod
    def of(
        cls, actors: int | None = None, threads: int | None = None, device: str = "auto", *, flag: str = "--actors"
    ) -> Shares:
        """Divide the cluster that this process is connected to.

        Args:
            actors: number of actors. Default: one per GPU or, without GPUs, one per node.
            threads: CPUs of all actors together. Default: all.
            device: "cpu" leaves GPUs unused.
            flag: the caller's name for `actors`, for error messages.

        Raises:
            InputError: a number is less than 1, or exceeds the CPUs or GPUs.
        """
        for name, value in ((flag, actors), ("--threads", threads)):
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        gpus = 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
        count = actors or gpus or sum(cpu > 0 for cpu in cpus)
        if count > (gpus or sum(cpus)):
            has = f"{gpus} GPUs" if gpus else f"{sum(cpus)} processors"
            raise InputError(f"{flag}: expected at most what the cluster has, {has}, got {count}")
        each = max(1, (threads or sum(cpus)) // count)
        while each > 1 and sum(cpu // each for cpu in cpus) < count:  # an actor is on one node
            each -= 1
        return cls(count, each, int(gpus > 0))

    @property
    def resources(self) -> dict[str, int]:
        """What Ray reserves for each actor."""
        return {"num_cpus": self.threads, "num_gpus": self.gpus}


@dataclass(frozen=True)
class Opening:
    """How an actor opens a store, as for `ScalableLM.from_pretrained`. `threads`: its CPU threads.

    Its methods import what they need, so that a worker can receive one without the seconds that torch takes.
    """

    store: str
    backbone: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    skip_damaged: bool = False
    device_memory: int | str | None = None
    threads: int | None = None

    @classmethod
    def of(cls, store: str | Path, *, backbone: str | None = None, **how: Any) -> Opening:
        """Make local paths absolute. Raises InputError if the backbone is not there."""
        from slm_fast.hub import is_elsewhere
        from slm_fast.loading import located

        path = str(store) if is_elsewhere(store) else os.path.abspath(os.path.expanduser(store))
        return cls(path, None if backbone is None else located(backbone), **how)

    def open(self) -> tuple[ScalableLM, list[str]]:
        """Open the model. Returns it with the warnings to pass on to the caller."""
        import torch

        from slm_fast.hub import is_elsewhere
        from slm_fast.slm import ScalableLM
        from slm_fast.store import Store

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if not is_elsewhere(self.store) and not Store.exists(self.store):
            node = ray.util.get_node_ip_address()
            raise InputError(f"store {self.store}: is not on node {node}; each worker must see it under this path")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SlmWarning)
            slm = ScalableLM.from_pretrained(
                self.store,
                backbone=self.backbone,
                dtype=self.dtype,
                device=self.device,
                skip_damaged=self.skip_damaged,
                device_memory=self.device_memory,
            )
        return slm, [str(one.message) for one in caught if issubclass(one.category, SlmWarning)]


def answer_of(reference: Any) -> Any:
    """Wait for an actor's answer.

    Raises:
        SlmError: raised by the actor.
        ActorEnded: the actor died.
        WorkError: workers cannot import this package.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, SlmError):
            raise error.cause from None
        _check_imported(error)
        raise
    except RayError as error:
        _check_imported(error)
        raise ActorEnded(one_line(error)) from None


def _check_imported(error: RayError) -> None:
    said = str(error)
    if "failed to import on the worker" in said:
        why = next((line.strip() for line in reversed(said.splitlines()) if "Error: " in line), "")
        version = slm_fast.__version__
        raise WorkError(f"Ray: its workers cannot import slm_fast {version}; install it on all nodes: {why}") from None


def check_alike(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise WorkError unless an actor's model agrees with the first one's in all that determines answers."""
    for name in sorted(got.keys() | expected.keys()):
        if got.get(name) != expected.get(name):
            if name == "store":
                raise WorkError("Ray: an actor has other tasks: the store was changed meanwhile; begin afresh")
            raise WorkError(f"Ray: an actor has {name} {got.get(name)!r}, the first one {expected.get(name)!r}")
