"""Ray: a cluster to work on, how its processors are shared out, and what goes wrong there in one line."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

import slm_fast
from slm_fast.errors import InputError, SlmError, SlmWarning, WorkError, one_line
from slm_fast.hub import is_elsewhere
from slm_fast.loading import located
from slm_fast.slm import ScalableLM
from slm_fast.store import Store

LOCAL = "local"
TRIES = 3  # of whatever an actor is asked for, if it dies before it has answered
PATIENCE = 10.0  # seconds for a connection to a cluster


class ActorEnded(Exception):
    """An actor died, or its node, before it answered, as often as it was tried; the message says how."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A cluster: the one at `address` (HOST:PORT, or "auto" for the one that runs on this machine), or with "local" one
    of this machine's processors alone, which ends with the block. Who is connected already stays so, and works there.

    Raises WorkError where the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    how: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is started here says nothing to anybody
        # Workers find this very package, wherever it is imported from.
        paths = [str(Path(slm_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        how |= {"include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}}
    try:
        _check_reachable(address)
        ray.init(address, **how)
    except Exception as error:  # Ray has one of its own for each library below it
        raise WorkError(f"Ray {address!r}: cannot be reached: {one_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), PATIENCE).close()


@dataclass(frozen=True)
class Shares:
    """How a cluster's processors and GPUs are shared out: so many actors, and what each of them takes."""

    actors: int
    threads: int
    gpus: int = 0

    @classmethod
    def of(
        cls, actors: int | None = None, threads: int | None = None, device: str = "auto", *, flag: str = "--actors"
    ) -> Shares:
        """Shares of the cluster that this process is connected to.

        Args:
            actors: None: one for each GPU or, where there is none, for each node. threads: of the processors, for all
                actors together; None: all.
            device: "cpu": GPUs are left alone. flag: what the caller calls `actors`.

        Raises InputError for less than one, or for more than there are processors or GPUs.
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
        """What Ray is to reserve for an actor."""
        return {"num_cpus": self.threads, "num_gpus": self.gpus}


@dataclass(frozen=True)
class Opening:
    """How an actor opens a store, as `ScalableLM.from_pretrained` does. threads: of the processor."""

    store: str
    backbone: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    skip_damaged: bool = False
    device_memory: int | str | None = None
    threads: int | None = None

    @classmethod
    def of(cls, store: str | Path, *, backbone: str | None = None, **how: Any) -> Opening:
        """Folders as paths that mean the same from anywhere. Raises InputError for a backbone that is not there."""
        path = str(store) if is_elsewhere(store) else os.path.abspath(os.path.expanduser(store))
        return cls(path, None if backbone is None else located(backbone), **how)

    def open(self) -> tuple[ScalableLM, list[str]]:
        """The model, and what whoever asked for it is to be warned of."""
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
    """What an actor answers. Raises its SlmError, or ActorEnded; WorkError where workers have not this package."""
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
    """Raise WorkError unless an actor's model decides all that the first one's does."""
    for name in sorted(got.keys() | expected.keys()):
        if got.get(name) != expected.get(name):
            if name == "store":
                raise WorkError("Ray: an actor has other tasks: the store was changed meanwhile; begin afresh")
            raise WorkError(f"Ray: an actor has {name} {got.get(name)!r}, the first one {expected.get(name)!r}")
