"""Which backend runs an operator on a device. This table chooses; nothing else does.

A backend named `b` implements operator `o` as the torch operator `slm_fast::o_b`. Adding one is a row of `BACKENDS`
and a place in `PREFERENCE`; the public functions, the autograd formulas and every caller stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from slm_fast.errors import InputError


def _always() -> str | None:
    return None


def _load_native() -> str | None:
    """Load the C++ operators. None, or the reason they are missing."""
    try:
        import_module("slm_fast._C")
    except ImportError as error:
        return f"slm_fast._C did not load ({error}); build it with `pip install --no-build-isolation -e .`"
    return None


NATIVE_MISSING = _load_native()


@dataclass(frozen=True)
class Backend:
    """One way to run the operators. `why_not()` is None when it can be used here, else the reason it cannot.

    checks_arguments: `multi_lora` raises ValueError for whatever does not fit, before it touches memory.
    in_place: it also has `slm_fast::multi_lora_<name>_`, which overwrites `base`.
    """

    name: str
    operators: tuple[str, ...]
    why_not: Callable[[], str | None] = _always
    checks_arguments: bool = False
    in_place: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(device for device, names in PREFERENCE.items() if self.name in names)

    @property
    def available(self) -> bool:
        return self.why_not() is None


BACKENDS = (
    Backend("reference", ("retrieve", "key_loss", "multi_lora")),
    Backend(
        "native",
        ("retrieve", "key_loss", "multi_lora"),
        lambda: NATIVE_MISSING,
        checks_arguments=True,
        in_place=True,
    ),
)

# For each device, the backends in the order they are tried.
PREFERENCE = MappingProxyType({"cpu": ("native", "reference"), "cuda": ("reference",)})


class _Forced:
    """The backend `use_backend` insists on, for the whole process. A plain attribute, because torch.compile guards on
    one and recompiles when it changes; it neither traces context variables nor guards on thread-local ones."""

    name: str | None = None


_forced = _Forced()


def backends(device: str | None = None) -> tuple[Backend, ...]:
    """The backends known here; with `device` ("cpu", "cuda"), those usable on it, the preferred one first."""
    if device is None:
        return BACKENDS
    by_name = {backend.name: backend for backend in BACKENDS}
    return tuple(by_name[name] for name in PREFERENCE.get(device, ()) if by_name[name].available)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator on the named backend inside the block, in all threads.

    Raises InputError when there is no such backend here, or when an operator or device it does not serve is called.
    """
    present = [backend.name for backend in BACKENDS if backend.available]
    if name not in present:
        raise InputError(f"backend: {name!r} is not available; present: {', '.join(present)}")
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """For an implementation written in torch calls: autocast would lower the precision of what it accumulates."""

    @wraps(implementation)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *rest)

    return run


def chosen(stem: str, device: str) -> Backend:
    """The backend that runs `stem` on `device` now."""
    forced = _forced.name
    for name in PREFERENCE.get(device, ()):
        if forced is not None and name != forced:
            continue
        for backend in BACKENDS:
            if backend.name == name and stem in backend.operators and backend.why_not() is None:
                return backend
    if forced is not None:
        raise InputError(f"backend: {forced!r} does not run {stem} on {device}")
    raise InputError(f"{stem}: no backend for device {device!r}; devices served: {', '.join(PREFERENCE)}")


def operator(stem: str, device: str) -> Any:
    """The torch operator that runs `stem` on `device` now."""
    return getattr(torch.ops.slm_fast, f"{stem}_{chosen(stem, device).name}")
