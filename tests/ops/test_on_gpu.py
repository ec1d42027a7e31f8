"""GPU only: CUDA graphs of the operators replay on new inputs, no operator synchronises with the device, and offsets
beyond 32 bits are right."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops
from slm_fast.ops import dispatch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.TRITON_MISSING is not None, reason="no GPU, or no Triton"
)


def lora(B, T, P, K, r, I, O, dtype=torch.bfloat16):
    """multi_lora arguments, uninitialised, and a function that fills them with random values."""
    x, a, b, base = (torch.empty(s, dtype=dtype, device="cuda") for s in ((B, T, I), (P, r, I), (P, r, O), (B, T, O)))
    ids, weights = torch.empty(B, K, dtype=torch.int64, device="cuda"), torch.empty(B, K, device="cuda")

    def fill():
        for tensor in (x, a, b, base):
            tensor.normal_()
        ids.random_(-1, P)
        weights.uniform_()

    return fill, (x, a, b, ids, weights, base)


def adapted(B, T, P, K, r, I, O):
    """The same for adapted_linear."""
    fill, (x, a, b, ids, weights, _) = lora(B, T, P, K, r, I, O)
    weight, bias = torch.empty(O, I, dtype=x.dtype, device="cuda"), torch.empty(O, dtype=x.dtype, device="cuda")

    def fill_all():
        fill()
        weight.normal_()
        bias.normal_()

    return fill_all, (x, weight, bias, a, b, ids, weights)


def search(B, P, D, k, groups, aggregate="mean"):
    query, keys = torch.empty(B, D, device="cuda"), torch.empty(P, D, device="cuda")

    def fill():
        query.normal_()
        keys.normal_()

    return fill, (query, keys, k, groups, None, None, "cosine", aggregate, "ratio", 1.0)


def key_loss(B, P, D, k, groups):
    fill, (query, keys, *_) = search(B, P, D, k, groups)
    return fill, (query, keys, k, groups, 0.2, 5)


def calls():
    """Test parameters (make, sizes, op) for every operator of every backend that has kernels."""
    shapes = {
        "multi_lora_triton": [(3, 1, 5, 2, 8, 64, 72), (33, 1, 4, 2, 8, 64, 72), (2, 70, 5, 4, 12, 128, 200)],
        "multi_lora_cuda": [(3, 1, 5, 2, 8, 4096, 1032), (300, 1, 5, 2, 8, 64, 72), (2, 70, 5, 4, 12, 128, 200)],
        "retrieve_triton": [(33, 5000, 96, 4, 3), (2, 7, 96, 4, 3), (33, 700, 96, 4, 3, "vote")],
        "retrieve_cuda": [(33, 5000, 96, 4, 3), (2, 7, 96, 4, 3)],
        "key_loss_triton": [(9, 700, 96, 4, 3)],
        "adapted_linear_triton": [(2, 70, 5, 4, 12, 128, 200)],
        "adapted_linear_cuda": [(2, 70, 5, 2, 8, 128, 200), (3, 256, 5, 4, 12, 512, 1032)],
    }
    make = {"multi_lora": lora, "retrieve": search, "key_loss": key_loss, "adapted_linear": adapted}
    for name, sizes in shapes.items():
        stem, _, backend = name.rpartition("_")
        if name == "adapted_linear_cuda" and not (torch.cuda.is_available() and dispatch.multiplies_tiles(0)):
            continue
        if (dispatch.TRITON_MISSING if backend == "triton" else dispatch.CUDA_MISSING) is None:
            for size in sizes:
                yield pytest.param(make[stem], size, getattr(torch.ops.slm_fast, name), id=f"{name}-{size}")


def results(call, arguments):
    result = call(*arguments)
    return [t.clone() for t in ((result,) if isinstance(result, torch.Tensor) else result)]


def assert_a_graph_replays(fill, call):
    """A captured graph replayed on new inputs gives the same bits as a call, and the call never synchronises."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fill()
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
        for _ in range(3):
            fill()
            graph.replay()
            torch.cuda.set_sync_debug_mode("error")
            try:
                expected = call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize(("make", "sizes", "op"), calls())
def test_a_captured_call_replays_on_new_inputs_and_does_not_wait(make, sizes, op):
    fill, arguments = make(*sizes)
    with torch.no_grad():
        assert_a_graph_replays(fill, lambda: results(op, arguments))


@pytest.mark.parametrize(("make", "sizes", "op"), calls())
def test_the_operator_is_well_formed(make, sizes, op):
    fill, arguments = make(*sizes)
    fill()
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("make", "sizes", "op"), calls())
def test_numbers_on_odd_addresses_give_the_same_result(make, sizes, op):
    fill, arguments = make(*sizes)
    fill()

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        place = value.new_empty(value.numel() + 1)[1:].view(value.shape)
        assert place.data_ptr() % 16 != 0
        return place.copy_(value)

    expected = results(op, arguments)
    got = results(op, tuple(moved(value) for value in arguments))
    for a, b in zip(got, expected, strict=True):  # unaligned loads may sum in another order
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_captured_gradients_replay_on_new_inputs(backend):
    if backend == "cuda" and dispatch.CUDA_MISSING is not None:
        pytest.skip(dispatch.CUDA_MISSING)
    fill, (x, a, b, ids, weights, base) = lora(8, 1 if backend == "cuda" else 20, 5, 3, 8, 64, 72)
    leaves = [x, a, b, weights, base]

    def call():
        wanted = [leaf.detach().requires_grad_() for leaf in leaves]
        y = getattr(torch.ops.slm_fast, f"multi_lora_{backend}")(*wanted[:3], ids, *wanted[3:])
        return torch.autograd.grad(y, wanted, base)

    assert_a_graph_replays(fill, call)


def enough_memory():
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 24 << 30


@pytest.mark.skipif(not enough_memory(), reason="takes 12 GB of a GPU's memory")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_numbers_beyond_the_reach_of_32_bits_are_found(backend):
    if backend == "cuda" and dispatch.CUDA_MISSING is not None:
        pytest.skip(dispatch.CUDA_MISSING)
    # More than 2^31 elements in x: one sample of many tokens, or many samples of one token.
    B, T, I = (1, 600_000, 4096) if backend == "triton" else (60_000, 1, 40_000)
    fill, (_, a, b, *_) = lora(1, 1, 2, 1, 2, I, 8)
    fill()
    x = torch.zeros(B, T, I, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = torch.randn(I, device="cuda")
    ids, weights = torch.ones(B, 1, dtype=torch.int64, device="cuda"), torch.ones(B, 1, device="cuda")
    with ops.use_backend(backend):
        y = ops.multi_lora(x, a, b, ids, weights)
    with ops.use_backend("reference"):
        expected = ops.multi_lora(x[-1:, -1:].double(), a.double(), b.double(), ids[-1:], weights[-1:])
    assert (y[-1:, -1:].double() - expected).norm() <= 2e-2 * expected.norm()
    assert y.count_nonzero() <= 8
