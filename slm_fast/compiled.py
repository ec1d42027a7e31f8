"""Layers under torch.compile, each by itself, so that the hooks between them run as always.

One graph serves all layers of a kind and all lengths: sizes are dynamic, and what differs between layers (weights,
increments, route) is an input of the graph. A batch of one row runs as it is, because size 1 gets graphs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slm_fast.errors import WorkError, one_line


class CompiledLayers:
    """Compiles layers when they are first needed, and keeps what was compiled."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        self._forwards: list[Callable[..., Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block the layers run compiled. Raises WorkError where they cannot be (no C++ compiler, say)."""
        self._forwards = self._forwards or [_compiled(layer.forward) for layer in self.layers]
        own: list[Any] = [vars(layer).get("forward") for layer in self.layers]
        try:
            for layer, forward in zip(self.layers, self._forwards, strict=True):
                layer.forward = forward
            yield
        finally:
            for layer, before in zip(self.layers, own, strict=True):
                if before is None:
                    del layer.forward
                else:
                    layer.forward = before


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.exc import TorchDynamoException  # a slow import

    compiled = torch.compile(forward, dynamic=True)

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden) == 1:
            return forward(hidden, *args, **kwargs)
        try:
            return compiled(hidden, *args, **kwargs)
        except TorchDynamoException as error:
            raise WorkError(f"compile: torch.compile failed: {one_line(error)}") from None

    return run
