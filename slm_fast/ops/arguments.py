"""What all operators say of arguments that they cannot take."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from slm_fast.errors import InputError, WorkError, lacks_memory

P = ParamSpec("P")
R = TypeVar("R")
NO_TANGENTS = "it has no forward-mode derivative; use reverse mode (backward, torch.autograd.grad)"
# What an annotation takes, and what a message calls it. bool is an int, and NumPy's numbers are numbers.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    Tensor: ((Tensor,), "a tensor"),
    int: ((Integral, torch.SymInt), "an integer"),
    float: ((Real, torch.SymInt, torch.SymFloat), "a number"),
    str: ((object,), ""),  # the operators say which they take
    type(None): ((type(None),), "None"),
}


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: any error is an InputError about the first argument that is not of the kind annotated, if there is
    one. If there is none, a lack of memory of which the error does not speak is a WorkError. Arguments are looked at
    only then: a call that succeeds takes less than 1 us longer."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return function(*args, **options)
        except Exception as error:
            if torch.compiler.is_compiling():  # which cannot trace what follows
                raise
            wrong = _wrong_kind(function, args, options, isinstance(error, InputError))
            if wrong is not None:
                raise InputError(wrong) from None
            if isinstance(error, RuntimeError) and lacks_memory(error) and "memory" not in str(error).lower():
                fewer = "fewer rows or a smaller k" if "k" in inspect.signature(function).parameters else "fewer rows"
                raise WorkError(f"{function.__name__}: not enough memory for its result; pass {fewer}") from None
            raise

    return call


def _wrong_kind(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], told: bool) -> str | None:
    """What to say of the first argument of a wrong kind. None if there is none, or arguments are missing.

    told: the error is about a value, so none is too large for an operator.
    """
    try:
        given = inspect.signature(function).bind(*args, **options).arguments
    except TypeError:
        return None
    hints = get_type_hints(function)
    for name, value in given.items():
        kinds = [KINDS.get(kind, ((kind,), kind.__name__)) for kind in get_args(hints[name]) or (hints[name],)]
        names = " or ".join(known for _, known in kinds)
        if not isinstance(value, tuple(kind for types, _ in kinds for kind in types)):
            shown = reprlib.repr(value) if isinstance(value, (str, Real, type(None))) else type(value).__name__
            return f"{name}: expected {names}, got {shown}"
        if not told and isinstance(value, int) and not -(2**63) <= value < 2 ** (64 if name == "seed" else 63):
            return f"{name}: expected a 64-bit integer, got {reprlib.repr(value)}"
    return None


def forward_mode() -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is under way."""
    return forward_ad._current_level >= 0


def refuse_tangents(stem: str, *tensors: Tensor | None) -> None:
    """Raise InputError if one of the tensors has a tangent in forward mode, or may have one of an outer torch.func
    transform: an operator would drop it, as if its derivative were zero."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and (
            torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or forward_ad.unpack_dual(tensor).tangent is not None
        ):
            raise InputError(f"{stem}: {NO_TANGENTS}")
