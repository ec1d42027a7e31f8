"""The native `retrieve`: near and exact ties, slots with several keys, masks, prepared keys, and sizes around tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_fast import ops
from slm_fast.ops import dispatch

pytestmark = pytest.mark.skipif(dispatch.NATIVE_MISSING is not None, reason=str(dispatch.NATIVE_MISSING))
SETTINGS = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _native():
    with ops.use_backend("native"):
        yield


def prepared_for(options, keys, key_slot=None):
    """Keys prepared for a call of `retrieve` with these options."""
    how = {name: options[name] for name in ("groups", "metric") if name in options}
    return ops.prepare_keys(keys, key_slot=key_slot, **how)


def assert_routes_equal_the_specification(query, keys, k, **options):
    """Also checks that prepared keys give the same bits."""
    got = ops.retrieve(query, keys, k, **options)
    prepared = ops.retrieve(query, prepared_for(options, keys), k, **options)
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, k, **options)
    assert torch.equal(got.slot_ids, expected.slot_ids)
    torch.testing.assert_close(got.weights, expected.weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.slot_ids, prepared.slot_ids)
    assert torch.equal(got.weights, prepared.weights)


@given(st.integers(1, 60), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32))
@SETTINGS
def test_retrieved_routes_equal_the_specification_among_near_and_exact_ties(B, P, k, seed):
    """Keys that repeat, that are multiples of one another, or that differ by one unit in the last place."""
    random = torch.Generator().manual_seed(seed)
    query, kinds = torch.randn(B, 24, generator=random), torch.randn(4, 24, generator=random)
    keys = kinds[torch.randint(4, (P,), generator=random)]
    keys = keys * torch.tensor([1.0, 3.0, 0.7])[torch.randint(3, (P, 1), generator=random)]
    nudged = torch.rand(P, 24, generator=random) > 0.9
    keys = torch.where(nudged, torch.nextafter(keys, keys + 1), keys)
    for options in ({"groups": 3}, {"groups": 3, "aggregate": "vote"}, {"metric": "dot"}):
        assert_routes_equal_the_specification(query, keys, k, **options)


def joined(query, keys, k, key_slot, mask=None, **options):
    """The k best slots [B, k] from a ranking of every key: with k = all keys, each is scored in float64."""
    of_keys = None if mask is None else mask[..., key_slot]
    ids = torch.full((len(query), k), -1)
    for row, order in zip(ids, ops.retrieve(query, keys, len(keys), mask=of_keys, **options).slot_ids, strict=True):
        slots = list(dict.fromkeys(key_slot[order[order >= 0]].tolist()))[:k]  # ordered by their best keys
        row[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
    return ids


def assert_slots_are_ranked_by_their_best_keys(query, keys, k, key_slot, **options):
    got = ops.retrieve(query, keys, k, key_slot=key_slot, **options)
    assert torch.equal(got.slot_ids, joined(query, keys, k, key_slot, **options))
    prepared = prepared_for(options, keys, key_slot)
    for own, other in zip(got, ops.retrieve(query, prepared, k, **options), strict=True):
        assert torch.equal(own.nan_to_num(9), other.nan_to_num(9))
    return got


@given(st.integers(1, 60), st.integers(1, 300), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**32))
@SETTINGS
def test_slots_of_several_keys_are_ranked_among_near_and_exact_ties_within_and_across_them(B, N, P, k, seed):
    """Includes slots without a key, masks, and a NaN key."""
    random = torch.Generator().manual_seed(seed)
    query, kinds = torch.randn(B, 24, generator=random), torch.randn(4, 24, generator=random)
    keys = kinds[torch.randint(4, (N,), generator=random)]
    nudged = torch.rand(N, 24, generator=random) > 0.9
    keys = torch.where(nudged, torch.nextafter(keys, keys + 1), keys)
    if seed % 8 == 0:
        keys[N // 2] = torch.nan
    key_slot = torch.randint(P, (N,), generator=random).sort().values
    bias = torch.randint(3, (N,), generator=random) / 1e6
    for mask in (None, torch.rand(P, generator=random) > 0.3, torch.rand(B, P, generator=random) > 0.6):
        for options in ({"groups": 3}, {"metric": "dot"}, {"metric": "dot", "bias": bias}):
            assert_slots_are_ranked_by_their_best_keys(query, keys, k, key_slot, mask=mask, **options)


@pytest.mark.parametrize("B", [1, 5, 33, 200])
@pytest.mark.parametrize("most", [5, 50, 1000, 3000])
def test_slots_that_no_chunk_of_keys_and_no_thread_has_to_itself_are_ranked_by_all_their_keys(B, most):
    random = torch.Generator().manual_seed(most)
    counts = torch.randint(1, most + 1, (3000 // most + 1,), generator=random)
    key_slot = (2 * torch.arange(len(counts))).repeat_interleave(counts)
    query, keys = (torch.randn(rows, 36, generator=random) for rows in (B, len(key_slot)))
    bias, threads = torch.randn(len(keys), generator=random), torch.get_num_threads()
    for options in ({"groups": 2}, {"metric": "dot", "bias": bias}):
        for torch_threads in (1, 4):
            torch.set_num_threads(torch_threads)
            got = assert_slots_are_ranked_by_their_best_keys(query, keys, 4, key_slot, **options)
            with ops.use_backend("reference"):
                expected = ops.retrieve(query, keys, 4, key_slot=key_slot, **options)
            torch.testing.assert_close(got.weights, expected.weights, rtol=1e-5, atol=1e-6)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("B", [1, 5, 33, 200])
@pytest.mark.parametrize("most", [1, 3, 20, 200])
def test_of_many_slots_of_which_each_query_may_be_given_few_those_few_are_ranked(B, most):
    """Most chunks of keys are fully masked and skipped, whether or not a slot's keys end with the chunk."""
    random = torch.Generator().manual_seed(most)
    counts = torch.randint(1, most + 1, (4000 // most,), generator=random)
    key_slot = torch.arange(len(counts)).repeat_interleave(counts)
    query, keys = (torch.randn(rows, 36, generator=random) for rows in (B, len(key_slot)))
    bias = torch.randn(len(keys), generator=random)
    some = torch.zeros(len(counts), dtype=torch.bool)
    some[torch.randint(len(counts), (3,), generator=random)] = True
    own = torch.zeros(B, len(counts), dtype=torch.bool)
    own.scatter_(1, torch.randint(len(counts), (B, 2), generator=random), True)
    for mask in (some, own, own & False):
        for options in ({"groups": 2}, {"metric": "dot", "bias": bias}):
            if most == 1:
                assert_routes_equal_the_specification(query, keys, 4, mask=mask, **options)
            else:
                assert_slots_are_ranked_by_their_best_keys(query, keys, 4, key_slot, mask=mask, **options)


@pytest.mark.parametrize("B", [1, 30])
def test_a_score_that_is_far_less_exact_than_those_before_it_is_ranked_all_the_same(B):
    """A chunk of 48 keys, then a key with about a million times their norm that narrowly has query 0's best score."""
    found = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        query, keys = (torch.randn(rows, 384, generator=random) for rows in (B, 1048))
        first, highest = query[0].double(), (query[0].double() @ keys[:48].double().T).max() / 100
        away = 1e4 * keys[48:].double()
        for _ in range(3):
            away = (away - ((away @ first - highest) / (first @ first))[:, None] * first).float().double()
        above = away @ first - highest
        keys = torch.cat([keys[:48] / 100, away[(above > 1e-6) & (above < 5e-3)][:1].float()])
        for asked in (keys, ops.prepare_keys(keys, metric="dot")):
            found.append(ops.retrieve(query, asked, 1, metric="dot").slot_ids[0, 0].item())
    assert found == [48] * 40


def test_a_large_pool_gives_the_route_of_the_specification():
    query, keys = torch.randn(40, 32), torch.randn(50_000, 32)
    for queries in (query, query[:3]):
        for options in ({"groups": 2}, {"metric": "dot"}):
            assert_routes_equal_the_specification(queries, keys, 10, **options)


@pytest.mark.parametrize("P", [1, 17, 130, 3000])
def test_inner_products_of_any_size_give_the_route_of_the_specification(P):
    """Queries and keys of very different lengths, some as long as float32 allows or denormal, and equal keys."""
    for B, D, k in ((1, 1, 1), (3, 31, 2), (65, 33, 64), (300, 130, 65)):
        query, keys = torch.randn(B, D), torch.randn(P, D)
        keys *= torch.tensor([1e-30, 1e-3, 1.0, 1e3]).repeat(P)[:P, None]
        keys[P // 2] = keys[0]
        assert_routes_equal_the_specification(query, keys, k, metric="dot", bias=torch.randn(P))
        for scale in (1e-44, 1e-20, 1e18, 1e30):
            assert_routes_equal_the_specification(query, keys * scale, k, metric="dot")
            assert_routes_equal_the_specification(query * scale, keys, k, metric="dot")


def test_keys_too_alike_for_rounded_ones_give_the_route_of_the_specification():
    query, keys = torch.randn(70, 64), torch.randn(1, 64) + 1e-5 * torch.randn(3000, 64)
    assert_routes_equal_the_specification(query, keys, 4, metric="dot")


@pytest.mark.parametrize("P", [500, 3000])
@pytest.mark.parametrize("B", [1, 20, 40, 70, 100])
def test_what_rounding_takes_from_queries_decides_among_keys_that_it_leaves_as_they_are(P, B):
    """By rounded queries, the order of the keys is reversed."""
    lost = 0.9 * 2**-9 * torch.randn(64).sign()
    signs = torch.randn(P, 64).sign()
    signs[:, 32:] = -signs[:, :32]  # so that all keys have the same product with ones
    bias = -0.5 * signs @ lost
    assert_routes_equal_the_specification((1 + lost).expand(B, -1).clone(), 4 + signs, 3, metric="dot", bias=bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregate", ["mean", "vote"])
def test_groups_of_odd_width_and_keys_of_all_lengths_give_the_route_of_the_specification(dtype, aggregate):
    query, keys = torch.randn(70, 33).to(dtype), torch.randn(500, 33).to(dtype)
    keys *= torch.tensor([1e-3, 1.0, 1e3], dtype=dtype).repeat(167)[:500, None]
    keys[7] = 0
    for queries in (query, query[:5]):
        assert_routes_equal_the_specification(queries, keys, 5, groups=3, aggregate=aggregate)


def test_what_was_prepared_for_one_metric_does_not_change_the_other():
    query, keys = torch.randn(40, 8), torch.randn(300, 8)
    for made_for, metric in (("cosine", "dot"), ("dot", "cosine")):
        got = ops.retrieve(query, ops.prepare_keys(keys, metric=made_for), 3, metric=metric)
        for own, other in zip(got, ops.retrieve(query, keys, 3, metric=metric), strict=True):
            assert torch.equal(own, other)


def test_prepared_keys_of_another_size_are_an_error():
    query, keys = torch.ones(2, 8), torch.ones(3, 8)
    prepared = torch.ops.slm_fast.prepare_keys_native(keys, 2)
    call = (query, keys, 1, 2, None, None, "cosine", "mean", "ratio", 1.0)
    assert torch.equal(torch.ops.slm_fast.retrieve_native(*call, prepared)[0], torch.zeros(2, 1))
    for wrong in (prepared[:-1], prepared.char()):
        with pytest.raises(ValueError, match=r"^prepared: expected torch\.uint8 "):
            torch.ops.slm_fast.retrieve_native(*call, wrong)


@pytest.mark.parametrize("B", [1, 30])
@pytest.mark.parametrize("exponent", range(-21, -15))
def test_a_score_that_every_addition_makes_smaller_is_ranked_by_what_it_is(B, exponent):
    """The last of 61 keys scores best by two float32 units, but its sum alone is rounded down at every addition."""
    query, best = torch.ones(B, 3200), torch.ones(3200)
    best[1:] += 0.49 * 2.0**exponent
    others = torch.ones(60, 3200)
    # A float32 unit is 2^-12 at 3,200. The other scores differ, as ties alone would rank all keys in float64.
    others[:, 0] += (best.double() - 1).sum() - 2**-11 - torch.arange(60.0) * 2**-9
    keys = torch.cat([others, best[None]])
    product = query[:1].double() @ keys.double().T
    assert product[0, 60].float() > product[0, 0].float()
    for asked in (keys, ops.prepare_keys(keys, metric="dot")):
        assert ops.retrieve(query, asked, 1, metric="dot").slot_ids.tolist() == [[60]] * B
