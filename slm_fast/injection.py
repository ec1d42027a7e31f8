"""One adapted forward pass: LoRA increments in a frozen backbone, and hooks that find the route on the way up.

With a trunk query one pass does everything. Hooks on the tapped layers pool their hidden states; at the last tap the
route is found, and the layers above it, the only ones that carry increments, use it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.layers import Adaptation, AdaptedLinear, Values
from slm_fast.ops import Route
from slm_fast.query import TrunkQuery

Result = TypeVar("Result")


@dataclass
class ForwardContext:
    """What the hooks of one forward pass need, and what they find.

    Attributes:
        mask: [B, T], real tokens that the query is pooled over.
        values: LoRA matrices that the route's ids name, by module.
        route: [B, K], given or found.
        find_route: from queries [B, D] to the route, where it is to be found on the way.
        rows: from the route to the rows of `values`.
        stop: end the pass once the "query", or the "states" that enter the lowest adapted layer, are known.
        states: [B, T, H] of those, if asked for. query: [B, D] once the last tap is passed.
    """

    mask: Tensor
    values: Values
    route: Route | None = None
    find_route: Callable[[Tensor], Route] | None = None
    rows: Callable[[Route], Route] = lambda route: route
    stop: str | None = None
    pooled: list[Tensor] = field(default_factory=list)
    query: Tensor | None = None
    states: Tensor | None = None


class Injection:
    """Puts adapted layers and hooks into a backbone, and runs passes through them, one at a time.

    Args:
        modules: names of the linear layers that carry increments, none of them below layer `first_layer` of the trunk.
            (`adapt` adds those that imported tasks have beside.)
        trunk: the query that is found on the way up; None where queries come from another model.
    """

    def __init__(self, backbone: Backbone, modules: list[str], first_layer: int, trunk: TrunkQuery | None) -> None:
        self.backbone, self.first_layer, self.trunk = backbone, first_layer, trunk
        self.adaptation = Adaptation()
        self._context: ForwardContext | None = None
        self.adapt(modules)
        hooks = [(tap, _Hook(self, "_tap")) for tap in (trunk.taps if trunk else ())]
        hooks.append((first_layer, _Hook(self, "_enter")))  # after the tap that may be on the same layer
        for place, hook in hooks:
            handle = backbone.layers[place].register_forward_pre_hook(hook, with_kwargs=True)
            weakref.finalize(self, handle.remove)  # a model may be given many times

    def adapt(self, modules: Iterable[str]) -> None:
        """Let more linear layers carry increments. One below the last tap may be among them where routes are given."""
        for name in modules:
            parent, _, child = name.rpartition(".")
            layer = self.backbone.model.get_submodule(name)
            if not isinstance(layer, AdaptedLinear):
                layer = AdaptedLinear(layer, name, self.adaptation)
                setattr(self.backbone.model.get_submodule(parent), child, layer)
            self.adaptation.layers.append(layer)

    def run(
        self, function: Callable[[], Result], context: ForwardContext, states: Tensor | None = None
    ) -> Result | None:
        """Call `function`, which passes the backbone once or (generation) several times, adapted as the context says.

        Args:
            states: [B, T, H] that enter the lowest adapted layer, from an earlier pass that stopped there: the layers
                below it then do not run.

        Returns:
            What the function returned; None where the context stopped it.
        """
        route = None if context.route is None else context.rows(context.route)
        with self.adaptation.using(context.values, route), self._above(states), suppress(_Stopped):
            self._context = context
            try:
                return function()
            finally:
                self._context = None
        return None

    def _tap(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        context = self._context
        if context is None or self.trunk is None or context.query is not None:
            return
        if context.find_route is None and context.stop is None:
            return
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        beams = hidden.shape[0] // context.mask.shape[0]  # generation repeats each row for its beams
        self.trunk.read(hidden, context.mask.repeat_interleave(beams, 0), context.pooled)
        if not self.trunk.complete(context.pooled):
            return
        context.query = self.trunk.join(context.pooled)
        if context.stop == "query":
            raise _Stopped
        if context.find_route is not None:
            context.route = context.find_route(context.query)
            self.adaptation.route = context.rows(context.route)

    def _enter(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        context = self._context
        if context is not None and context.stop == "states":
            context.states = args[0] if args else kwargs["hidden_states"]
            raise _Stopped

    @contextmanager
    def _above(self, states: Tensor | None) -> Iterator[None]:
        """Passes inside the block begin with these states at the lowest adapted layer; with None at the bottom."""
        if states is None:
            yield
            return
        layers, lower = self.backbone.layers, range(self.first_layer)
        replaced = [layers[i] for i in lower]
        # T5's layers hand on the position bias that the first of them makes.
        cached = CachedLayer(states, replaced[0] if self.backbone.kind == "seq2seq" else None)
        try:
            for i in lower:
                layers[i] = cached
            yield
        finally:
            for i, layer in zip(lower, replaced, strict=True):
                layers[i] = layer


class _Hook:
    """A hook that does not keep its injection alive."""

    def __init__(self, injection: Injection, method: str) -> None:
        self.injection, self.method = weakref.ref(injection), method

    def __call__(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        injection = self.injection()
        if injection is not None:
            getattr(injection, self.method)(layer, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        """The hook of a copied model serves the copy of the injection."""
        hook = _Hook.__new__(_Hook)
        memo[id(self)] = hook
        injection = copy.deepcopy(self.injection(), memo)
        hook.injection, hook.method = (lambda: injection), self.method  # type: ignore[assignment]
        return hook


class CachedLayer(torch.nn.Module):
    """Stands in the place of layers whose output is cached. With a `layer`, that one runs all the same, for what it
    returns beside the hidden states."""

    def __init__(self, states: Tensor, layer: torch.nn.Module | None) -> None:
        super().__init__()
        self.states, self.layer = states, layer
        self.beside: tuple[Any, ...] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer is not None and self.beside is None:
            self.beside = self.layer(*args, **kwargs)[1:]
        return self.states if self.beside is None else (self.states, *self.beside)


class _Stopped(Exception):
    """Ends a forward pass of which only what the context stops at was wanted."""
