"""A model of no known family: where its layers and their linear layers are, found by a small pass.

They are adapted only if that pass shows that it is safe: each layer runs once, in order, on hidden states [B, T, H],
and a row's result is the same alone and padded beside another one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slm_fast.errors import InputError, one_line, warn
from slm_fast.families import Family
from slm_fast.layers import AdaptedLinear

LENGTHS, ANSWER = (9, 4), 3  # tokens of the two rows, and of a decoder's input
ALIKE = 0.02  # maximum change by padding, relative to a row's largest value (five times as much in 16 bits)

ADVICE = "use a model of the table (docs/families.md)"

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # shapes of a module's input and output


def find_family(model: Any, kind: str, auto_class: str) -> Family:
    """The family of a model, found by its structure, with a warning that says what is adapted.

    Args:
        model: an encoder without its head, or a whole model that generates text.
        kind, auto_class: as for `Family`.

    Raises:
        InputError: its layers cannot be identified, or padding changes a row's result.
    """
    model_type = model.config.model_type
    where = f"backbone: model type {model_type!r} is not in the table of families"
    seen: dict[str, list[Shapes]] = {}
    try:
        with torch.inference_mode():
            alone = [_pass(model, kind, (length,))[0] for length in LENGTHS]
            with _watching(model, seen):
                padded = [_pass(model, kind, LENGTHS)]
            padded += [_pass(model, kind, LENGTHS, left=True)] if kind == "causal" else []
        roots = [model.get_encoder(), model.get_decoder()] if kind == "seq2seq" else [model]
    except Exception as error:
        raise InputError(f"{where}, and a pass of a small batch fails: {one_line(error)}; {ADVICE}") from None
    stacks = [_stack(model, root, seen) for root in roots]
    found = [stack for stack in stacks if stack is not None]
    if len(found) < len(stacks):
        raise InputError(f"{where}, and its layers do not each run once and in order on the batch's tokens; {ADVICE}")
    limit = ALIKE if model.dtype == torch.float32 else 5 * ALIKE
    for i, row in enumerate(alone):
        for left, hidden in enumerate(padded):
            one = hidden[i, -len(row) :] if left else hidden[i, : len(row)]
            if not (one - row).abs().max() <= limit * row.abs().max():
                raise InputError(f"{where}, and padding changes a row's output; {ADVICE}")
    words, others = _words(model, found, seen)
    if not words:
        raise InputError(f"{where}, and its layers have no linear layers with inputs [B, T, I]; {ADVICE}")
    warn(
        f"{where}. By its structure these linear layers of {' and '.join(found)} are adapted: {', '.join(words)}"
        + (f" (and these are not: {', '.join(others)})" if others else "")
        + ("" if kind == "encoder" else "; answers are written by transformers' generate")
    )
    linears = {word: re.escape(word) for word in words}
    upper = found[1] if kind == "seq2seq" else None
    return Family(kind, (model_type,), auto_class, found[0], linears, upper, loop=False, found=True)


def _pass(model: Any, kind: str, lengths: tuple[int, ...], *, left: bool = False) -> Tensor:
    """Last hidden states [B, T, H] float32 (of an encoder-decoder, the encoder's) of rows of these lengths, padded on
    the right or left."""
    device, rows = model.device, len(model.get_input_embeddings().weight)
    special = {getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls")}
    plain = torch.tensor([token for token in range(min(rows, 200)) if token not in special], device=device)
    place = torch.arange(max(lengths), device=device)
    length = torch.tensor([[length] for length in lengths], device=device)
    at = place - (max(lengths) - length) if left else place.expand(len(lengths), -1)
    mask = ((at >= 0) & (at < length)).long()
    # A row's tokens depend on its own length alone, so that they are the same alone and beside another row.
    ids = plain[(at.clamp(min=0) * 7 + length * 13) % len(plain)]
    ids = ids.masked_fill(mask == 0, getattr(model.config, "pad_token_id", None) or 0)
    options: dict[str, Any] = {}
    trunk = model.base_model if kind == "causal" else model
    if left and "position_ids" in inspect.signature(trunk.forward).parameters:
        options["position_ids"] = at.clamp(min=0)
    if kind == "seq2seq":
        options["decoder_input_ids"] = plain[:ANSWER].expand(len(lengths), -1)
    if kind != "encoder":
        options["use_cache"] = False
    out = trunk(input_ids=ids, attention_mask=mask, **options)
    hidden: Tensor = out.encoder_last_hidden_state if kind == "seq2seq" else out.last_hidden_state
    return hidden.float()


@contextmanager
def _watching(model: nn.Module, seen: dict[str, list[Shapes]]) -> Iterator[None]:
    """Record, by name, the shapes that pass each module inside the block, in the order in which the calls end."""

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if _is_linear(module) and (len(args) != 1 or kwargs):  # an adapted layer takes its input alone
                given = None
            output = output[0] if isinstance(output, tuple) else output
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in (given, output)]
            seen.setdefault(name, []).append((shapes[0], shapes[1]))

        return note

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stack(model: Any, root: nn.Module, seen: dict[str, list[Shapes]]) -> str | None:
    """Name of the only list below `root` whose layers pass hidden states from each to the next."""
    names = {module: name for name, module in model.named_modules()}
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module)]
    inner = {below for module in lists for below in module.modules() if below is not module}
    order = list(seen)
    found = []
    for module in lists:
        layers = [f"{names[module]}.{i}" for i in range(len(module))]
        shapes = [shape for layer in layers for one in seen.get(layer, [((), ())]) for shape in one]
        if module in inner or {shape[:1] for shape in shapes} != {(len(LENGTHS),)} or len(set(shapes)) != 1:
            continue
        once = all(len(seen[layer]) == 1 for layer in layers)
        lengths = max(LENGTHS), ANSWER  # some models pad the tokens further, which their layers must not see
        states = shapes[0][1:] in [(length, getattr(model.config, "hidden_size", None)) for length in lengths]
        if once and states and sorted(layers, key=order.index) == layers:
            found.append(names[module])
    return found[0] if len(found) == 1 else None


def _words(model: nn.Module, stacks: list[str], seen: dict[str, list[Shapes]]) -> tuple[list[str], list[str]]:
    """Names, inside a layer, of the linear layers that can be adapted, and of those that cannot: one of them has an
    input other than [B, T, I], or the highest layer has none."""
    outer = re.compile("|".join(rf"{re.escape(stack)}\.(?P<layer{i}>\d+)\." for i, stack in enumerate(stacks)))
    highest = [f"{stack}.{len(model.get_submodule(stack)) - 1}." for stack in stacks]  # type: ignore[arg-type]
    found: dict[str, bool] = {}
    there = set()
    for name, module in model.named_modules():
        at = outer.match(name)
        if at is None or not _is_linear(module) or name.endswith(".base") or ".base." in name:
            continue
        word, calls = name[at.end() :], seen.get(name, [])
        safe = all(x[:1] == y[:1] == (len(LENGTHS),) and len(x) == len(y) == 3 for x, y in calls)
        found[word] = found.get(word, True) and safe and bool(calls)
        if at.group() in highest:
            there.add(word)
    words = [word for word, safe in found.items() if safe and word in there]
    return words, sorted(found.keys() - set(words))


def _is_linear(module: nn.Module) -> bool:
    sizes = (("in_features", "out_features"), ("nx", "nf"))
    return isinstance(module, AdaptedLinear) or any(hasattr(module, a) and hasattr(module, b) for a, b in sizes)
