"""The CUDA operators: how launches cut the work and what the kernels' code computes, anywhere (cuda_on_host.h runs it
on a CPU); their results, where there is a GPU. There the operator tests of this folder run on them too, as "preferred".
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_host import ROOT, compile_for_host

from slm_fast import ops
from slm_fast.ops import dispatch
from slm_fast.ops.multi_lora import multi_lora_

no_extension = pytest.mark.skipif(dispatch.NATIVE_MISSING is not None, reason=str(dispatch.NATIVE_MISSING))
no_gpu = pytest.mark.skipif(
    dispatch.CUDA_MISSING is not None or not torch.cuda.is_available(), reason=dispatch.CUDA_MISSING or "no GPU"
)


@no_extension
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 256, 65535])
@pytest.mark.parametrize(("features_in", "features_out"), [(8, 8), (768, 768), (4096, 11008), (1032, 4096), (520, 24)])
def test_decode_blocks_share_out_every_feature_once_in_whole_pieces(rows, features_in, features_out):
    from slm_fast import _C

    for processors in (1, 108, 132):
        spans_in, spans_out = _C.decode_cut(rows, features_in, features_out, processors)
        assert len(spans_in) == len(spans_out) in (1, 2, 4, 8)  # a cluster on any card
        assert len(spans_in) == 1 or rows * len(spans_in) < 4 * processors
        for spans, features in ((spans_in, features_in), (spans_out, features_out)):
            covered = [feature for begin, end in spans for feature in range(begin, end)]
            assert covered == list(range(features))
            assert all(begin % 8 == 0 for begin, _ in spans)


@no_extension
def test_decode_uses_the_whole_card_for_few_rows_and_one_block_a_row_for_many():
    from slm_fast import _C

    assert [len(_C.decode_cut(rows, 4096, 4096, 132)[0]) for rows in (1, 32, 64, 256, 512)] == [8, 8, 8, 2, 1]


@no_extension
@pytest.mark.parametrize("rank", [1, 16, 17, 32, 48, 64])
@pytest.mark.parametrize(("features_in", "features_out"), [(8, 8), (768, 768), (4096, 11008), (1032, 4096), (520, 24)])
def test_blocks_of_many_tokens_share_out_every_feature_once_and_fit_any_card(rank, features_in, features_out):
    from slm_fast import _C

    for processors, shared in ((132, 227 << 10), (84, 99 << 10)):
        for samples, tokens in ((1, 2), (64, 24), (8, 512), (256, 128), (5000, 33)):
            cut = _C.token_cut(samples, tokens, rank, features_in, features_out, processors, shared)
            tile, spans_in, spans_out, bytes_ = cut
            assert tile == (32 if tokens <= 32 else tile) in (32, 64)
            assert bytes_ <= shared
            assert len(spans_in) == len(spans_out) <= 2
            for spans, features in ((spans_in, features_in), (spans_out, features_out)):
                covered = [feature for begin, end in spans for feature in range(begin, end)]
                assert covered == list(range(-(-features // 64) * 64))  # whole tiles


@no_extension
def test_few_tokens_are_cut_small_so_that_all_multiprocessors_have_two_blocks():
    from slm_fast import _C

    shapes = ((8, 512, 32, 4096), (64, 24, 48, 768), (32, 512, 48, 1024), (256, 128, 48, 768), (52, 70, 16, 4096))
    cuts = [_C.token_cut(b, t, r, h, h, 132, 227 << 10) for b, t, r, h in shapes]
    assert [(tile, len(spans)) for tile, spans, _, _ in cuts] == [(32, 2), (32, 2), (64, 1), (64, 1), (32, 2)]


CARDS = [(1, 227 << 10), (108, 163 << 10), (132, 227 << 10), (84, 99 << 10)]  # multiprocessors, shared bytes a block


@no_extension
@pytest.mark.parametrize("slots", [0, 1, 15, 16, 17, 512, 4096, 9000, 100_000, 2_000_003, 2**31])
@pytest.mark.parametrize("queries", [1, 8, 9, 32, 256, 4097])
def test_retrieve_parts_cover_every_query_and_slot_once(queries, slots):
    from slm_fast import _C

    for processors, memory in CARDS:
        for whole, width, groups in ((True, 768, 6), (False, 15, 3), (True, 40_000, 1)):
            cut = _C.retrieve_cut(queries, slots, width, groups, 4, whole, processors, memory)
            few, tile, parts, span, slab, shared, warps = cut
            assert tile in ((8, 16, 32) if whole else (8,))
            assert (parts - 1) * span < slots <= parts * span
            assert span % (16 if few else 128) == 0
            assert 0 < -(-min(slab, queries) // tile) <= 65535
            assert few or (slab == queries and parts <= max(processors, 4 * processors // -(-queries // tile) + 1))
            assert not few or min(slab, queries) * slots <= max(2**26, tile * slots)
            assert shared <= memory
            assert 1 <= warps <= 32


@no_extension
def test_retrieve_gives_every_multiprocessor_a_block_before_a_block_gets_more_queries_or_keys():
    from slm_fast import _C

    cuts = [_C.retrieve_cut(32, slots, 384, 6, 4, True, 132, 227 << 10)[:4] for slots in (512, 1024, 4096, 100_000)]
    assert cuts == [(True, 8, 32, 16), (True, 16, 64, 16), (True, 32, 256, 16), (False, 32, 131, 768)]
    assert _C.retrieve_cut(32, 100_000, 768, 6, 4, True, 132, 227 << 10)[:2] == (False, 32)
    for width, memory in ((1536, 227 << 10), (3072, 227 << 10), (768, 99 << 10)):  # queries too wide to be held
        assert _C.retrieve_cut(32, 100_000, width, 1, 2, True, 132, memory)[:5] == (True, 32, 6250, 16, 32)


def test_cuda_kernels_beside_a_torch_without_cuda_are_not_usable_and_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE_MISSING", None)
    monkeypatch.setattr(dispatch, "import_module", lambda _: SimpleNamespace(build_info=lambda: {"cuda": "nvcc 13.0"}))
    monkeypatch.setattr("torch.version.cuda", None)
    assert "this torch was built without CUDA" in dispatch._find_cuda()
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert dispatch._find_cuda() is None


LOOK_UP = """
#include <cuda/torch_cuda.h>
#include <iostream>
int main(int, char** arguments) {
  if (arguments[1]) dlopen(arguments[1], RTLD_NOW);
  try { std::cout << reinterpret_cast<intptr_t>(slm_fast::cuda::current_stream(3)); }
  catch (const std::exception& error) { std::cout << error.what(); }
}
"""
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream)'
LIBTORCH_CUDA = {
    "found": (f"{STREAM} {{ *stream = reinterpret_cast<void*>(device + 4096L); return 0; }}", "4099"),
    "refused": (f"{STREAM} {{ return 1; }}", "slm_fast: torch has no CUDA stream for cuda:3"),
    "older": ("", "this one has no aoti_torch_get_current_cuda_stream"),
    "not loaded": (None, "need a torch >= 2.10 built with CUDA; this one has no libtorch_cuda.so"),
}


@pytest.fixture(scope="module")
def look_up(tmp_path_factory):
    """A program that asks for the stream of cuda:3, with the library in its argument loaded as torch would have."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("look_up")
    include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{Path(__file__).parents[2] / 'csrc'}"]
    (folder / "main.cpp").write_text(LOOK_UP)
    subprocess.run(["g++", "-std=c++20", *include, folder / "main.cpp", "-o", folder / "main", "-ldl"], check=True)
    return folder / "main"


@pytest.mark.parametrize(("source", "expected"), LIBTORCH_CUDA.values(), ids=LIBTORCH_CUDA.keys())
def test_torchs_stream_is_looked_up_when_called_and_what_is_missing_is_named(look_up, tmp_path, source, expected):
    command = [look_up]
    if source is not None:
        (tmp_path / "stub.cpp").write_text(source)
        library = tmp_path / "stub.so"
        soname = "-Wl,-soname,libtorch_cuda.so"
        subprocess.run(["g++", "-shared", "-fPIC", soname, tmp_path / "stub.cpp", "-o", library], check=True)
        command.append(library)
    assert expected in subprocess.run(command, capture_output=True, text=True, check=True).stdout


ENTRIES = {
    "multi_lora": """
extern "C" int run(int type, int clusters, const int64_t* n, const void** in, const int64_t* ids, const float* weights,
                   void* y, float* partial) {
  cuda::Decode op{};
  op.type = static_cast<Type>(type), op.rows = n[0], op.picks = n[1], op.slots = n[2], op.rank = n[3];
  op.features_in = n[4], op.features_out = n[5], op.blocks = n[6];
  op.x = in[0], op.lora_a = in[1], op.lora_b = in[2], op.base = in[3], op.y = y;
  op.slot_ids = ids, op.weights = weights, op.partial = partial;
  return cuda::decode(op, clusters, nullptr);
}
""",
    "multi_lora_tokens": """
extern "C" int run(int type, int clusters, const int64_t* n, const void** in, const int64_t* ids, const float* weights,
                   void* y, float* partial) {
  cuda::Adapt op{};
  op.type = static_cast<Type>(type), op.samples = n[0], op.picks = n[1], op.slots = n[2], op.rank = n[3];
  op.features_in = n[4], op.features_out = n[5], op.blocks = n[6], op.tokens = n[7], op.tile = n[8];
  op.x = in[0], op.lora_a = in[1], op.lora_b = in[2], op.base = in[3], op.y = y;
  op.slot_ids = ids, op.weights = weights, op.partial = partial;
  return cuda::adapt(op, clusters, nullptr);
}
""",
    "retrieve": """
extern "C" int run(int type, const int64_t* n, const void* query, const void* keys, const float* bias, const bool* mask,
                   const int64_t* key_slot, double temperature, int64_t* ids, float* weights, int64_t* scratch) {
  cuda::RetrieveOnDevice on{};
  Retrieve& op = on.call;
  op.type = static_cast<Type>(type), op.queries = n[0], op.slots = n[1], op.width = n[2], op.groups = n[3], op.k = n[4];
  op.query = query, op.keys = keys, op.bias = bias, op.mask = mask, op.key_slot = key_slot;
  op.mask_per_query = n[5], op.cosine = n[6], op.softmax = n[7], op.mask_slots = n[8], op.temperature = temperature;
  op.slot_ids = ids, op.weights = weights;
  on.whole = n[9], on.early = n[9], on.scratch = scratch;
  on.cut = {n[10] != 0, static_cast<int>(n[11]), n[12], n[13], n[14], n[15], static_cast<int>(n[16])};
  return cuda::retrieve(on, nullptr);
}
""",
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernels compiled for the host."""
    return {
        stem: compile_for_host((ROOT / f"csrc/cuda/{stem}.cu").read_text(), entry, tmp_path_factory.mktemp(stem))
        for stem, entry in ENTRIES.items()
    }


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "two launches"])
@pytest.mark.parametrize(
    ("dtype", "B", "P", "K", "r", "I", "O", "blocks"),
    [
        (torch.float32, 1, 1, 1, 1, 8, 8, 1),
        (torch.float32, 3, 7, 4, 12, 40, 1032, 4),
        (torch.bfloat16, 2, 5, 2, 8, 1024, 520, 8),
        (torch.float16, 2, 3, 2, 128, 264, 2064, 2),
        (torch.bfloat16, 2, 5, 2, 8, 16, 24, 8),
    ],
)
def test_the_decode_kernels_code_equals_the_specification(on_host, clusters, dtype, B, P, K, r, I, O, blocks):
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((B, 1, I), (P, r, I), (P, r, O), (B, 1, O))
    )
    ids, weights = torch.randint(-1, P + 1, (B, K), generator=random), torch.rand(B, K, generator=random)
    known = torch.where(ids < P, ids, -1)  # an id that is no slot's adds nothing
    for given in (base, None):
        y, partial = torch.empty_like(base), torch.empty(B * blocks * K * r)
        tensors = (ctypes.c_void_p * 4)(*(pointer(t) for t in (x, a, b, given)))
        sizes = numbers(B, K, P, r, I, O, blocks)
        status = on_host["multi_lora"](
            TYPES[dtype], clusters, sizes, tensors, pointer(ids), pointer(weights), pointer(y), pointer(partial)
        )
        assert status == 0
        with ops.use_backend("reference"):
            wide = [t if t is None else t.double() for t in (x, a, b, given)]
            expected = ops.multi_lora(*wide[:3], known, weights, wide[3])
        assert (y.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "two launches"])
@pytest.mark.parametrize(
    ("dtype", "B", "T", "P", "K", "r", "I", "O", "tile", "blocks"),
    [
        (torch.bfloat16, 1, 1, 1, 1, 1, 8, 8, 32, 1),
        (torch.bfloat16, 2, 33, 5, 4, 12, 200, 136, 32, 2),
        (torch.float16, 2, 70, 5, 2, 8, 72, 264, 64, 1),
        (torch.bfloat16, 1, 150, 5, 4, 8, 392, 64, 64, 2),
        (torch.float16, 1, 5, 3, 2, 32, 16, 520, 32, 2),
    ],
)
def test_the_code_for_many_tokens_equals_the_specification(on_host, clusters, dtype, B, T, P, K, r, I, O, tile, blocks):
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((B, T, I), (P, r, I), (P, r, O), (B, T, O))
    )
    ids, weights = torch.randint(-1, P + 1, (B, K), generator=random), torch.rand(B, K, generator=random)
    known = torch.where(ids < P, ids, -1)
    if dtype == torch.float16:
        x, b = x * 1000, b / 1000  # sums beyond float16's range
    for given in (base, None):
        y = torch.empty_like(base) if given is None else base.clone()
        partial = torch.empty(B * -(-T // tile) * blocks * 128 * (64 + 8))
        tensors = (ctypes.c_void_p * 4)(*(pointer(t) for t in (x, a, b, None if given is None else y)))
        status = on_host["multi_lora_tokens"](
            TYPES[dtype], clusters, numbers(B, K, P, r, I, O, blocks, T, tile), tensors, pointer(ids), pointer(weights),
            pointer(y), pointer(partial),
        )  # fmt: skip
        assert status == 0
        with ops.use_backend("reference"):
            wide = [t if t is None else t.double() for t in (x, a, b, given)]
            expected = ops.multi_lora(*wide[:3], known, weights, wide[3])
        assert (y.double() - expected).norm() <= (1e-2 if dtype == torch.bfloat16 else 2e-3) * expected.norm()


def route_on_host(on_host, query, keys, k, cut, groups=1, bias=None, mask=None, key_slot=None, **options):
    """The route of the kernels' own code; `cut` as _C.retrieve_cut gives it."""
    (B, D), P = query.shape, len(keys)
    few, _, parts, _, slab, _, _ = cut
    ids, weights = torch.full((B, k), 99), torch.full((B, k), torch.nan)
    scratch = torch.empty(-(-min(slab, B) * P // 2) if few else B * parts * k, dtype=torch.int64)
    mask_slots = P if key_slot is None else 2**32 - 1 if mask is None else mask.shape[-1]
    sizes = numbers(
        B, P, D, groups, k, mask is not None and mask.dim() == 2, options.get("metric", "cosine") == "cosine",
        options.get("weighting") == "softmax", mask_slots, D // groups % 4 == 0, *cut,
    )  # fmt: skip
    status = on_host["retrieve"](
        TYPES[query.dtype], sizes, pointer(query), pointer(keys), pointer(bias), pointer(mask), pointer(key_slot),
        ctypes.c_double(options.get("temperature", 1.0)), pointer(ids), pointer(weights), pointer(scratch),
    )  # fmt: skip
    assert status == 0
    return ids, weights


def cut_of(query, keys, k, groups, kind):
    """How a call is cut: as on a card with 132 multiprocessors, or, for "many", on one with a single one."""
    from slm_fast import _C

    whole = query.shape[1] // groups % 4 == 0
    processors, memory = (1 if kind == "many" else 132), 96 << 10
    cut = _C.retrieve_cut(len(query), len(keys), query.shape[1], groups, k, whole, processors, memory)
    assert cut[0] == (kind == "few")
    return cut


def assert_route(route, expected):
    assert torch.equal(route[0], expected.slot_ids)
    torch.testing.assert_close(route[1], expected.weights, rtol=1e-6, atol=1e-6)


RETRIEVALS = {  # kind, dtype, B, P, D, groups, k
    "one number": ("few", torch.float32, 1, 1, 1, 1, 1),
    "no keys": ("few", torch.float32, 2, 0, 8, 2, 3),
    "few": ("few", torch.float32, 9, 70, 96, 3, 4),
    "few, odd": ("few", torch.float32, 5, 40, 66, 3, 32),
    "few, wide": ("few", torch.bfloat16, 3, 33, 1200, 1, 7),
    "few, groups in turns": ("few", torch.float16, 2, 20, 110, 11, 40 - 8),
    "many": ("many", torch.float32, 33, 150, 36, 3, 4),
    "many, odd": ("many", torch.bfloat16, 5, 200, 21, 3, 9),
    "many, longer rows": ("many", torch.float16, 20, 130, 160, 2, 2),
    "many, one group": ("many", torch.float32, 3, 300, 72, 1, 32),
}


@no_extension
@pytest.mark.parametrize("weighting", ["ratio", "softmax"])
@pytest.mark.parametrize(("kind", "dtype", "B", "P", "D", "groups", "k"), RETRIEVALS.values(), ids=RETRIEVALS.keys())
def test_the_retrieve_kernels_code_gives_the_route_of_the_specification(
    on_host, weighting, kind, dtype, B, P, D, groups, k
):
    random = torch.Generator().manual_seed(0)
    query, keys = torch.randn(B, D, generator=random).to(dtype), torch.randn(P, D, generator=random).to(dtype)
    keys[-1:] = keys[:1]  # equal keys: the lower id first
    if P > 30:  # and some that are nearly the first, by falling score
        keys[10:20] = keys[0] + (torch.arange(1, 11)[:, None] * torch.randn(10, D, generator=random) / 100).to(dtype)
        keys[P // 2 :: 7] = keys[9]
        query[0] = keys[0]
    bias, masks = torch.randn(P, generator=random), torch.rand(B, P, generator=random) > 0.3
    bias[-1:] = bias[:1]
    cut = cut_of(query, keys, k, groups, kind)
    cosine, dot = {"groups": groups}, {"metric": "dot", "bias": bias}
    for options in (
        cosine | {"mask": None},
        cosine | {"mask": masks},
        dot | {"mask": masks[0]},
        dot | {"mask": torch.zeros_like(masks)},
    ):
        if groups > 1 and "metric" in options:
            continue
        options |= {"weighting": weighting, "temperature": 0.5}
        with ops.use_backend("reference"):
            expected = ops.retrieve(query, keys, k, **options)
        assert_route(route_on_host(on_host, query, keys, k, cut, **options), expected)


@no_extension
@pytest.mark.parametrize(("kind", "most", "k"), [("few", 9, 4), ("few", 1, 6), ("many", 90, 3), ("many", 5, 32)])
def test_the_retrieve_kernels_code_returns_each_slot_once_with_its_best_keys_share(on_host, kind, most, k):
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(1, most + 1, (20 if most < 90 else 6,), generator=random)
    key_slot = (torch.arange(len(counts)) * 2).repeat_interleave(counts)  # every second slot has no key
    query, keys = torch.randn(5, 24, generator=random), torch.randn(len(key_slot), 24, generator=random)
    keys[key_slot == 4] = keys[0].clone()  # slot 2 and all its keys are as good as a key of slot 0
    cut = cut_of(query, keys, k, 1, kind)
    masks = torch.rand(5, int(key_slot[-1]) + 3, generator=random) > 0.3
    for options in ({"mask": masks[0]}, {"mask": masks}, {"metric": "dot", "weighting": "softmax"}):
        with ops.use_backend("reference"):
            expected = ops.retrieve(query, keys, k, key_slot=key_slot, **options)
        assert_route(route_on_host(on_host, query, keys, k, cut, key_slot=key_slot, **options), expected)
    odd = key_slot.clone()
    odd[0], odd[-1] = -5, masks.shape[1] + 3  # nobody's, wherever they are
    within = (odd >= 0) & (odd < masks.shape[1])
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys[within], k, key_slot=odd[within], mask=masks)
    assert_route(route_on_host(on_host, query, keys, k, cut, key_slot=odd, mask=masks), expected)


@no_extension
@pytest.mark.parametrize("kind", ["few", "many"])
def test_the_retrieve_kernels_code_joins_many_parts_and_slabs(on_host, kind):
    random = torch.Generator().manual_seed(0)
    query, keys = torch.randn(19, 20, generator=random), torch.randn(600, 20, generator=random)
    keys[300:310] = keys[5:15]
    if kind == "few":
        cut = (True, 8, 38, 16, 8, 0, 3)  # three slabs
    else:
        cut = (False, 16, 5, 128, 19, 96 << 10, 2)
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, 30)
    assert_route(route_on_host(on_host, query, keys, 30, cut), expected)


def on_gpu(dtype, B, T, P, K, r, I, O):
    """Arguments of multi_lora on a GPU, and what the specification makes of them in float64."""
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to("cuda", dtype) for shape in ((B, T, I), (P, r, I), (P, r, O), (B, T, O))
    )
    ids, weights = torch.randint(-1, P, (B, K), generator=random).cuda(), torch.rand(B, K, generator=random).cuda()
    with ops.use_backend("reference"):
        expected = ops.multi_lora(x.double(), a.double(), b.double(), ids, weights, base.double())
    return x, a, b, ids, weights, base, expected


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "P", "K", "r", "I", "O"), [(1, 1, 1, 1, 8, 8), (33, 20, 4, 12, 768, 1032), (3, 7, 2, 128, 4096, 520)]
)
def test_decoding_equals_the_specification_and_ignores_ids_that_are_no_slots(dtype, B, P, K, r, I, O):
    x, a, b, ids, weights, base, expected = on_gpu(dtype, B, 1, P, K, r, I, O)
    with ops.use_backend("cuda"):
        got = ops.multi_lora(x, a, b, ids, weights, base)
        assert torch.equal(got, ops.multi_lora(x, a, b, ids.where(ids >= 0, P + 3), weights, base))
    assert (got.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@no_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "T", "P", "K", "r", "I", "O"),
    [
        (1, 2, 1, 1, 1, 8, 8),
        (5, 131, 20, 4, 12, 768, 1032),
        (33, 37, 7, 2, 32, 520, 2048),
        (2, 512, 9, 4, 8, 4096, 4096),
    ],
)
def test_many_tokens_equal_the_specification_in_place_too(dtype, B, T, P, K, r, I, O):
    x, a, b, ids, weights, base, expected = on_gpu(dtype, B, T, P, K, r, I, O)
    with ops.use_backend("cuda"):
        got = ops.multi_lora(x, a, b, ids, weights, base)
        assert torch.equal(got, ops.multi_lora(x, a, b, ids.where(ids >= 0, P + 3), weights, base))
        plain = ops.multi_lora(x, a, b, ids, weights)
        assert torch.equal(got, multi_lora_(x, a, b, ids, weights, base))
    assert torch.equal(got, base)
    assert (got.double() - expected).norm() <= 2e-2 * expected.norm()
    alone = ops.multi_lora(x.float(), a.float(), b.float(), ids, weights)
    assert (plain.float() - alone).norm() <= 2e-2 * alone.norm()


@no_gpu
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_an_empty_result(T, dtype):
    values = [torch.randn(3, 4, 64, device="cuda", dtype=dtype) for _ in range(2)]
    ids, weights = torch.empty(0, 2, dtype=torch.int64, device="cuda"), torch.empty(0, 2, device="cuda")
    assert ops.multi_lora(torch.empty(0, T, 64, device="cuda", dtype=dtype), *values, ids, weights).shape == (0, T, 64)


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "P", "D", "groups", "k"), [(1, 1, 1, 1, 1), (33, 5000, 768, 6, 4), (5, 100, 66, 3, 32)])
def test_retrieve_gives_the_route_of_the_specification(dtype, B, P, D, groups, k):
    query, keys = torch.randn(B, D).to("cuda", dtype), torch.randn(P, D).to("cuda", dtype)
    mask = torch.rand(B, P, device="cuda") > 0.3
    for options in (
        {"groups": groups},
        {"metric": "dot", "bias": torch.randn(P, device="cuda"), "weighting": "softmax"},
    ):
        with ops.use_backend("reference"):
            expected = ops.retrieve(query, keys, k, mask=mask, **options)
        with ops.use_backend("cuda"):
            got = ops.retrieve(query, keys, k, mask=mask, **options)
        assert torch.equal(got.slot_ids, expected.slot_ids)
        torch.testing.assert_close(got.weights, expected.weights, rtol=2e-5, atol=2e-5)
