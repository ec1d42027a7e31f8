"""The CUDA operators: how launches cut the work, anywhere; their results, where there is a GPU.

The operator tests of this folder run on them too, as backend "preferred"."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops
from slm_fast.ops import dispatch

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
@pytest.mark.parametrize("slots", [1, 31, 32, 33, 512, 4096, 100_000, 2_000_003])
@pytest.mark.parametrize("queries", [1, 4, 5, 32, 256, 4097])
def test_retrieve_parts_cover_every_query_and_slot_once(queries, slots):
    from slm_fast import _C

    for processors in (1, 108, 132):
        tiles, parts, span, shared = _C.retrieve_cut(queries, slots, 768, 6, 4, processors)
        assert (tiles - 1) * 4 < queries <= tiles * 4
        assert (parts - 1) * span < slots <= parts * span
        assert span % 32 == 0
        assert parts <= 65535
        assert parts == 1 or tiles * parts < 4 * processors + tiles
        assert shared <= 160 << 10


@no_extension
def test_whatever_dispatch_sends_to_cuda_fits_a_blocks_shared_memory():
    from slm_fast import _C
    from slm_fast.ops.retrieve import _size

    widest = 0
    for width in (*range(1, 70), 384, 768, 1024, 1536, 3000, 3072, 3073, 4096):
        for groups in (g for g in range(1, width + 1) if width % g == 0):
            if _size(torch.empty(1, width), torch.empty(5, width), 4, groups, "mean") == "few":
                for vector in (1, 4, 8):
                    widest = max(widest, _C.retrieve_cut(1, 5, width, groups, vector, 132)[3])
    assert 96 << 10 < widest <= 160 << 10


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "P", "K", "r", "I", "O"), [(1, 1, 1, 1, 8, 8), (33, 20, 4, 12, 768, 1032), (3, 7, 2, 128, 4096, 520)]
)
def test_decoding_equals_the_specification_and_ignores_ids_that_are_no_slots(nan_memory, dtype, B, P, K, r, I, O):
    random = torch.Generator().manual_seed(0)
    x, a, b, base = (
        torch.randn(shape, generator=random).to("cuda", dtype) for shape in ((B, 1, I), (P, r, I), (P, r, O), (B, 1, O))
    )
    ids, weights = torch.randint(-1, P, (B, K), generator=random).cuda(), torch.rand(B, K, generator=random).cuda()
    with ops.use_backend("reference"):
        expected = ops.multi_lora(x.double(), a.double(), b.double(), ids, weights, base.double())
    with ops.use_backend("cuda"):
        got = ops.multi_lora(x, a, b, ids, weights, base)
        assert torch.equal(got, ops.multi_lora(x, a, b, ids.where(ids >= 0, P + 3), weights, base))
    assert (got.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "P", "D", "groups", "k"), [(1, 1, 1, 1, 1), (33, 5000, 768, 6, 4), (5, 100, 66, 3, 32)])
def test_retrieve_gives_the_route_of_the_specification(nan_memory, dtype, B, P, D, groups, k):
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
