"""The tensors of a task's file: their names, and checks that their shapes, dtypes and values are consistent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from slm_fast.covariance import PERCENTILES
from slm_fast.fields import Unfit, fields
from slm_fast.ops.sum_scatters import EXPONENTS, MOST_DIAGONAL, RANK
from slm_fast.tasks import Adapter

POOLINGS = ("first", "last", "mean")  # hidden state that a head reads
ACTIVATIONS = ("tanh", "relu", "gelu", "tanh_norm", "relu_norm", "gelu_norm")  # of a dense layer below the head
INCREMENT = re.compile(r"values\.(?P<module>.+)\.lora_[ab]")
# Tensors that a router keeps of a task: a gaussian one without and with random features, and a dtkr one.
ROUTERS = {
    "gaussian": ("count", "mean", "scatter", "distance"),
    "features": (
        *("count", "mean", "mean_slot", "mean_label", "factor", "exponent", "diagonal"),
        *("sample", "sample_mean"),
    ),
    "dtkr": ("keys", "distance"),
}
# Tensors that older files lack: from before there was a mean for each label, and before constants were stored.
MEAN_SLOT = "mean_slot"
NEWER = {"gaussian": MEAN_SLOT, "features": "constants"}
# Allowed values of a task. Learned ones are far smaller; larger ones would go unnoticed until answers are NaN. The sum
# of all tasks' scatters has room for 128 of the largest.
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
    ("diagonal", 0, int(MOST_DIAGONAL)),
    ("sample_mean", 0, 2**20),
    ("sample", -1e8, 1e8),
    ("keys", -1e8, 1e8),
    ("scatter", -(2**45), 2**45),
    ("distance", -1e-3, 1e30),
)


def modules_of(tensors: Iterable[str]) -> list[str]:
    """Names of the modules with increments among these tensors, sorted."""
    return sorted({match["module"] for match in map(INCREMENT.fullmatch, tensors) if match})


def check_tensors(tensors: Mapping[str, Tensor], labels: Sequence[str] | None, adapter: Adapter | None = None) -> None:
    """Check names, shapes, dtypes and values of a task's tensors. adapter: of imported tasks. Raises Unfit."""
    modules = modules_of(tensors)
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
    dense = [name for name in ("head.dense.weight", "head.dense.bias") if adapter and name in tensors]
    if dense and "head.weight" not in names:
        raise Unfit(dense[0], "goes with a head, and there is none")
    if dense:
        names += ["head.dense.weight", "head.dense.bias"]
    if adapter and (adapter.pooling is None) == ("head.weight" in names):
        raise Unfit("adapter.pooling", "expected one of a head's" if adapter.pooling is None else "goes with a head")
    fields(tensors, "", *names)
    for name in names:
        check_numbers(name, tensors[name])

    first = tensors[names[0]]
    slots, rank = first.shape[:2] if first.dim() == 3 else (None, None)
    for module in modules:
        if adapter:  # each module has its own rank
            slots, rank = 1, tensors[f"values.{module}.lora_a"].shape[1:2].numel() or None
        check_shape(f"values.{module}.lora_a", tensors[f"values.{module}.lora_a"], S=slots, r=rank, I=None)
        check_shape(f"values.{module}.lora_b", tensors[f"values.{module}.lora_b"], S=slots, r=rank, O=None)
    if "distance" in names:
        check_shape("distance", tensors["distance"], percentiles=PERCENTILES)
    if router == "dtkr":
        check_shape("keys", tensors["keys"], S=slots, D=None)
    else:
        means, width = _check_means(tensors, slots or 0)
        if router == "features":
            _check_features(tensors, means, width, labels)
        else:
            check_shape("scatter", tensors["scatter"], triangle=width * (width + 1) // 2)
            place = torch.arange(width)
            if tensors["scatter"][place * width - place * (place - 1) // 2].amin() < 0:
                raise Unfit("scatter", "expected no negative number on the diagonal")
    if "head.weight" in tensors:
        check_shape("head.weight", tensors["head.weight"], C=len(labels or ()), H=None)
        check_shape("head.bias", tensors["head.bias"], C=len(labels or ()))
    if dense:
        width = tensors["head.weight"].shape[1]
        check_shape("head.dense.weight", tensors["head.dense.weight"], H=width, I=width)
        check_shape("head.dense.bias", tensors["head.dense.bias"], H=width)


def _check_means(tensors: Mapping[str, Tensor], slots: int) -> tuple[int, int]:
    """M and D of a gaussian router's means [M, D]."""
    slot = tensors.get(MEAN_SLOT)
    means = slots if slot is None else check_shape(MEAN_SLOT, slot, M=None)[0]
    if slot is not None and slot.unique_consecutive().tolist() != list(range(slots)):
        raise Unfit(MEAN_SLOT, f"expected each of 0..{slots - 1} in rising order")
    check_shape("count", tensors["count"], M=means)
    _, width = check_shape("mean", tensors["mean"], M=means, D=None)
    if tensors["count"].sum() < 1:
        raise Unfit("count", "expected at least one row, got none")
    return means, width


def _check_features(tensors: Mapping[str, Tensor], means: int, width: int, labels: Sequence[str] | None) -> None:
    """Check what the router over random features keeps besides counts and means."""
    rank, _ = check_shape("factor", tensors["factor"], R=None, D=width)
    if rank > RANK:
        raise Unfit("factor", f"expected at most {RANK} rows, got {rank}")
    check_shape("exponent", tensors["exponent"], D=width)
    check_shape("diagonal", tensors["diagonal"], D=width)
    check_shape("mean_label", tensors["mean_label"], M=means)
    if "constants" in tensors:
        check_shape("constants", tensors["constants"], numbers=3 if tensors["constants"].shape == (3,) else 4)
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
    """Raise Unfit unless a tensor's values are allowed for a task's tensor of this name."""
    dtype = torch.int8 if name in ("factor", "exponent") else torch.float32
    if tensor.dtype != dtype:
        wanted, got = (str(one).removeprefix("torch.") for one in (dtype, tensor.dtype))
        raise Unfit(name, f"expected {wanted}, got {got}")
    least, most = next((least, most) for prefix, least, most in NUMBERS if name.startswith(prefix))
    if tensor.numel():
        lowest, highest = map(float, tensor.aminmax())  # both are NaN if any number is
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise Unfit(name, "holds a number that is not finite")
        if lowest < least or highest > most:
            raise Unfit(name, f"expected numbers from {least:g} to {most:g}, got {lowest:g} to {highest:g}")
    if name == "distance" and (tensor.diff() < 0).any():
        raise Unfit(name, "expected percentiles in rising order")


def check_shape(name: str, tensor: Tensor, **sizes: int | None) -> tuple[int, ...]:
    """The shape of a tensor. Raises Unfit unless it has these sizes, given by name (None: any but 0)."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(sizes) and all(
        got > 0 and size in (None, got) for got, size in zip(shape, sizes.values(), strict=True)
    )
    if not fits:
        wanted = ", ".join(letter if size is None else str(size) for letter, size in sizes.items())
        raise Unfit(name, f"expected [{wanted}], got {list(shape)}")
    return shape
