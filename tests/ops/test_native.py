"""Native CPU backend only: threads, strides, odd sizes, the in-place form and the instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops import dispatch
from slm_fast.ops.multi_lora import multi_lora_

pytestmark = pytest.mark.skipif(dispatch.NATIVE_MISSING is not None, reason=str(dispatch.NATIVE_MISSING))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
SETTINGS = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _native():
    with ops.use_backend("native"):
        yield


@st.composite
def calls(draw, most_tokens=70):
    """multi_lora arguments with sizes around tile edges, -1 slots and repeated slots."""
    size = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 47, 48, 49, 63, 64, 65, 96, 97, 130]))
    B, T, I, O = draw(st.integers(0, 5)), draw(st.integers(0, most_tokens)), draw(size), draw(size)
    P, K, r = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    call = {"x": normal(B, T, I), "lora_a": normal(P, r, I), "lora_b": normal(P, r, O)}
    call["slot_ids"] = torch.randint(-1, P, (B, K), generator=random)
    call["weights"] = torch.rand(B, K, generator=random)
    call["base"] = normal(B, T, O) if draw(st.booleans()) else None
    if draw(st.booleans()):  # rows that are not adjacent in memory
        call["x"] = call["x"].transpose(0, 1).contiguous().transpose(0, 1)
        if call["base"] is not None:
            call["base"] = torch.cat([call["base"]] * 2, -1)[..., :O]
    return call


def doubled(call, of=lambda number: number):
    return {n: of(t.double()) if t is not None and t.is_floating_point() else t for n, t in call.items()}


def assert_near(got, expected, magnitude, tolerance):
    """`magnitude`: the result from absolute values. A sum may cancel out, but its rounding error does not."""
    assert got.shape == expected.shape
    tolerance = max(tolerance, TOLERANCE[got.dtype])
    assert (got.double() - expected).norm() <= tolerance * magnitude.norm()


def assert_equals_the_specification(call):
    with ops.use_backend("reference"):
        expected, magnitude = (ops.multi_lora(**doubled(call, of)) for of in (torch.clone, torch.abs))
    assert_near(ops.multi_lora(**call), expected, magnitude, TOLERANCE[call["x"].dtype])


@given(calls())
@SETTINGS
def test_any_shape_equals_the_specification_in_float64(call):
    assert_equals_the_specification(call)


@given(calls(most_tokens=3))
@SETTINGS
def test_any_shape_of_few_tokens_equals_the_specification_in_float64(call):
    assert_equals_the_specification(call)


@given(calls())
@SETTINGS
def test_gradients_of_any_shape_equal_the_specification_in_float64(call):
    names = [name for name in ("x", "lora_a", "lora_b", "weights", "base") if call[name] is not None]

    def gradients(call, backend):
        leaves = {name: call[name].detach().clone().requires_grad_() for name in names}
        with ops.use_backend(backend):
            y = ops.multi_lora(**(call | leaves))
            return torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    expected, magnitude = (gradients(doubled(call, of), "reference") for of in (torch.clone, torch.abs))
    for results in zip(gradients(call, "native"), expected, magnitude, strict=True):
        assert_near(*results, TOLERANCE[call["x"].dtype])


@given(calls())
@SETTINGS
def test_the_in_place_form_gives_the_same_bits_and_touches_nothing_beside_base(call):
    if call["base"] is None:
        return
    O = call["base"].shape[-1]
    wide = torch.full((*call["base"].shape[:2], O + 3), 7.0, dtype=call["base"].dtype)
    inside = wide[..., 1 : O + 1]
    inside.copy_(call["base"])
    expected = ops.multi_lora(**call)
    torch.ops.slm_fast.multi_lora_native_(**(call | {"base": inside}))
    assert torch.equal(inside, expected)
    assert (wide[..., 0] == 7).all()
    assert (wide[..., O + 1 :] == 7).all()


THREADS = """
import torch
from slm_fast import ops
torch.manual_seed(0)
def bits(B, T, I, O, P, K, r, dtype):
    x, a, b, base = torch.randn(B, T, I), torch.randn(P, r, I), torch.randn(P, r, O), torch.randn(B, T, O)
    leaves = [t.to(dtype).requires_grad_() for t in (x, a, b, base)]
    weights, ids = torch.rand(B, K).requires_grad_(), torch.randint(-1, P, (B, K))
    y = ops.multi_lora(*leaves[:3], ids, weights, leaves[3])
    return y, *torch.autograd.grad(y, [*leaves, weights], torch.randn(y.shape).to(dtype))
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((9, 70, 96, 100, 5, 4, 12), (40, 1, 256, 260, 3, 2, 8)):
        torch.manual_seed(1)
        torch.set_num_threads(1)
        one = bits(*shape, dtype)
        for threads in (2, 3, 5):
            torch.manual_seed(1)
            torch.set_num_threads(threads)
            assert all(torch.equal(p, q) for p, q in zip(one, bits(*shape, dtype), strict=True)), (shape, threads)
query, keys = torch.randn(60, 48), torch.randn(700, 48)
def routes():
    loss = ops.key_loss(query, keys, 3, groups=3, mask_prob=0.3, seed=1)
    several = ops.retrieve(query, keys, 5, groups=3, key_slot=torch.arange(700) // 33)
    return *ops.retrieve(query, keys, 5, groups=3), *several, loss
torch.set_num_threads(1)
one = routes()
torch.set_num_threads(4)
assert all(torch.equal(p, q) for p, q in zip(one, routes(), strict=True))
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_forward_and_gradients_have_the_same_bits_for_any_number_of_threads():
    done = run(THREADS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["amx", "avx512_bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set_this_processor_has_passes_the_operator_tests(name):
    from slm_fast import _C

    if name not in _C.build_info()["instruction_sets"]:
        pytest.skip("not compiled for this architecture")
    show = "import torch; from slm_fast import _C; print(_C.build_info()['instruction_set'])"
    shown = run(show, SLM_FAST_CPU=name)
    assert shown.returncode == 0, shown.stderr
    if shown.stdout.strip() != name:
        pytest.skip("this processor does not have it")
    if name == _C.build_info()["instruction_set"]:
        return  # the other tests already run this one
    here = os.path.dirname(__file__)
    stems = ("multi_lora", "retrieve", "native_wide", "key_loss", "invariant_linear", "sum_scatters", "poison")
    files = [os.path.join(here, f"test_{stem}.py") for stem in stems]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "native and not compile", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"SLM_FAST_CPU": name})
    assert done.returncode == 0, done.stdout[-3000:]


def in_place_call():
    zeros = torch.zeros
    call = {"x": zeros(2, 3, 6), "lora_a": zeros(3, 2, 6), "lora_b": zeros(3, 2, 6), "base": zeros(2, 3, 6)}
    return call | {"slot_ids": zeros(2, 2, dtype=torch.int64), "weights": zeros(2, 2)}


def test_an_output_that_overlaps_an_input_or_itself_is_an_error_before_anything_is_written():
    call, op = in_place_call(), torch.ops.slm_fast.multi_lora_native_
    op(**call)
    with pytest.raises(ValueError, match=r"^base: overlaps x in memory"):
        op(**(call | {"base": call["x"]}))
    shared = torch.zeros(40)
    with pytest.raises(ValueError, match=r"^base: overlaps lora_b in memory"):
        op(**(call | {"base": shared[:36].view(2, 3, 6), "lora_b": shared[4:].view(3, 2, 6)}))
    with pytest.raises(ValueError, match=r"^base: rows overlap in memory"):
        op(**(call | {"base": torch.zeros(6).expand(2, 3, 6)}))
    with pytest.raises(ValueError, match=r"^base: expected a dense last axis"):
        op(**(call | {"base": torch.zeros(2, 6, 3).transpose(1, 2)}))


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "weights", "base"])
def test_the_operator_itself_checks_dtypes_and_shapes(name):
    call, op = in_place_call(), torch.ops.slm_fast.multi_lora_native
    for wrong in (call[name].to(torch.int32), call[name][..., :-1]):
        with pytest.raises(ValueError, match=r"^(x|lora_a|lora_b|slot_ids|weights|base): "):
            op(**(call | {name: wrong}))
    with pytest.raises(ValueError, match=r"^slot_ids: expected -1\.\.2, got 0\.\.3"):
        op(**(call | {"slot_ids": torch.tensor([[0, 3], [0, 0]])}))


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
        found.append(ops.retrieve(query, keys, 1, metric="dot").slot_ids[0, 0].item())
    assert found == [48] * 20


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


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("aggregate", ["mean", "vote"])
def test_groups_of_odd_width_and_keys_of_all_lengths_give_the_route_of_the_specification(dtype, aggregate):
    query, keys = torch.randn(70, 33).to(dtype), torch.randn(500, 33).to(dtype)
    keys *= torch.tensor([1e-3, 1.0, 1e3], dtype=dtype).repeat(167)[:500, None]
    keys[7] = 0
    for queries in (query, query[:5]):
        assert_routes_equal_the_specification(queries, keys, 5, groups=3, aggregate=aggregate)


def test_prepared_keys_of_another_size_are_an_error():
    query, keys = torch.ones(2, 8), torch.ones(3, 8)
    prepared = torch.ops.slm_fast.prepare_keys_native(keys, 2)
    call = (query, keys, 1, 2, None, None, "cosine", "mean", "ratio", 1.0)
    assert torch.equal(torch.ops.slm_fast.retrieve_native(*call, prepared)[0], torch.zeros(2, 1))
    for wrong in (prepared[:-1], prepared.char()):
        with pytest.raises(ValueError, match=r"^prepared: expected torch\.uint8 "):
            torch.ops.slm_fast.retrieve_native(*call, wrong)


def test_the_form_that_may_overwrite_base_leaves_shared_memory_alone():
    call = in_place_call()
    call |= {"lora_a": torch.randn(3, 2, 6), "lora_b": torch.randn(3, 2, 6), "weights": torch.ones(2, 2)}
    call["x"] = torch.randn(2, 3, 6)
    expected = ops.multi_lora(**call)
    assert multi_lora_(**call) is call["base"]
    assert torch.equal(call["base"], expected)
    before = call["x"].clone()
    y = multi_lora_(**(call | {"base": call["x"]}))
    assert torch.equal(call["x"], before)
    assert torch.equal(y, ops.multi_lora(**(call | {"base": before})))


def test_bad_arguments_become_input_errors_that_name_them():
    call = in_place_call()
    with pytest.raises(InputError, match=r"^lora_a: expected \[P, r, 6\] to match x, got \[3, 2, 5\]$"):
        ops.multi_lora(**(call | {"lora_a": torch.zeros(3, 2, 5)}))


def test_build_info_names_the_compiler_and_the_instruction_set_in_use():
    from slm_fast import _C

    info = _C.build_info()
    assert set(info) == {"compiler", "instruction_sets", "instruction_set", "cuda"}
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][-1] == "portable"
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")


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
    assert ops.retrieve(query, keys, 1, metric="dot").slot_ids.tolist() == [[60]] * B
