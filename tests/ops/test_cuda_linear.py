"""adapted_linear in CUDA: how launches divide the work, and the kernel's results, on the CPU (through cuda_on_host.h)
and on a GPU that has what it needs."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_on_host import ROOT, compile_for_host, no_extension, numbers, pointer

from slm_fast import ops
from slm_fast.layers import Adaptation, AdaptedLinear
from slm_fast.ops import Route, dispatch
from slm_fast.ops.adapted_linear import TILE, TILE_COLUMNS, TILE_PICKS, adapted_linear, samples_in, size_of

no_tiles = pytest.mark.skipif(
    not (torch.cuda.is_available() and dispatch.multiplies_tiles(0)), reason="no GPU of compute capability 9.0"
)

ENTRY = """
extern "C" int run(const int64_t* n, const void** in, const int64_t* ids, const float* weights, void* y) {
  cuda::FusedOnDevice on{};
  cuda::AdaptedLinear& op = on.call;
  op.samples = n[0], op.tokens = n[1], op.picks = n[2], op.slots = n[3], op.rank = n[4];
  op.features_in = n[5], op.features_out = n[6];
  op.x = in[0], op.weight = in[1], op.bias = in[2], op.lora_a = in[3], op.lora_b = in[4];
  op.slot_ids = ids, op.weights = weights, op.y = y;
  on.cut.width = static_cast<int>(n[7]), on.cut.run = n[8];
  on.cut.across = cuda::blocks_of(op.features_out, n[7]);
  on.cut.tiles = cuda::blocks_of(op.samples * op.tokens, 256) * on.cut.across;
  on.spans = static_cast<int>(cuda::fused_spans(op.tokens));
  on.x = {op.x, op.features_in, op.samples * op.tokens, 1, 128};
  on.weight = {op.weight, op.features_in, op.features_out, 1, n[7] / 2};
  on.a = {op.lora_a, op.features_in, op.rank, op.slots, op.rank};
  on.b = {op.lora_b, op.features_out, op.rank, op.slots, op.rank};
  return cuda::adapted_linear(on, nullptr);
}
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    source = (ROOT / "csrc/cuda/adapted_linear.cu").read_text()
    return compile_for_host(source, ENTRY, tmp_path_factory.mktemp("adapted_linear"))


@pytest.mark.parametrize(
    ("B", "T", "P", "K", "r", "I", "O", "width", "run", "has_bias"),
    [
        (1, 128, 1, 1, 1, 8, 8, 192, 1, True),
        (3, 130, 5, 4, 12, 136, 200, 192, 4, True),
        (2, 128, 5, 2, 8, 72, 264, 256, 2, False),
        (5, 70, 3, 2, 8, 392, 192, 192, 1, True),
        (9, 43, 3, 1, 24, 64, 520, 256, 2, True),
    ],
)
def test_the_kernels_code_equals_the_specification(on_host, B, T, P, K, r, I, O, width, run, has_bias):
    random = torch.Generator().manual_seed(0)
    shapes = ((B, T, I), (O, I), (O,), (P, r, I), (P, r, O))
    x, weight, bias, a, b = (torch.randn(shape, generator=random).bfloat16() for shape in shapes)
    ids, weights = torch.randint(-1, P + 1, (B, K), generator=random), torch.rand(B, K, generator=random)
    known = torch.where(ids < P, ids, -1)  # an ID without a slot adds nothing
    given = (x, weight, bias if has_bias else None, a, b)
    y = run_on_host(on_host, given, ids, weights, width, run)
    x, weight, bias, a, b = (None if t is None else t.double() for t in given)
    with ops.use_backend("reference"):
        expected = ops.multi_lora(x, a, b, known, weights, torch.nn.functional.linear(x, weight, bias))
    assert (y.double() - expected).norm() <= 1e-2 * expected.norm()


def run_on_host(on_host, given, ids, weights, width, run):
    (B, T, I), (P, r, O), K = given[0].shape, given[4].shape, ids.shape[1]
    y = torch.full((B, T, O), float("nan")).bfloat16()
    tensors = (ctypes.c_void_p * 5)(*(pointer(t) for t in given))
    sizes = numbers(B, T, K, P, r, I, O, width, run)
    assert on_host(sizes, tensors, pointer(ids), pointer(weights), pointer(y)) == 0
    return y


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b"])
def test_in_the_kernels_code_what_is_not_finite_stays_with_its_samples(on_host, name):
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (6, 80, 72), "weight": (264, 72), "lora_a": (4, 8, 72), "lora_b": (4, 8, 264)}
    call = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}
    ids = torch.tensor([[0, 1], [2, 0], [3, -1], [1, 0], [-1, -1], [0, 1]])
    weights = torch.rand(6, 2, generator=random)

    def results():
        given = call["x"], call["weight"], None, call["lora_a"], call["lora_b"]
        return run_on_host(on_host, given, ids, weights, 192, 2)

    clean = results()
    if name == "x":
        spoiled, call["x"][4] = [4], float("inf")
    else:
        spoiled, call[name][2:, 3, 5] = [1, 2], torch.tensor([float("nan"), float("inf")]).bfloat16()
    y = results()
    others = [sample for sample in range(6) if sample not in spoiled]
    assert torch.equal(y[others], clean[others])
    for sample in spoiled:
        assert not y[sample].isfinite().all()


@no_extension
@pytest.mark.parametrize("columns", [1, 16, 17, 48, 64, 65, 96])
@pytest.mark.parametrize(("features_in", "features_out"), [(8, 8), (768, 768), (4096, 11008), (1032, 4096)])
@pytest.mark.parametrize(("samples", "tokens"), [(1, 128), (8, 512), (33, 130), (5000, 64)])
def test_runs_of_tiles_cover_every_feature_of_every_token_once(columns, features_in, features_out, samples, tokens):
    from slm_fast import _C

    spans = samples_in(TILE, tokens)
    for processors in (2, 78, 132):
        found = _C.fused_cut(samples, tokens, columns // spans or 1, features_in, features_out, processors)
        spans_too, width, across, tiles, run, stages, shared = found
        assert spans_too == spans
        assert (across - 1) * width < features_out <= across * width
        assert tiles == across * -(-samples * tokens // 256)
        clusters = processors // 2
        assert (run - 1) * clusters < tiles <= run * clusters  # as even as whole tiles allow
        assert stages >= 2
        assert shared <= 227 << 10


@pytest.mark.parametrize("tokens", [1, 2, 43, 64, 80, 127, 128, 129, 192, 256, 300, 1000])
def test_the_most_samples_of_a_tile_is_what_counting_gives(tokens):
    tiles = [range(first, first + 128) for first in range(0, 128 * tokens, 128)]
    assert samples_in(TILE, tokens) == max(tile[-1] // tokens - tile[0] // tokens + 1 for tile in tiles)


def case(B, T, P, K, r, I, O, has_bias=True):
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (B, T, I), "weight": (O, I), "bias": (O,), "lora_a": (P, r, I), "lora_b": (P, r, O)}
    call = {name: torch.randn(shape, generator=random).bfloat16().cuda() for name, shape in shapes.items()}
    call["slot_ids"] = torch.randint(-1, P, (B, K), generator=random).cuda()
    call["weights"] = torch.rand(B, K, generator=random).cuda()
    return call if has_bias else call | {"bias": None}


def specified(call):
    with ops.use_backend("reference"):
        wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in call.items()}
        return adapted_linear(**wide)


@no_tiles
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 128, 1, 1, 1, 8, 8),
        (3, 130, 5, 4, 12, 136, 200),
        (7, 80, 20, 4, 8, 4096, 1000),
        (128, 64, 20, 4, 12, 768, 768),
        (9, 43, 5, 1, 24, 520, 3072),
        (8, 512, 20, 4, 16, 4096, 4096),
        (1, 1000, 3, 2, 48, 64, 264),
        (33, 16, 7, 1, 12, 72, 520),
    ],
)
def test_it_equals_the_specification_and_ignores_ids_that_are_no_slots(sizes, has_bias):
    call = case(*sizes, has_bias=has_bias)
    size = size_of(call["x"], call["weight"], call["lora_a"], call["slot_ids"])
    assert size == ("tiles" if samples_in(TILE, sizes[1]) == 1 else "packed")
    with ops.use_backend("cuda"):
        got = adapted_linear(**call)
        ids = call["slot_ids"]
        assert torch.equal(got, adapted_linear(**call | {"slot_ids": ids.where(ids >= 0, len(call["lora_a"]) + 3)}))
    expected = specified(call)
    assert (got.double() - expected).norm() <= 1e-2 * expected.norm()


@no_tiles
def test_a_slot_or_sample_that_is_not_finite_reaches_no_other_sample():
    call = case(6, 80, 4, 2, 8, 256, 512)
    call["slot_ids"] = torch.tensor([[0, 1], [2, 0], [3, -1], [1, 0], [-1, -1], [0, 1]]).cuda()
    with ops.use_backend("cuda"):
        clean = adapted_linear(**call)
        for name in ("lora_a", "lora_b"):
            call[name][2:] = float("nan")  # samples 1 and 2
        call["x"][4] = float("inf")
        y = adapted_linear(**call)
    same = [0, 3, 5]
    assert torch.equal(y[same], clean[same])
    assert not y[[1, 2, 4]].isfinite().any()


@no_tiles
def test_sizes_that_it_does_not_take_are_an_error_or_another_kernels():
    call = case(2, 16, 4, 4, 12, 64, 64)  # 8 samples a tile, 384 rank columns
    assert size_of(call["x"], call["weight"], call["lora_a"], call["slot_ids"]) == "narrow"
    assert samples_in(TILE, 16) * 4 * 12 > TILE_COLUMNS
    assert samples_in(TILE, 16) * 4 <= TILE_PICKS
    with pytest.raises(Exception, match="x: expected features in eights"):
        torch.ops.slm_fast.adapted_linear_cuda(*call.values())
    empty = case(2, 128, 4, 4, 12, 64, 64)
    empty["x"], empty["slot_ids"], empty["weights"] = (empty[n][:0] for n in ("x", "slot_ids", "weights"))
    assert torch.ops.slm_fast.adapted_linear_cuda(*empty.values()).shape == (0, 128, 64)


@no_tiles
def test_a_layer_uses_it_where_it_was_measured_to_win(monkeypatch):
    call = case(3, 128, 4, 2, 8, 64, 128)
    layer = AdaptedLinear(torch.nn.Linear(64, 128, device="cuda", dtype=torch.bfloat16), "layer", Adaptation())
    passed = []
    layer.base.register_forward_hook(lambda *_: passed.append(True))

    def run():
        passed.clear()
        values, route = {"layer": (call["lora_a"], call["lora_b"])}, Route(call["slot_ids"], call["weights"])
        with layer.adaptation.using(values, route), torch.no_grad():
            return layer(call["x"])

    monkeypatch.setattr(dispatch, "MEASURED", {("cuda", "adapted_linear", "tiles"): ("cuda", "reference")})
    expected = run()
    assert passed  # its hook needs the base layer to be called
    layer.base._forward_hooks.clear()
    assert (run() - expected).norm() <= 1e-2 * expected.norm()
    assert not passed
