"""An adapted forward pass: LoRA increments in a frozen backbone, and hooks that find the route during the pass.

With a trunk query one pass does everything: hooks on the tapped layers pool their hidden states, the route is found at
the last tap, and the layers above it, the only ones with increments, use it.
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
from slm_fast.layers import Adaptation, AdaptedFused, AdaptedLinear, Values
from slm_fast.ops import Route
from slm_fast.query import TrunkQuery

Result = TypeVar("Result")


@dataclass
class ForwardContext:
    """Inputs and results of the hooks during one forward pass.

    Attributes:
        mask: [B, T], real tokens that the query is pooled over.
        values: LoRA matrices that the route's ids refer to, by module.
        route: [B, K], given or found.
        find_route: queries [B, D] -> route, if it is to be found during the pass.
        rows: route -> route with ids that are rows of `values`.
        stop: end the pass once the "query", or the "states" that enter the lowest adapted layer, are known.
        pooled: pooled hidden states of the taps passed so far.
        query: [B, D], known after the last tap.
        states: [B, T, H], input of the lowest adapted layer, if requested or known in advance.
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
        modules: names of the linear layers with increments (`Backbone.find_linears`), none of them below the trunk's
            `first_layer`. (`adapt` adds further ones of imported tasks.)
        first_layer: lowest adapted layer.
        trunk: the query that is computed during the pass; None if queries come from another model.
    """

    def __init__(self, backbone: Backbone, modules: list[str], first_layer: int, trunk: TrunkQuery | None) -> None:
        self.backbone, self.first_layer, self.trunk = backbone, first_layer, trunk
        self.adaptation = Adaptation()
        self._context: ForwardContext | None = None
        self._output: Any = None  # the lowest layer's output, if constant except for hidden states; see CachedLayer
        self.adapt(modules)
        hooks = [(tap, _Hook(self, "_tap")) for tap in (trunk.taps if trunk else ())]
        hooks.append((first_layer, _Hook(self, "_enter")))  # after a tap on the same layer
        for place, hook in hooks:
            handle = backbone.layers[place].register_forward_pre_hook(hook, with_kwargs=True)
            weakref.finalize(self, handle.remove)  # the same model may be used for several injections

    def adapt(self, modules: Iterable[str]) -> None:
        """Add increments to more linear layers. They may be below the last tap if routes are given."""
        for module, parts in self.backbone.parts(list(modules)).items():
            parent, _, child = module.rpartition(".")
            layer = self.backbone.model.get_submodule(module)
            if not isinstance(layer, AdaptedLinear):
                plain = (layer, module, self.adaptation)
                layer = AdaptedFused(*plain, parts) if parts else AdaptedLinear(*plain)
                setattr(self.backbone.model.get_submodule(parent), child, layer)
            if layer not in self.adaptation.layers:  # it may be there for another part of a fused layer
                self.adaptation.layers.append(layer)

    def run(
        self, function: Callable[[], Result], context: ForwardContext, states: Tensor | None = None
    ) -> Result | None:
        """Call `function`, which runs the backbone once or (generation) several times, adapted as the context says.

        Args:
            states: [B, T, H], input of the lowest adapted layer, from an earlier pass that stopped there. The layers
                below then do not run.

        Returns:
            The function's result; None if the context stopped it.
        """
        route = None if context.route is None else context.rows(context.route)
        context.states = states
        with self.adaptation.using(context.values, route), self._above(states), self._seen(context), suppress(_Stopped):
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
        beams = hidden.shape[0] // context.mask.shape[0]  # generation repeats each row for each beam
        self.trunk.read(hidden, context.mask.repeat_interleave(beams, 0), context.pooled)
        if not self.trunk.complete(context.pooled):
            return
        context.query = self.trunk.join(context.pooled)
        if context.stop == "query":
            raise _Stopped
        if context.find_route is not None:
            context.route = context.find_route(context.query)
            self.adaptation.route = context.rows(context.route)

    def _enter(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        context = self._context
        if context is None:
            return None
        if context.stop == "states":
            context.states = args[0] if args else kwargs["hidden_states"]
            raise _Stopped
        if context.states is None:
            return None
        # Set again, since a model may do something between layers (such as DeBERTa's convolution after the first).
        return ((context.states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": context.states})

    @contextmanager
    def _above(self, states: Tensor | None) -> Iterator[None]:
        """Start passes inside the block at the lowest adapted layer with these states; with None, at the bottom."""
        if states is None:
            yield
            return
        layers, lower = self.backbone.layers, range(self.first_layer)
        replaced = [layers[i] for i in lower]
        cached: CachedLayer | None = None
        try:
            for i in lower:
                layers[i] = cached = CachedLayer(states, replaced[i], cached, self._output)
            yield
        finally:
            for i, layer in zip(lower, replaced, strict=True):
                layers[i] = layer

    @contextmanager
    def _seen(self, context: ForwardContext) -> Iterator[None]:
        """In a pass for the states inside the block, note what the lowest layer returns besides hidden states."""
        if context.stop != "states":
            yield
            return

        def look(layer: torch.nn.Module, args: Any, output: Any) -> None:
            beside = output[1:] if isinstance(output, tuple) else ()
            if not any(isinstance(part, Tensor) for part in beside):
                self._output = (None, *beside) if isinstance(output, tuple) else False

        handle = self.backbone.layers[0].register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()


class _Hook:
    """A hook that holds its injection weakly."""

    def __init__(self, injection: Injection, method: str) -> None:
        self.injection, self.method = weakref.ref(injection), method

    def __call__(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        injection = self.injection()
        return None if injection is None else getattr(injection, self.method)(layer, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        """A copied model's hook uses the copied injection."""
        hook = _Hook.__new__(_Hook)
        memo[id(self)] = hook
        injection = copy.deepcopy(self.injection(), memo)
        hook.injection, hook.method = (lambda: injection), self.method  # type: ignore[assignment]
        return hook


class CachedLayer(torch.nn.Module):
    """Replaces a layer below those whose input is cached. It has the layer's attributes.

    Args:
        states: hidden states that it returns.
        layer: the replaced layer.
        below: the CachedLayer below it, if any.
        output: output of all these layers: a tuple that begins with hidden states or (anything else) these alone. None
            means unknown or variable (T5's layers pass on a position bias that the first one computes); the lowest
            layer then does run, once.
    """

    def __init__(self, states: Tensor, layer: torch.nn.Module, below: CachedLayer | None, output: Any) -> None:
        super().__init__()
        self.states, self.layer, self.below, self.output = states, layer, below, output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is None:
            self.output = self.layer(*args, **kwargs) if self.below is None else self.below.output
        return (self.states, *self.output[1:]) if isinstance(self.output, tuple) else self.states


class _Stopped(Exception):
    """Ends a forward pass once what the context stops at is known."""
