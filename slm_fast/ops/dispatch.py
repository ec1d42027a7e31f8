"""Chooses the backend that runs an operator on a device. Nothing else does.

A backend named `b` implements operator `o` as the torch operator `slm_fast::o_b`. To add one, add a row to `BACKENDS`
and a place in `PREFERENCE`; public functions, autograd formulas and callers stay as they are.

A backend may support only some sizes of an operator, listed as `operator:size`. Measured preferences (`MEASURED`, of
GPUs preference.csv beside this file, written by benchmarks/gpu.sh) come before `PREFERENCE`.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from slm_fast.errors import InputError


def _always() -> str | None:
    return None


def _load_native() -> str | None:
    """Load the C++ operators. Return None, or the reason they are missing."""
    try:
        import_module("slm_fast._C")
    except ImportError as error:
        return f"slm_fast._C did not load ({error}); build it with `pip install --no-build-isolation -e .`"
    return None


def _find_triton() -> str | None:
    """Return None, or the reason the Triton operators are missing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if torch.version.cuda is None and not INTERPRETED:
        return "this torch was built without CUDA (TRITON_INTERPRET=1 runs Triton on a CPU, for tests)"
    return None


def _find_cuda() -> str | None:
    """Return None, or the reason the CUDA operators are missing."""
    if NATIVE_MISSING is not None:
        return NATIVE_MISSING
    if not import_module("slm_fast._C").build_info()["cuda"]:
        return "slm_fast._C was built without CUDA; install again with SLM_FAST_CUDA=on"
    if torch.version.cuda is None:
        return "slm_fast._C has CUDA kernels, but this torch was built without CUDA; install one with it"
    return None


# Triton's interpreter runs kernels as NumPy, on CPU tensors. Triton reads this variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
NATIVE_MISSING = _load_native()
CUDA_MISSING = _find_cuda()
TRITON_MISSING = _find_triton()


@dataclass(frozen=True)
class Backend:
    """One way to run the operators.

    Attributes:
        operators: names ("retrieve"), or names with the one size supported ("multi_lora:decode").
        why_not: returns None if the backend can be used here, else the reason it cannot.
        leaves_out: unsupported sizes of operators that are otherwise supported.
        checks_arguments: `multi_lora` raises ValueError for invalid arguments before it touches memory.
        in_place: it also has `slm_fast::multi_lora_<name>_`, which overwrites `base`.
        prepares_keys: it also has `slm_fast::prepare_keys_<name>`, whose result its `retrieve` takes.
        takes_key_slot: its `retrieve` supports several keys per slot; other backends are asked for more keys instead.
    """

    name: str
    operators: tuple[str, ...]
    why_not: Callable[[], str | None] = _always
    leaves_out: tuple[str, ...] = ()
    checks_arguments: bool = False
    in_place: bool = False
    prepares_keys: bool = False
    takes_key_slot: bool = False

    def __repr__(self) -> str:
        return f"Backend({self.name!r}, {'available' if self.available else 'not available'})"

    def serves(self, stem: str, size: str = "") -> bool:
        sized = f"{stem}:{size}"
        return (stem in self.operators and sized not in self.leaves_out) or sized in self.operators

    def has(self, stem: str) -> bool:
        """Whether it supports any size of an operator."""
        return any(entry.partition(":")[0] == stem for entry in self.operators)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(device for device, names in PREFERENCE.items() if self.name in names)

    @property
    def available(self) -> bool:
        return self.why_not() is None


BACKENDS = (
    Backend(
        "reference",
        ("retrieve", "key_loss", "multi_lora", "adapted_linear", "invariant_linear", "sum_scatters"),
        takes_key_slot=True,
    ),
    Backend(
        "native",
        ("retrieve", "key_loss", "multi_lora", "adapted_linear:blocks", "invariant_linear", "sum_scatters"),
        lambda: NATIVE_MISSING,
        checks_arguments=True,
        in_place=True,
        prepares_keys=True,
        takes_key_slot=True,
    ),
    Backend(
        "triton",
        ("retrieve", "key_loss", "multi_lora", "adapted_linear"),
        lambda: TRITON_MISSING,
        ("retrieve:wide", "key_loss:wide", "adapted_linear:other"),
    ),
    Backend(
        "cuda",
        (
            *("retrieve:few", "retrieve:many", "multi_lora:decode", "multi_lora:tokens"),
            *("adapted_linear:tiles", "adapted_linear:packed"),
        ),
        lambda: CUDA_MISSING,
        checks_arguments=True,
        in_place=True,
        takes_key_slot=True,
    ),
)

# Operators that prepare others' inputs: a forced backend that lacks them leaves the choice to `PREFERENCE`.
AUXILIARY = ("invariant_linear", "sum_scatters")

# For each device, the backends in the order they are tried.
PREFERENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("native", "reference", "triton") if INTERPRETED else ("native", "reference"),
        "cuda": ("cuda", "triton", "reference"),
    }
)


def read_measured(path: Path) -> Mapping[tuple[str, str, str], tuple[str, ...]]:
    """(device, operator, size) -> backends, fastest first. Lines that begin with # describe the measurement."""
    if not path.exists():
        return MappingProxyType({})
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        found = {(row["device"], row["operator"], row["size"]): tuple(row["backends"].split()) for row in rows}
    return MappingProxyType(found)


MEASURED: Mapping[tuple[str, str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("cpu", "adapted_linear", "blocks"): ("native", "reference"),  # benchmarks/results/adapted_linear_amx.csv
        **read_measured(Path(__file__).with_name("preference.csv")),
    }
)


class _Forced:
    """The backend that `use_backend` forces, for the whole process. A plain attribute, because torch.compile guards on
    these and recompiles when they change; it neither traces context variables nor guards on thread-local ones."""

    name: str | None = None


_forced = _Forced()


def backends(device: str | None = None) -> tuple[Backend, ...]:
    """The known backends; with `device` ("cpu", "cuda"), those usable on it, in order of preference."""
    if device is None:
        return BACKENDS
    by_name = {backend.name: backend for backend in BACKENDS}
    return tuple(by_name[name] for name in PREFERENCE.get(device, ()) if by_name[name].available)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator on the named backend inside the block, in all threads.

    Raises:
        InputError: the backend is not available here, or an operator or device that it does not support is used.
    """
    present = [backend.name for backend in BACKENDS if backend.available]
    if name not in present:
        raise InputError(f"backend: {name!r} is not available; present: {', '.join(present)}")
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def is_forced() -> bool:
    """Whether a `use_backend` block is active."""
    return _forced.name is not None


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for an implementation in torch calls. Autocast would lower the precision of what it accumulates."""

    @wraps(implementation)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *rest)

    return run


def chosen(stem: str, device: str, size: str = "") -> Backend:
    """The backend that runs `stem` on `device` now, for the size class given by its public function."""
    forced = _forced.name
    if stem in AUXILIARY and not any(backend.name == forced and backend.has(stem) for backend in BACKENDS):
        forced = None
    if NATIVE_MISSING is not None and device == "cpu" and forced is None:
        _warn_that_native_is_missing()
    for name in _order(stem, device, size):
        if forced is not None and name != forced:
            continue
        for backend in BACKENDS:
            if backend.name == name and backend.serves(stem, size) and backend.why_not() is None:
                return backend
    if forced is not None:
        raise InputError(f"backend: {forced!r} does not run {stem}{f' ({size})' if size else ''} on {device}")
    raise InputError(f"{stem}: no backend for device {device!r}; devices served: {', '.join(PREFERENCE)}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _warn_that_native_is_missing() -> None:
    """Warn once per process, at the first call that would have run on them."""
    _warn_once(
        f"slm_fast: the C++ operators are not there ({NATIVE_MISSING}); the PyTorch reference runs instead, most of it "
        "several times slower; `slm-fast doctor` says more"
    )


if NATIVE_MISSING is not None:  # so that tracing a graph warns too; elsewhere this import of 1.4 s is not needed
    _warn_that_native_is_missing = torch.compiler.assume_constant_result(_warn_that_native_is_missing)


def operator(stem: str, device: str, size: str = "") -> Any:
    """The torch operator of the `chosen` backend."""
    return getattr(torch.ops.slm_fast, f"{stem}_{chosen(stem, device, size).name}")


def _order(stem: str, device: str, size: str) -> tuple[str, ...]:
    preferred = PREFERENCE.get(device, ())
    return (*MEASURED.get((device, stem, size), ()), *preferred)


def fuses(device: str) -> bool:
    """Whether `fused_wins` may hold for any size on this device. Called in every pass of an adapted layer."""
    if device == "cpu" and torch.compiler.is_compiling():
        return False
    first = [order[0] for key, order in MEASURED.items() if key[:2] == (device, "adapted_linear")]
    return any(name != "reference" and (name != "native" or has_amx()) for name in first)


def fused_wins(device: str, size: str) -> bool:
    """Whether measurements favour one kernel for the base product and the increments (adapted_linear)."""
    measured = MEASURED.get((device, "adapted_linear", size), ("reference",))[0]
    missing = {"native": NATIVE_MISSING, "triton": TRITON_MISSING, "cuda": CUDA_MISSING}.get(measured, "not a kernel")
    return missing is None and _forced.name in (None, measured)


@cache
def has_amx() -> bool:
    """Whether the native backend uses AMX, which its adapted_linear needs. torch.compile cannot trace this."""
    return NATIVE_MISSING is None and import_module("slm_fast._C").build_info()["instruction_set"] == "amx"


@cache
def multiplies_tiles(index: int | None) -> bool:
    """Whether the CUDA backend's adapted_linear runs on this GPU: it has instructions of sm_90a alone. torch.compile
    cannot trace this."""
    if CUDA_MISSING is not None or "sm_90a" not in import_module("slm_fast._C").build_info()["cuda"]:
        return False
    return torch.cuda.get_device_capability(index) == (9, 0)
