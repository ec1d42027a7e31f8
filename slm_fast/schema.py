"""What a store's manifest and a task's file say, checked whole when they are read.

Every refusal is one WorkError line that names the file and the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_fast.covariance import PERCENTILES, is_scatter, unpack
from slm_fast.data import check_name
from slm_fast.errors import InputError, WorkError
from slm_fast.fields import (
    PLAIN,
    STRING,
    TEXT,
    Kind,
    Unfit,
    Unknown,
    check,
    fields,
    integer,
    is_plain,
    list_of,
    number,
    or_null,
    read_json,
    repeated,
    word,
)
from slm_fast.options import LARGEST, TEMPERATURES
from slm_fast.scatter import EXPONENTS, RANK
from slm_fast.tasks import LearnedTask

FORMAT = 1
DIGEST: Kind = (
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
INCREMENT = re.compile(r"values\.(?P<module>.+)\.lora_[ab]")
# What the router keeps of a task: the tensors of a gaussian one without and with random features, or of a dtkr one.
ROUTERS = {
    "gaussian": ("count", "mean", "scatter", "distance"),
    "features": (
        *("count", "mean", "mean_slot", "mean_label", "factor", "exponent", "diagonal"),
        *("sample", "sample_mean"),
    ),
    "dtkr": ("keys", "distance"),
}
# And what those of before there were means a label, or constants were written, lack.
MEAN_SLOT = "mean_slot"
NEWER = {"gaussian": MEAN_SLOT, "features": "constants"}
# What the numbers of a task may be. What is learned stays far below; what goes beyond would only be found as answers
# that are no numbers. A scatter is summed over all tasks, in room for 128 of the largest.
NUMBERS = (
    ("values.", -1e4, 1e4),
    ("head.", -1e6, 1e6),
    ("count", 0, 2**40),
    ("mean_slot", 0, 2**20),
    ("mean_label", -1, 2**20),
    ("constants", 0, 2**20),
    ("mean", -1e8, 1e8),
    ("factor", -127, 127),
    ("exponent", *EXPONENTS),
    ("diagonal", 0, 2**45),
    ("sample_mean", 0, 2**20),
    ("sample", -1e8, 1e8),
    ("keys", -1e8, 1e8),
    ("scatter", -(2**45), 2**45),
    ("distance", -1e-3, 1e30),
)

# The fields of a model's configuration (slm_fast.options.ModelConfig, every choice made), as a manifest holds them.
CONFIG: Mapping[str, Kind] = {
    "query": word("trunk", "sentence"),
    "router": word("gaussian", "dtkr"),
    "taps": or_null(list_of(integer(0, LARGEST["layer"]))),
    "encoder": or_null(TEXT),
    "targets": list_of(TEXT),
    "first_layer": integer(0, LARGEST["layer"]),
    "k": integer(1, LARGEST["k"]),
    "groups": integer(1, LARGEST["groups"]),
    "aggregate": word("mean", "vote"),
    "temperature": number(*TEMPERATURES),
    "features": integer(0, LARGEST["features"]),
    "route_on": word("input", "prompt"),
    "max_length": integer(1, LARGEST["max_length"]),
}
WIDTH = integer(1, 1 << 24)
SHAPES: Mapping[str, Kind] = {"hidden": or_null(WIDTH), "query": WIDTH}  # beside `layers`, in a manifest's `shapes`
# Fields of `model` that stores of earlier versions lack, and that are compared where both sides have them.
WHEN_KNOWN = ("shapes", "tokens", "settings", "encoder_tokens", "encoder_settings")
SETTINGS: Kind = "plain JSON, at most 2 deep", lambda value: is_plain(value, 2)

# Field of the configuration -> what stores written before there was such a field meant. A new field of `CONFIG` has a
# value here, so that older stores open and answer as they did.
WHEN_ABSENT: Mapping[str, Any] = {"features": 0}


# The manifest


def check_manifest(data: bytes, file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the tasks of a store have in common, its configuration completed from `WHEN_ABSENT`, and the SHA-256 of
    each task's file.

    Raises WorkError when the manifest is damaged or of a newer version.
    """
    try:
        content = read_json(data)
        version = fields(content, "", "format", others=True)["format"]
        check(version, "format", integer(1))
        if version != FORMAT:
            raise WorkError(f"{file}: format {version}; this version of slm_fast reads format {FORMAT}")
        fields(content, "", "format", "model", "tasks")
        return _model(content["model"]), _files(content["tasks"])
    except Unknown as unknown:
        raise WorkError(f"{file}: {unknown}") from None
    except (Unfit, ValueError) as error:
        raise WorkError(f"{file}: damaged: {error}") from None


def _model(model: Any) -> dict[str, Any]:
    fields(model, "model", "backbone", "fingerprint", "config", optional=["encoder_fingerprint", *WHEN_KNOWN])
    for field, kind in (
        *(("backbone", STRING), ("fingerprint", TEXT), ("tokens", DIGEST), ("settings", SETTINGS)),
        *(("encoder_fingerprint", TEXT), ("encoder_tokens", DIGEST), ("encoder_settings", SETTINGS)),
    ):
        if field in model:
            check(model[field], f"model.{field}", kind)
    config = {**WHEN_ABSENT, **fields(model["config"], "model.config", others=True)}
    fields(config, "model.config", *CONFIG)
    for field, kind in CONFIG.items():
        check(config[field], f"model.config.{field}", kind)
    for field in ("taps", "targets"):
        if repeated(config[field] or ()) is not None:
            raise Unfit(f"model.config.{field}", f"{repeated(config[field])!r} stands there twice")
    for field in ("settings", "encoder_settings"):
        fields(model.get(field, {}), f"model.{field}", others=True)
    if "shapes" in model:
        shapes = fields(model["shapes"], "model.shapes", "layers", *SHAPES)
        for field, kind in SHAPES.items():
            check(shapes[field], f"model.shapes.{field}", kind)
        for module, widths in fields(shapes["layers"], "model.shapes.layers", others=True).items():
            check(widths, f"model.shapes.layers.{module}", list_of(WIDTH, 2))
    sentence = config["query"] == "sentence"
    for field, there, wanted in (
        ("config.taps", config["taps"] is not None, not sentence),
        ("config.encoder", config["encoder"] is not None, sentence),
        ("encoder_fingerprint", "encoder_fingerprint" in model, sentence),
    ):
        if there != wanted:
            raise Unfit(f"model.{field}", f"{'missing' if wanted else 'does not go'} with query {config['query']!r}")
    return {**model, "config": config}


def _files(tasks: Any) -> dict[str, str]:
    files = {}
    for name, entry in fields(tasks, "tasks", others=True).items():
        try:
            check_name(name)  # it becomes a path
        except InputError as error:
            raise Unfit("tasks", str(error)) from None
        fields(entry, f"tasks.{name}", "file", "sha256")
        digest = entry["sha256"]
        check(digest, f"tasks.{name}.sha256", DIGEST)
        check(entry["file"], f"tasks.{name}.file", word(task_path(name, digest)))
        files[name] = digest
    return files


def task_path(name: str, digest: str) -> str:
    """Where a task's file stands in its store."""
    return f"tasks/{name}/{digest}.safetensors"


# A task's file


def check_task(metadata: Any, tensors: Mapping[str, Tensor], file: Path) -> LearnedTask:
    """The task that a file's metadata and tensors make, if they fit each other.

    Raises WorkError when they do not. Whether the task fits a backbone is for `check_fits`.
    """
    try:
        check(metadata, "metadata", TEXT)
        about = fields(read_json(metadata), "", "labels", "name", "options", optional=["origin"])
        check(about["name"], "name", TEXT)
        check_name(about["name"])
        check(about["labels"], "labels", or_null(list_of(TEXT)))
        labels = about["labels"]
        if repeated(labels or ()) is not None:
            raise Unfit("labels", f"{repeated(labels)!r} stands there twice")
        for field, value in fields(about["options"], "options", others=True).items():
            check(value, f"options.{field}", PLAIN)
        if "warm_start" in about["options"]:
            _check_start(about["options"]["warm_start"])
        if "origin" in about:
            check(about["origin"], "origin", DIGEST)
        _check_tensors(tensors, labels)
    except Unknown as unknown:
        raise WorkError(f"{file}: {unknown}") from None
    except (Unfit, InputError, ValueError) as error:
        raise WorkError(f"{file}: not a task file: {error}") from None
    return LearnedTask(
        name=about["name"],
        labels=None if labels is None else tuple(labels),
        values={
            module: (tensors[f"values.{module}.lora_a"], tensors[f"values.{module}.lora_b"])
            for module in _modules(tensors)
        },
        router={name: tensor for name, tensor in tensors.items() if not name.startswith(("values.", "head."))},
        head=(tensors["head.weight"], tensors["head.bias"]) if "head.weight" in tensors else None,
        options=about["options"],
        origin=about.get("origin"),
    )


def _check_start(start: Any) -> None:
    """What a task's values began at: true where there was nothing to begin at."""
    if start is not True:
        fields(start, "options.warm_start", "task", "sha256")
        check(start["task"], "options.warm_start.task", TEXT)
        check(start["sha256"], "options.warm_start.sha256", DIGEST)


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that tensors have increments for, sorted."""
    return sorted({match["module"] for match in map(INCREMENT.fullmatch, tensors) if match})


def _check_tensors(tensors: Mapping[str, Tensor], labels: Sequence[str] | None) -> None:
    """Which tensors there are, and that their shapes, types and numbers fit each other."""
    modules = _modules(tensors)
    if not modules:
        raise Unfit("values", "expected increments of at least one module, got none")
    router = "dtkr" if "keys" in tensors else "features" if "factor" in tensors else "gaussian"
    names = [f"values.{module}.{half}" for module in modules for half in ("lora_a", "lora_b")]
    names += ROUTERS[router]
    names += [name for name in tensors if name == NEWER.get(router)]
    if "head.weight" in tensors or "head.bias" in tensors:
        names += ["head.weight", "head.bias"]
        if labels is None:
            raise Unfit("labels", "expected those of the head, got null")
    fields(tensors, "", *names)
    for name in names:
        check_numbers(name, tensors[name])

    first = tensors[names[0]]
    slots, rank = first.shape[:2] if first.dim() == 3 else (None, None)
    for module in modules:
        _check_shape(f"values.{module}.lora_a", tensors[f"values.{module}.lora_a"], S=slots, r=rank, I=None)
        _check_shape(f"values.{module}.lora_b", tensors[f"values.{module}.lora_b"], S=slots, r=rank, O=None)
    if "distance" in names:
        _check_shape("distance", tensors["distance"], percentiles=PERCENTILES)
    if router == "dtkr":
        _check_shape("keys", tensors["keys"], S=slots, D=None)
    else:
        means, width = _check_means(tensors, slots or 0)
        if router == "features":
            _check_features(tensors, means, width, labels)
        else:
            _check_shape("scatter", tensors["scatter"], triangle=width * (width + 1) // 2)
            place = torch.arange(width)
            if tensors["scatter"][place * width - place * (place - 1) // 2].amin() < 0:
                raise Unfit("scatter", "expected no negative number on the diagonal")
    if "head.weight" in tensors:
        _check_shape("head.weight", tensors["head.weight"], C=len(labels or ()), H=None)
        _check_shape("head.bias", tensors["head.bias"], C=len(labels or ()))


def _check_means(tensors: Mapping[str, Tensor], slots: int) -> tuple[int, int]:
    """M and D of a gaussian router's means [M, D]."""
    slot = tensors.get(MEAN_SLOT)
    means = slots if slot is None else _check_shape(MEAN_SLOT, slot, M=None)[0]
    if slot is not None and slot.unique_consecutive().tolist() != list(range(slots)):
        raise Unfit(MEAN_SLOT, f"expected each of 0..{slots - 1} in rising order")
    _check_shape("count", tensors["count"], M=means)
    _, width = _check_shape("mean", tensors["mean"], M=means, D=None)
    if tensors["count"].sum() < 1:
        raise Unfit("count", "expected at least one row, got none")
    return means, width


def _check_features(tensors: Mapping[str, Tensor], means: int, width: int, labels: Sequence[str] | None) -> None:
    """What the router over random features keeps beside counts and means."""
    rank, _ = _check_shape("factor", tensors["factor"], R=None, D=width)
    if rank > RANK:
        raise Unfit("factor", f"expected at most {RANK} rows, got {rank}")
    _check_shape("exponent", tensors["exponent"], D=width)
    _check_shape("diagonal", tensors["diagonal"], D=width)
    _check_shape("mean_label", tensors["mean_label"], M=means)
    if "constants" in tensors:
        _check_shape("constants", tensors["constants"], numbers=3)
        if tensors["constants"][2] <= 0:
            raise Unfit("constants", "expected a temperature above 0")
    if (tensors["mean_label"] >= max(1, len(labels or ()))).any():
        raise Unfit("mean_label", f"expected numbers of {len(labels or ())} labels, or -1")
    sample, mean = tensors["sample"], tensors["sample_mean"]
    if sample.dim() != 2 or mean.shape != sample.shape[:1] or not 0 < sample.shape[1] < width:
        raise Unfit("sample", f"expected [m, Q] for sample_mean [m], got {list(sample.shape)} for {list(mean.shape)}")
    if (mean >= means).any() or (tensors["count"][mean.long()] < 2).any():
        raise Unfit("sample_mean", "expected means of two rows or more")


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raise Unfit unless a task's tensor of this name holds numbers that it may hold."""
    dtype = torch.int8 if name in ("factor", "exponent") else torch.float32
    if tensor.dtype != dtype:
        wanted, got = (str(one).removeprefix("torch.") for one in (dtype, tensor.dtype))
        raise Unfit(name, f"expected {wanted}, got {got}")
    if not tensor.isfinite().all():
        raise Unfit(name, "holds a number that is not finite")
    least, most = next((least, most) for prefix, least, most in NUMBERS if name.startswith(prefix))
    if tensor.numel():
        lowest, highest = map(float, tensor.aminmax())
        if lowest < least or highest > most:
            raise Unfit(name, f"expected numbers from {least:g} to {most:g}, got {lowest:g} to {highest:g}")
    if name == "distance" and (tensor.diff() < 0).any():
        raise Unfit(name, "expected percentiles in rising order")


def check_learned(task: LearnedTask) -> None:
    """Raise WorkError unless a task that was just learned holds numbers that a store takes."""
    tensors = [(f"values.{name}", tensor) for name, pair in task.values.items() for tensor in pair]
    tensors += [("head.", tensor) for tensor in task.head or ()]
    try:
        for name, tensor in [*tensors, *task.router.items()]:
            check_numbers(name, tensor)
    except Unfit as error:
        raise WorkError(f"task {task.name!r}: {error}; lower learning_rate") from None


def check_scatter(task: LearnedTask, file: Path) -> None:
    """Raise WorkError unless a task's scatter is one, that is positive semi-definite. In time D^3."""
    scatter = task.router.get("scatter")
    if scatter is not None and not is_scatter(unpack(scatter)):
        raise WorkError(f"{file}: not a task file: scatter: expected a positive semi-definite matrix")


def _check_shape(name: str, tensor: Tensor, **sizes: int | None) -> tuple[int, ...]:
    """The shape of a tensor, if it has these sizes by name (None: any) and none of them is 0."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(sizes) and all(
        got > 0 and size in (None, got) for got, size in zip(shape, sizes.values(), strict=True)
    )
    if not fits:
        wanted = ", ".join(letter if size is None else str(size) for letter, size in sizes.items())
        raise Unfit(name, f"expected [{wanted}], got {list(shape)}")
    return shape


def check_fits(
    task: LearnedTask, shapes: Mapping[str, Any], config: Mapping[str, Any], *, file: Path | None = None
) -> None:
    """Raise WorkError unless a task fits the model that is to answer with it.

    Args:
        shapes: `layers`, name -> (in_features I, out_features O) of each linear layer that carries increments;
            `hidden`, H of an encoder-only backbone, whose tasks have heads, or None for one that writes; `query`, D.
        config: of the model; its `router` and `features` count.
        file: where the task was read from, for the message.
    """
    modules, width = shapes["layers"], shapes["hidden"]
    router = "features" if config["features"] else config["router"]
    try:
        for module in sorted(task.values.keys() ^ modules.keys()):
            raise Unfit(f"values.{module}", "missing" if module in modules else "the model has no such layer")
        slots, rank = next(iter(task.values.values()))[0].shape[:2]
        for module, (features_in, features_out) in modules.items():
            lora_a, lora_b = task.values[module]
            _check_shape(f"values.{module}.lora_a", lora_a, S=slots, r=rank, I=features_in)
            _check_shape(f"values.{module}.lora_b", lora_b, S=slots, r=rank, O=features_out)
        expected = set(ROUTERS[router])
        if task.router.keys() - {NEWER.get(router)} != expected:
            raise Unfit("router", f"expected {', '.join(sorted(expected))}, got {', '.join(sorted(task.router))}")
        if router == "dtkr":
            _check_shape("keys", task.router["keys"], S=slots, D=shapes["query"])
        else:
            _check_shape("mean", task.router["mean"], M=None, D=shapes["query"])
            if router == "features" and task.router["sample"].shape[1] != shapes["query"] - config["features"]:
                raise Unfit("sample", f"expected queries of {shapes['query'] - config['features']} numbers")
        if (task.head is None) != (width is None):
            raise Unfit("head", "missing" if task.head is None else "the model answers without one")
        if task.head is not None:
            _check_shape("head.weight", task.head[0], C=len(task.labels or ()), H=width)
    except Unfit as error:
        raise WorkError(f"{file or f'task {task.name!r}'}: does not fit the model: {error}") from None
