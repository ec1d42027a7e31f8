"""A stand-in for CUDA graphs that runs on a CPU.

A graph replays the same kernels on the same addresses with the same Python numbers. Recording the torch operators of a
step and calling them again exposes the same errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from slm_fast.cuda_graphs import Graphs, Step
from slm_fast.loading import masks_not_looked_at

aten = torch.ops.aten
# Operators that wait for the device or copy from the host, which is an error during a capture.
WAITING = (
    *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),
    *(aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.lift_fresh.default),
)


class Watch(TorchDispatchMode):
    """Records the calls of torch operators, and raises an error for those in `WAITING`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in WAITING:
            raise RuntimeError(f"{operator} waits for the device")
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out


class Recorder:
    """Replaces `cuda_graphs.Graphs`: captures the torch operators of a step; counts trials, captures and replays."""

    def __init__(self) -> None:
        self.tried = self.captured = self.replayed = 0

    @contextmanager
    def trial(self) -> Iterator[None]:
        self.tried += 1
        with masks_not_looked_at(), Watch():
            yield

    def capture(self, step: Step) -> Step:
        self.captured += 1
        with masks_not_looked_at(), Watch() as watch:
            result = step()

        def replay() -> Any:
            self.replayed += 1
            now: dict[int, Tensor] = {}  # id of a recorded result -> that result in this replay

            def current(x: Any) -> Any:  # arguments of operators: tree_map would take longer than the operators
                if isinstance(x, (list, tuple)):
                    return [current(one) for one in x]
                return now.get(id(x), x) if isinstance(x, Tensor) else x

            for operator, args, kwargs, out in watch.calls:
                new = operator(*current(args), **{name: current(value) for name, value in kwargs.items()})
                if isinstance(out, Tensor):
                    now[id(out)] = new
                    continue
                for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    now[id(old)] = fresh
            return tree_map(current, result)

        return replay


class Counted(Graphs):
    """CUDA graphs that count their replays."""

    replayed = 0

    def capture(self, step: Step) -> Step:
        replay = super().capture(step)

        def counted() -> Any:
            Counted.replayed += 1
            return replay()

        return counted


def cannot_be_captured(model: torch.nn.Module, recorder: Recorder, when: str) -> None:
    """Make each pass of a model wait for the device ("waits"), or make its capture fail."""
    if when == "waits":
        model.register_forward_pre_hook(lambda module, args: bool(torch.ones(1).sum() > 0) and None)
        return

    def refuse(step: Step) -> Step:
        step()
        raise RuntimeError("the graph waits for the device\nmore lines")

    recorder.capture = refuse  # type: ignore[method-assign]
