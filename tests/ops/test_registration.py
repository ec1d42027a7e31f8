"""Every registered operator is well formed, and all backends of an operator have compatible schemas."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops
from slm_fast.ops import dispatch
from slm_fast.ops.registration import DEFINITIONS, gradient_source

NAMES = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slm_fast::"))


def parts_of(name: str) -> tuple[str, str]:
    """slm_fast::key_loss_native_backward -> key_loss_backward, native; multi_lora_native_ -> multi_lora_, native."""
    for backend in (b.name for b in dispatch.BACKENDS):
        stem, found, end = name.removeprefix("slm_fast::").partition(f"_{backend}")
        if found and end in ("", "_", "_backward"):
            return stem + end, backend
    return name, ""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(tokens, I, O):
    """(x, lora_a, lora_b, slot_ids, weights, base) for 3 samples, each with 2 of 4 slots."""
    ids, weights = torch.tensor([[0, 3], [1, -1], [3, 3]]), torch.rand(3, 2)
    return normal(3, tokens, I), normal(4, 3, I), normal(4, 3, O), ids, weights, normal(3, tokens, O)


def learning(*values):
    """The values, with each floating-point tensor as a leaf that requires a gradient."""
    return tuple(v if v is None or not v.is_floating_point() else v.clone().requires_grad_() for v in values)


def multi_lora(backend):
    for tokens, I, O in ((1, 16, 24), (5, 13, 11))[: 1 if backend == "cuda" else 2]:
        *call, base = lora(tokens, I, O)
        yield learning(*call, base)
        yield learning(*call, None)
        yield (*call, base)


def multi_lora_(backend):
    if backend != "cuda":
        yield lora(5, 13, 11)
    yield lora(1, 16, 24)


def multi_lora_backward(backend):
    *call, base = lora(5, 13, 11)
    for needed in ([True] * 4, [False, True, False, True]):
        yield base, *call, needed


def adapted_linear(backend):
    native = backend == "native"
    if native and not dispatch.has_amx():
        return
    I, O, dtype = (32, 64, torch.bfloat16) if native else (13, 11, torch.float32)
    x, lora_a, lora_b, *route, _ = lora(5, I, O)
    for bias in (normal(O, seed=2).to(dtype), None):
        yield x.to(dtype), normal(O, I, seed=1).to(dtype), bias, lora_a.to(dtype), lora_b.to(dtype), *route


def retrieve(backend):
    query, keys, mask = (
        normal(3, 8),
        normal(5, 8, seed=1),
        torch.tensor([[True, False, True, True, False]]).expand(3, 5),
    )
    yield query, keys, 7, 2, None, mask, "cosine", "mean", "ratio", 1.0
    yield query, keys, 7, 1, keys[:, 0], mask[0], "dot", "mean", "softmax", 1.0
    if backend != "cuda":
        yield query, keys, 2, 2, None, mask, "cosine", "vote", "ratio", 1.0
    if backend == "native":
        prepared = torch.ops.slm_fast.prepare_keys_native(keys, 2)
        yield query, keys, 2, 2, None, None, "cosine", "mean", "ratio", 1.0, prepared
    own = (None,) * (backend == "native") + (torch.tensor([0, 0, 1, 3, 3]),)
    if backend in ("native", "reference"):
        yield query, keys, 2, 2, None, mask[:, 1:], "cosine", "mean", "ratio", 1.0, *own


def prepare_keys(backend):
    yield normal(5, 8), 2


def key_loss(backend):
    for k, mask_prob in ((2, 0.3), (7, 1.0)):
        yield normal(3, 8), normal(5, 8, seed=1).requires_grad_(), k, 2, mask_prob, -4


def key_loss_backward(backend):
    yield torch.tensor(0.5), normal(3, 8), normal(5, 8, seed=1), torch.tensor([[[0, 4], [1, -1]]] * 3)


def invariant_linear(backend):
    yield normal(3, 8).double(), normal(5, 8, seed=1).double()


def sum_scatters(backend):
    int8, diagonal = torch.ones(5, 8, dtype=torch.int8), normal(2, 8)
    yield int8, torch.tensor([2, 3]), int8[:2], diagonal


CASES = {
    "adapted_linear": adapted_linear,
    "invariant_linear": invariant_linear,
    "key_loss": key_loss,
    "key_loss_backward": key_loss_backward,
    "multi_lora": multi_lora,
    "multi_lora_": multi_lora_,
    "multi_lora_backward": multi_lora_backward,
    "prepare_keys": prepare_keys,
    "retrieve": retrieve,
    "sum_scatters": sum_scatters,
}


@pytest.mark.parametrize("name", NAMES)
def test_each_registered_operator_is_well_formed(name):
    stem, backend = parts_of(name)
    assert stem in CASES, f"{name} has no case here"
    device = "cuda" if torch.cuda.is_available() and backend in ("cuda", "triton") else "cpu"
    op = getattr(torch.ops.slm_fast, name.removeprefix("slm_fast::"))
    for call in CASES[stem](backend):
        moved = [
            v.detach().to(device).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for v in call
        ]
        results = torch.library.opcheck(op, tuple(moved))
        assert set(results.values()) == {"SUCCESS"}, results


def test_what_is_registered_is_what_the_backends_present_serve():
    expected = set()
    for backend in (b for b in dispatch.BACKENDS if b.available):
        for stem, definition in DEFINITIONS.items():
            if backend.has(stem):
                expected.add(f"slm_fast::{stem}_{backend.name}")
                if definition.gradient and gradient_source(stem, backend) == backend.name:
                    expected.add(f"slm_fast::{stem}_{backend.name}_backward")
        if backend.in_place:
            expected.add(f"slm_fast::multi_lora_{backend.name}_")
        if backend.prepares_keys:
            expected.add(f"slm_fast::prepare_keys_{backend.name}")
    assert {"slm_fast::retrieve_reference", "slm_fast::multi_lora_reference_backward"} <= expected
    assert set(NAMES) == expected


def typed(arguments):
    return [(argument.name, str(argument.type)) for argument in arguments]


@pytest.mark.parametrize("stem", DEFINITIONS)
def test_all_backends_of_an_operator_have_its_schema_and_at_most_defaults_more(stem):
    gradient = DEFINITIONS[stem].gradient
    for end, schema in (("", DEFINITIONS[stem].schema), ("_backward", gradient and gradient.schema)):
        for backend in (b for b in ops.backends() if b.available and b.has(stem)):
            op = getattr(torch.ops.slm_fast, f"{stem}_{backend.name}{end}", None)
            if schema is None or op is None:
                continue
            expected, got = torch._C.parse_schema(f"slm_fast::{stem}{schema}"), op.default._schema
            known = len(expected.arguments)
            assert typed(got.arguments[:known]) == typed(expected.arguments)
            assert all(a.has_default_value() for a in got.arguments[known:])
            assert typed(got.returns) == typed(expected.returns)


def test_a_backend_of_some_sizes_goes_back_by_the_next_that_serves_them_all(monkeypatch):
    cuda = next(b for b in dispatch.BACKENDS if b.name == "cuda")
    monkeypatch.setattr(dispatch, "CUDA_MISSING", None)
    for missing, expected in ((None, "triton"), ("triton is not installed", "reference")):
        monkeypatch.setattr(dispatch, "TRITON_MISSING", missing)
        assert gradient_source("multi_lora", cuda) == expected
    for backend in (b for b in dispatch.BACKENDS if b.available and "multi_lora" in b.operators):
        assert gradient_source("multi_lora", backend) == backend.name
