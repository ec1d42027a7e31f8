"""retrieve in CUDA: how launches divide the work, and the kernels' results, on the CPU (through cuda_on_host.h) and on
a GPU if there is one.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_on_host import ROOT, TYPES, compile_for_host, no_extension, no_gpu, numbers, pointer

from slm_fast import ops
from slm_fast.ops.retrieve import size_of

CARDS = [(1, 227 << 10), (108, 163 << 10), (132, 227 << 10), (84, 99 << 10)]  # multiprocessors, shared bytes per block


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
    for width, memory in ((1536, 227 << 10), (3072, 227 << 10), (768, 99 << 10)):  # queries too wide for shared memory
        assert _C.retrieve_cut(32, 100_000, width, 1, 2, True, 132, memory)[:5] == (True, 32, 6250, 16, 32)


ENTRY = """
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
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernels compiled for the CPU."""
    source = (ROOT / "csrc/cuda/retrieve.cu").read_text()
    return compile_for_host(source, ENTRY, tmp_path_factory.mktemp("retrieve"))


def route_on_host(on_host, query, keys, k, cut, groups=1, bias=None, mask=None, key_slot=None, **options):
    """IDs and weights from the kernels on the CPU. `cut`: how to divide the work, as returned by _C.retrieve_cut."""
    (B, D), P = query.shape, len(keys)
    few, _, parts, _, slab, _, _ = cut
    ids, weights = torch.full((B, k), 99), torch.full((B, k), torch.nan)
    scratch = torch.empty(-(-min(slab, B) * P // 2) if few else B * parts * k, dtype=torch.int64)
    mask_slots = P if key_slot is None else 2**32 - 1 if mask is None else mask.shape[-1]
    sizes = numbers(
        B, P, D, groups, k, mask is not None and mask.dim() == 2, options.get("metric", "cosine") == "cosine",
        options.get("weighting") == "softmax", mask_slots, D // groups % 4 == 0, *cut,
    )  # fmt: skip
    status = on_host(
        TYPES[query.dtype], sizes, pointer(query), pointer(keys), pointer(bias), pointer(mask), pointer(key_slot),
        ctypes.c_double(options.get("temperature", 1.0)), pointer(ids), pointer(weights), pointer(scratch),
    )  # fmt: skip
    assert status == 0
    return ids, weights


def cut_of(query, keys, k, groups, kind):
    """How a GPU divides this call: with 132 multiprocessors for kind "few", with one for "many"."""
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
    keys[-1:] = keys[:1]  # equal keys: the lower ID comes first
    if P > 30:  # near-duplicates of the first key, less and less similar
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
    keys[key_slot == 4] = keys[0].clone()  # all keys of slot 4 tie with a key of slot 0
    cut = cut_of(query, keys, k, 1, kind)
    masks = torch.rand(5, int(key_slot[-1]) + 3, generator=random) > 0.3
    for options in ({"mask": masks[0]}, {"mask": masks}, {"metric": "dot", "weighting": "softmax"}):
        with ops.use_backend("reference"):
            expected = ops.retrieve(query, keys, k, key_slot=key_slot, **options)
        assert_route(route_on_host(on_host, query, keys, k, cut, key_slot=key_slot, **options), expected)
    odd = key_slot.clone()
    odd[0], odd[-1] = -5, masks.shape[1] + 3  # keys of out-of-range slots are ignored
    within = (odd >= 0) & (odd < masks.shape[1])
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys[within], k, key_slot=odd[within], mask=masks)
    assert_route(route_on_host(on_host, query, keys, k, cut, key_slot=odd, mask=masks), expected)


@no_extension
@pytest.mark.parametrize("kind", ["few", "many"])
def test_the_retrieve_kernels_code_joins_many_parts_and_slabs(on_host, kind):
    random = torch.Generator().manual_seed(0)
    query, keys = torch.randn(19, 20, generator=random), torch.randn(330, 20, generator=random)
    keys[300:310] = keys[5:15]
    cut = {"few": (True, 8, 21, 16, 8, 0, 3), "many": (False, 16, 3, 128, 19, 96 << 10, 2)}[kind]  # few: 3 query slabs
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, 12)
    assert_route(route_on_host(on_host, query, keys, 12, cut), expected)


@no_extension
def test_the_retrieve_kernels_code_takes_wide_rows_of_slots_with_several_keys(on_host):
    """A call like those of the router with random features: one wide group, a bias, and 20 keys per slot."""
    random = torch.Generator().manual_seed(0)
    query, keys = torch.randn(3, 3072, generator=random), torch.randn(40, 3072, generator=random)
    key_slot, bias = torch.arange(2).repeat_interleave(20), 10 * torch.randn(40, generator=random)
    assert size_of(query, keys, 2, 1, "mean") == "few"
    options = {"metric": "dot", "bias": bias, "key_slot": key_slot, "weighting": "softmax", "temperature": 30.0}
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, 2, **options)
    for tile in (8, 16, 32):
        assert_route(route_on_host(on_host, query, keys, 2, (True, tile, 3, 16, 32, 0, 1), **options), expected)


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


@no_gpu
@pytest.mark.parametrize(("B", "slots", "D"), [(32, 20, 3072), (33, 300, 1920), (1, 2, 768)])
def test_retrieve_returns_each_slot_once_with_its_best_keys_share(B, slots, D):
    key_slot = torch.arange(slots, device="cuda").repeat_interleave(40)
    query, keys = torch.randn(B, D, device="cuda"), torch.randn(len(key_slot), D, device="cuda")
    options = {"metric": "dot", "weighting": "softmax", "temperature": 50.0, "key_slot": key_slot}
    for mask in (None, torch.rand(B, slots, device="cuda") > 0.3):
        with ops.use_backend("reference"):
            expected = ops.retrieve(query, keys, 2, mask=mask, **options)
        with ops.use_backend("cuda"):
            got = ops.retrieve(query, keys, 2, mask=mask, **options)
        assert torch.equal(got.slot_ids, expected.slot_ids)
        torch.testing.assert_close(got.weights, expected.weights, rtol=2e-5, atol=2e-5)


@no_gpu
def test_retrieve_of_many_keys_repeats_its_bits_and_equals_the_specification():
    query, keys = torch.randn(32, 384, device="cuda"), torch.randn(100_003, 384, device="cuda")
    keys[50_000:50_010] = keys[:10]
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, 4, groups=6)
    with ops.use_backend("cuda"):
        first, again = (ops.retrieve(query, keys, 4, groups=6) for _ in range(2))
    assert torch.equal(first.slot_ids, expected.slot_ids)
    assert torch.equal(first.slot_ids, again.slot_ids)
    assert torch.equal(first.weights, again.weights)
