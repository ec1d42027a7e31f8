"""Gives the torch operators of every available backend their schemas, fake kernels and gradients.

Backend `b` of operator `o` is `slm_fast::o_b`, and its gradient is `slm_fast::o_b_backward`. Python implementations are
registered here. C++ ones register themselves, including their schemas (csrc/library.cpp), when slm_fast._C is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from slm_fast.ops.adapted_linear import fake_adapted_linear, reference_adapted_linear
from slm_fast.ops.arguments import NO_TANGENTS, forward_mode
from slm_fast.ops.dispatch import BACKENDS, PREFERENCE, Backend
from slm_fast.ops.invariant_linear import fake_invariant_linear, reference_invariant_linear
from slm_fast.ops.key_loss import (
    fake_key_loss,
    fake_key_loss_backward,
    key_loss_gradients,
    reference_key_loss,
    reference_key_loss_backward,
    remember_key_loss,
)
from slm_fast.ops.multi_lora import (
    fake_multi_lora,
    fake_multi_lora_,
    fake_multi_lora_backward,
    multi_lora_gradients,
    reference_multi_lora,
    reference_multi_lora_backward,
    remember_multi_lora,
)
from slm_fast.ops.retrieve import fake_prepare_keys, fake_retrieve, reference_retrieve
from slm_fast.ops.sum_scatters import fake_sum_scatters, reference_sum_scatters


@dataclass(frozen=True)
class Gradient:
    """The backward pass of an operator for autograd.

    Attributes:
        schema, reference, fake: of the backward operator.
        remember: (ctx, inputs, output): saves what the backward pass needs.
        of_inputs: (ctx, backward operator, *gradients of the outputs) -> the gradient of each input.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    remember: Callable[..., None]
    of_inputs: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Definition:
    """What all backends of an operator share.

    Attributes:
        gradient: None if its results never require one.
        forward_only: going back through it is an error.
        more: additional arguments of the reference.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    gradient: Gradient | None = None
    forward_only: bool = False
    more: str = ""


DEFINITIONS = {
    "retrieve": Definition(
        "(Tensor query, Tensor keys, SymInt k, SymInt groups, Tensor? bias, Tensor? mask, str metric, str aggregate,"
        " str weighting, float temperature) -> (Tensor, Tensor)",
        reference_retrieve,
        fake_retrieve,
        more=", Tensor? key_slot=None",
    ),
    "key_loss": Definition(
        "(Tensor query, Tensor keys, SymInt k, SymInt groups, float mask_prob, SymInt seed) -> (Tensor, Tensor)",
        reference_key_loss,
        fake_key_loss,
        Gradient(
            "(Tensor grad, Tensor query, Tensor keys, Tensor selected) -> Tensor",
            reference_key_loss_backward,
            fake_key_loss_backward,
            remember_key_loss,
            key_loss_gradients,
        ),
    ),
    "multi_lora": Definition(
        "(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor? base) -> Tensor",
        reference_multi_lora,
        fake_multi_lora,
        Gradient(
            "(Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, bool[] needed)"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            reference_multi_lora_backward,
            fake_multi_lora_backward,
            remember_multi_lora,
            multi_lora_gradients,
        ),
    ),
    "adapted_linear": Definition(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights)"
        " -> Tensor",
        reference_adapted_linear,
        fake_adapted_linear,
        forward_only=True,
    ),
    "invariant_linear": Definition(
        "(Tensor x, Tensor weight) -> Tensor", reference_invariant_linear, fake_invariant_linear
    ),
    "sum_scatters": Definition(
        "(Tensor factor, Tensor rows, Tensor exponent, Tensor diagonal) -> (Tensor, Tensor)",
        reference_sum_scatters,
        fake_sum_scatters,
    ),
}


def register_backends() -> None:
    """Called once, when slm_fast.ops is imported."""
    for backend in BACKENDS:
        if not backend.available:
            continue
        for stem, definition in DEFINITIONS.items():
            if backend.has(stem):
                _register(stem, backend, definition)
        if backend.in_place:
            torch.library.register_fake(f"slm_fast::multi_lora_{backend.name}_", fake_multi_lora_)
        if backend.prepares_keys:
            torch.library.register_fake(f"slm_fast::prepare_keys_{backend.name}", fake_prepare_keys)


def gradient_source(stem: str, backend: Backend) -> str:
    """The backend whose backward operator is used: itself or, if it supports only some sizes, the next that supports
    all."""
    for names in PREFERENCE.values():
        if backend.name in names:
            following = names[names.index(backend.name) :]
            able = {b.name for b in BACKENDS if stem in b.operators and b.available}
            return next(name for name in following if name in able)
    raise LookupError(f"{backend.name}: expected a place in dispatch.PREFERENCE")


def _register(stem: str, backend: Backend, definition: Definition) -> None:
    name, gradient = f"slm_fast::{stem}_{backend.name}", definition.gradient
    in_triton = import_module(f"slm_fast.ops.triton.{stem}") if backend.name == "triton" else None
    if backend.name == "reference":
        _define(name, definition.reference, definition.schema.replace(") ->", f"{definition.more}) ->"))
    elif in_triton:
        _define(name, in_triton.forward, definition.schema)
    torch.library.register_fake(name, definition.fake)
    if definition.forward_only:
        torch.library.register_autograd(name, partial(_no_gradient, stem))
    if gradient is None:
        return
    if backend.name == "reference":
        _define(f"{name}_backward", gradient.reference, gradient.schema)
    elif in_triton:
        _define(f"{name}_backward", in_triton.backward, gradient.schema)
    source = gradient_source(stem, backend)
    if source == backend.name:
        torch.library.register_fake(f"{name}_backward", gradient.fake)

    def go_back(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backward = getattr(torch.ops.slm_fast, f"{stem}_{source}_backward")
        if torch.is_grad_enabled() or forward_mode():  # create_graph=True, or forward over reverse
            backward = partial(_FirstDerivative.apply, stem, backward)
        return gradient.of_inputs(ctx, backward, *grads)

    torch.library.register_autograd(name, go_back, setup_context=gradient.remember)


def _no_gradient(stem: str, ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError(f"{stem}: it has no autograd formula, only a forward pass")


class _FirstDerivative(torch.autograd.Function):
    """A backward operator whose own derivatives are an error. A formula registered for the operator itself would cost
    every backward pass 8 us, not only those that are to be differentiated."""

    @staticmethod
    def forward(ctx: Any, stem: str, backward: Callable[..., Any], *arguments: Any) -> Any:
        ctx.stem = stem
        return backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{ctx.stem}: it has no second derivative; do not differentiate its gradients")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(f"{ctx.stem}: {NO_TANGENTS}")


def _define(name: str, implementation: Callable[..., Any], schema: str) -> None:
    torch.library.custom_op(name, implementation, mutates_args=(), schema=schema)
