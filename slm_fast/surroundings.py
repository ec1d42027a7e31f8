"""Global settings of the calling program that must not affect learning or answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Inside the block torch computes in the calling thread alone.

    For opening a model that another thread will run. Every thread that computes in parallel has OpenMP threads of its
    own for as long as it lives. If a process has more of them than processors, even idle ones, GNU's OpenMP (torch's on
    Linux) lets waiting threads sleep instead of spin, and waking them takes longer than most operators: on two cores a
    135 M model takes 60 ms for a token instead of 42.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def pinned(modules: Sequence[nn.Module] = (), *, one_thread: bool = False) -> Iterator[None]:
    """Inside the block new tensors are float32 on the CPU by default, autocast is off, the modules are in evaluation
    mode and, with `one_thread`, torch uses a single thread. Everything is restored afterwards."""
    dtype = torch.get_default_dtype()
    training = [module for module in modules if module.training]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            if dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
            if one_thread and torch.get_num_threads() > 1:
                stack.enter_context(in_one_thread())
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
            if dtype != torch.float32:
                torch.set_default_dtype(dtype)


class PinnedLock:
    """A reentrant lock that pins the surroundings while it is held.

    Args:
        models: models that are in evaluation mode meanwhile.
        one_thread: whether torch uses a single thread meanwhile.
    """

    def __init__(self, models: Sequence[nn.Module], *, one_thread: bool = False) -> None:
        self.models, self._one_thread = list(models), one_thread
        self._lock = threading.RLock()
        self._depth = 0
        self._pins: Any = None
        self._known: tuple[list[nn.Module], list[nn.Module]] = [], []

    @classmethod
    def of(cls, model: nn.Module, *, one_thread: bool = False) -> PinnedLock:
        """The one lock of a model, however often it is wrapped."""
        lock = vars(model).get("slm_fast_lock")
        if not isinstance(lock, cls):
            lock = cls([model], one_thread=one_thread)
            model.slm_fast_lock = lock  # type: ignore[assignment]
        return lock

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model has its own lock, which nobody holds."""
        return {"models": self.models, "_one_thread": self._one_thread}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _depth=0, _pins=None, _known=([], []))

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            if self._depth == 0:
                self._pins = pinned(self._modules(), one_thread=self._one_thread)
                self._pins.__enter__()
            self._depth += 1
        except BaseException:
            self._lock.release()
            raise

    def _modules(self) -> list[nn.Module]:
        """All modules of the models. Walking through them takes long compared to a short pass, so it is repeated only
        if a model as a whole is in training mode, or the models have changed."""
        models, modules = self._known
        if models != self.models or any(model.training for model in models):
            modules = [module for model in self.models for module in model.modules()]
            self._known = list(self.models), modules
        return modules

    def __exit__(self, *error: object) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                self._pins.__exit__(None, None, None)
        finally:
            self._lock.release()
