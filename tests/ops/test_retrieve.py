"""retrieve against its definition (help(ops.retrieve)) as Python loops, and against the reference backend."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops import dispatch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cosine(u, v):
    lengths = math.hypot(*u) * math.hypot(*v)
    return sum(a * b for a, b in zip(u, v, strict=True)) / lengths if lengths else 0.0


def loops(query, keys, k, *, groups=1, bias=None, mask=None, metric="cosine", aggregate="mean", weighting="ratio",
          temperature=1.0, key_slot=None):  # fmt: skip
    """The specification in plain Python: one query, group and slot at a time. Returns slot IDs and weights [B, k]."""
    if key_slot is not None:
        return loops_over_keys(query, keys, k, key_slot, mask, groups=groups, bias=bias, metric=metric,
                               weighting=weighting, temperature=temperature)  # fmt: skip
    ids, weights = [], []
    slots, d = range(len(keys)), query.shape[1] // groups
    for b, q in enumerate(query.tolist()):
        allowed = [p for p in slots if mask is None or mask.expand(len(query), -1)[b, p]]
        score = dict.fromkeys(slots, 0.0)
        if metric == "dot":
            for p in slots:
                score[p] = sum(u * v for u, v in zip(q, keys[p].tolist(), strict=True))
                score[p] += 0.0 if bias is None else float(bias[p])
        else:
            kept = set()
            for g in range(groups):
                part = slice(g * d, (g + 1) * d)
                near = {p: cosine(q[part], keys[p].tolist()[part]) for p in allowed}
                top = sorted(allowed, key=lambda p: (-near[p], p))[: k if aggregate == "vote" else None]
                kept.update(top)
                for p in top:
                    score[p] += near[p] / groups
            allowed = sorted(kept)
        found = sorted(allowed, key=lambda p: (-score[p], p))[:k]
        if weighting == "softmax":
            share = [math.exp((score[p] - score[found[0]]) / temperature) for p in found]
        else:
            share = [max(score[p], 0.0) for p in found]
            share = share if any(share) else [1.0] * len(found)
        ids.append(found + [-1] * (k - len(found)))
        weights.append([s / sum(share) for s in share] + [0.0] * (k - len(found)))
    shape = (len(query), k)
    return torch.tensor(ids, dtype=torch.int64).view(shape), torch.tensor(weights, dtype=torch.float32).view(shape)


def loops_over_keys(query, keys, k, key_slot, mask, *, groups, bias, metric, weighting, temperature):
    """`loops` for slots with several keys: a slot has the score of its best key."""
    ids, weights, d = [], [], query.shape[1] // groups
    for b, q in enumerate(query.tolist()):
        score = {}
        for n, p in enumerate(key_slot.tolist()):
            if mask is not None and not mask.expand(len(query), -1)[b, p]:
                continue
            key = keys[n].tolist()
            if metric == "dot":
                own = sum(u * v for u, v in zip(q, key, strict=True)) + (0.0 if bias is None else float(bias[n]))
            else:
                own = sum(cosine(q[g * d : (g + 1) * d], key[g * d : (g + 1) * d]) for g in range(groups)) / groups
            score[p] = max(own, score.get(p, -math.inf))
        found = sorted(score, key=lambda p: (-score[p], p))[:k]
        share = [max(score[p], 0.0) for p in found]
        share = share if any(share) else [1.0] * len(found)
        if weighting == "softmax":
            share = [math.exp((score[p] - score[found[0]]) / temperature) for p in found]
        ids.append(found + [-1] * (k - len(found)))
        weights.append([s / sum(share) for s in share] + [0.0] * (k - len(found)))
    shape = (len(query), k)
    return torch.tensor(ids, dtype=torch.int64).view(shape), torch.tensor(weights, dtype=torch.float32).view(shape)


def assert_same_route(route, expected, device, tolerance=2e-5):
    assert route.slot_ids.dtype == torch.int64
    assert route.weights.dtype == torch.float32
    assert route.slot_ids.device.type == route.weights.device.type == device
    assert torch.equal(route.slot_ids.cpu(), expected[0].cpu())
    torch.testing.assert_close(route.weights.cpu(), expected[1].cpu(), rtol=tolerance, atol=tolerance)


def check(query, keys, k, device, **options):
    """Compare a call with the loops, the reference backend and (bit for bit) prepared keys; returns its route."""
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    args = (query.to(device), keys.to(device), k)
    route = ops.retrieve(*args, **moved)
    assert_same_route(route, loops(query, keys, k, **options), device)
    with ops.use_backend("reference"):
        assert_same_route(route, ops.retrieve(*args, **moved), device)
    how = {name: options[name] for name in ("groups", "metric") if name in options}
    prepared = ops.prepare_keys(args[1], key_slot=moved.pop("key_slot", None), **how)
    for got, expected in zip(ops.retrieve(args[0], prepared, k, **moved), route, strict=True):
        assert torch.equal(got, expected)
    return route


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


COSINE = {
    "one group": {},
    "mean over groups": {"groups": 3},
    "vote over groups": {"groups": 3, "aggregate": "vote"},
    "softmax": {"groups": 2, "weighting": "softmax", "temperature": 0.1},
}
DOT = {
    "dot": {"metric": "dot"},
    "dot with bias": {"metric": "dot", "bias": 9 * normal(11, seed=2)},
    "dot with softmax": {"metric": "dot", "bias": normal(11, seed=2), "weighting": "softmax", "temperature": 3.0},
}
OPTIONS = COSINE | DOT


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("mask", [None, normal(11, seed=3) > 0, normal(5, 11, seed=4) > 0.5], ids=["", "P", "BP"])
@pytest.mark.parametrize("k", [1, 3, 11, 14])
def test_each_option_and_mask_equals_the_specification(device, options, mask, k):
    check(normal(5, 42), normal(11, 42, seed=1), k, device, mask=mask, **options)


@pytest.mark.parametrize("options", COSINE.values(), ids=COSINE.keys())
@pytest.mark.parametrize(("B", "P", "D"), [(1, 1, 6), (1, 70, 384), (33, 67, 66), (2, 129, 1026), (0, 4, 6), (2, 0, 6)])
def test_odd_sizes_and_empty_batch_and_pool_equal_the_specification(device, options, B, P, D):
    check(normal(B, D), normal(P, D, seed=1), 5, device, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{"groups": 3}, {"metric": "dot", "weighting": "softmax"}], ids=["cosine", "dot"])
def test_every_float_type_equals_the_specification_on_the_same_numbers(device, dtype, options):
    check(normal(4, 48).to(dtype), normal(20, 48, seed=1).to(dtype), 4, device, **options)


def test_non_contiguous_query_and_keys_equal_the_specification(device):
    check(normal(24, 4).T, normal(9, 48, seed=1)[:, ::2], 3, device, groups=2)


SEVERAL = {name: options for name, options in OPTIONS.items() if "vote" not in name}


@pytest.mark.parametrize("options", SEVERAL.values(), ids=SEVERAL.keys())
@pytest.mark.parametrize("mask", [None, normal(7, seed=3) > -0.5, normal(5, 7, seed=4) > 0.0], ids=["", "P", "BP"])
@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_a_slot_of_several_keys_has_its_best_keys_score(device, options, mask, k):
    """Of seven slots, the third has four keys, the fifth none, the others one or two."""
    key_slot = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 5, 6, 6])
    check(normal(5, 42), normal(11, 42, seed=1), k, device, mask=mask, key_slot=key_slot, **options)


@pytest.mark.parametrize(("B", "slots", "most"), [(33, 9, 31), (1, 3, 60), (2, 0, 1), (0, 2, 2), (3, 70, 1)])
def test_many_keys_a_slot_empty_batch_and_pool_equal_the_specification(device, B, slots, most):
    counts = torch.randint(1, most + 1, (slots,), generator=torch.Generator().manual_seed(0))
    key_slot = torch.arange(slots).repeat_interleave(counts)
    check(normal(B, 24), normal(len(key_slot), 24, seed=1), 3, device, groups=2, key_slot=key_slot)


def test_a_backend_that_takes_key_slot_is_chosen_by_k_and_nobody_counts_the_keys_of_a_slot(monkeypatch):
    module, sizes = sys.modules["slm_fast.ops.retrieve"], []
    key_slot = torch.arange(3).repeat_interleave(40)  # the best 2 slots may span 41 keys, more than a warp keeps
    query, keys, chosen = normal(2, 3072), normal(120, 3072, seed=1), dispatch.chosen
    monkeypatch.setattr(dispatch, "INTERPRETED", True)  # makes the CPU choose by size too
    monkeypatch.setattr(module.dispatch, "chosen", lambda *asked: (sizes.append(asked[2]), chosen(*asked))[1])
    counted = module.most_keys
    monkeypatch.setattr(module, "most_keys", lambda key_slot: pytest.fail("counted"))
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, 2, metric="dot", key_slot=key_slot)
    assert sizes == ["few"]
    sizes.clear()
    monkeypatch.setattr(module, "most_keys", counted)
    others = [replace(b, takes_key_slot=False) for b in dispatch.BACKENDS if b.name == "reference"]
    monkeypatch.setattr(dispatch, "BACKENDS", others)
    with ops.use_backend("reference"):
        assert_same_route(ops.retrieve(query, keys, 2, metric="dot", key_slot=key_slot), expected, "cpu")
    assert sizes == ["few", "other"]


@pytest.mark.parametrize("B", [1, 40])
def test_whatever_byte_a_mask_is_true_with_the_slot_may_be_returned(B):
    true = torch.zeros(B, 100, dtype=torch.uint8)
    true[:, 70], true[:, 71], true[:, 10] = 255, 2, 1
    route = ops.retrieve(normal(B, 8), normal(100, 8, seed=1), 4, mask=true.view(torch.bool))
    assert route.slot_ids.sort().values.tolist() == [[-1, 10, 70, 71]] * B


@pytest.mark.parametrize("B", [3, 40])
@pytest.mark.parametrize("D", [64, 1000])
@pytest.mark.parametrize("scales", [(1e-22, 1e-23), (1e15, 1e-24), (1e-24, 1e15)], ids=str)
def test_numbers_whose_products_or_squares_are_0_in_float32_are_ranked_by_what_they_are(B, D, scales):
    query, keys = scales[0] * normal(1, D).abs().expand(B, D), scales[1] * normal(1, D).abs()
    keys = keys * (1 + normal(500, D, seed=1) * (1e-6 if max(scales) > 1 else 1))
    route = ops.retrieve(query, keys, 3, metric="dot")
    with ops.use_backend("reference"):
        assert route.slot_ids.tolist() == ops.retrieve(query, keys, 3, metric="dot").slot_ids.tolist()


def test_of_slots_with_equal_best_keys_the_lower_comes_first(device):
    query, key = normal(1, 12).abs(), normal(1, 12, seed=1).abs()
    keys = torch.cat([-key, key, key, -key, key])
    route = check(query, keys, 3, device, key_slot=torch.tensor([0, 0, 1, 1, 2]))
    assert route.slot_ids.tolist() == [[0, 1, 2]]


def test_any_shape_full_of_exact_ties_equals_the_specification(device, interpreted):
    """Entries are -1 or 1, and some keys zero: scores are exact in float32, so ties hold in any arithmetic."""

    @settings(deadline=None, derandomize=True, max_examples=25 if interpreted else 120)
    @given(data=st.data())
    def equals(data):
        exact_ties(device, data.draw)

    equals()


def exact_ties(device, draw):
    B, P, k = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 15))
    groups, d = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 4, 16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    query, keys = (torch.randint(2, (rows, groups * d), generator=random) * 2.0 - 1 for rows in (B, P))
    keys *= torch.randint(4, (P, 1), generator=random) > 0
    options = {
        "weighting": draw(st.sampled_from(["ratio", "softmax"])),
        "temperature": draw(st.sampled_from([0.25, 1.0, 4.0])),
        "mask": draw(
            st.sampled_from([None, torch.rand(P, generator=random) > 0.4, torch.rand(B, P, generator=random) > 0.4])
        ),
    }
    if draw(st.booleans()):
        options |= {"groups": groups, "aggregate": draw(st.sampled_from(["mean", "vote"]))}
    else:
        options |= {"metric": "dot", "bias": torch.randint(-4, 5, (P,), generator=random) / 2}
    if options.get("aggregate") != "vote" and draw(st.booleans()):
        options["key_slot"] = torch.randint(P, (P,), generator=random).sort().values
    route = check(query, keys, k, device, **options)
    found = (route.slot_ids >= 0).any(1)
    assert torch.allclose(route.weights.sum(1), found.float(), atol=1e-5)


@pytest.mark.parametrize("options", COSINE.values(), ids=COSINE.keys())
@pytest.mark.parametrize(("B", "P", "D"), [(6, 26, 156), (5, 55, 102), (1, 23, 150), (2, 29, 24)])
def test_duplicated_keys_of_any_numbers_come_lower_id_first(device, options, B, P, D):
    query, key = normal(B, D), normal(1, D, seed=1)
    ids = ops.retrieve(query.to(device), key.repeat(P, 1).to(device), P, **options).slot_ids
    assert torch.equal(ids.cpu(), torch.arange(P).expand(B, P))


@pytest.mark.parametrize("options", COSINE.values(), ids=COSINE.keys())
def test_cosine_does_not_depend_on_the_length_of_query_or_keys(device, options):
    query, keys = normal(4, 24).to(device), normal(9, 24, seed=1).to(device)
    lengths = torch.linspace(0.01, 300, 9, device=device)[:, None]
    assert_same_route(ops.retrieve(query * 7e4, keys * lengths, 4, **options), ops.retrieve(query, keys, 4, **options),
                      device, 1e-4)  # fmt: skip


def test_a_query_of_length_zero_takes_the_lowest_ids_uniformly(device):
    route = check(torch.zeros(2, 8), normal(5, 8), 4, device, groups=2)
    assert route.slot_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_ratio_is_uniform_when_no_score_is_positive(device):
    query = torch.ones(1, 4)
    route = check(query, -query * torch.tensor([[1.0], [2.0], [3.0]]), 3, device)
    assert torch.allclose(route.weights.cpu(), torch.full((1, 3), 1 / 3))


def test_vote_never_returns_a_slot_that_no_group_kept(device):
    query = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    keys = torch.tensor([[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [0.9, 0.1, 0.9, 0.1]])
    assert check(query, keys, 1, device, groups=2).slot_ids.tolist() == [[2]]
    assert check(query, keys, 1, device, groups=2, aggregate="vote").slot_ids.tolist() == [[0]]


def test_a_fully_masked_row_gets_no_slot_and_no_weight(device):
    mask = torch.tensor([[True] * 3, [False] * 3])
    for options in COSINE.values():
        route = check(normal(2, 6), normal(3, 6, seed=1), 2, device, mask=mask, **options)
        assert route.slot_ids[1].tolist() == [-1, -1]
        assert route.weights[1].tolist() == [0.0, 0.0]


def test_no_gradient_flows_through_a_route(device):
    route = ops.retrieve(normal(2, 6).to(device).requires_grad_(), normal(3, 6).to(device).requires_grad_(), 2)
    assert not route.weights.requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_autocast_does_not_change_a_route(device, options):
    query, keys = normal(64, 384).to(device), normal(11, 384, seed=1).to(device)
    options = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    expected = ops.retrieve(query, keys, 5, **options)
    with torch.autocast(device, torch.bfloat16):
        assert_same_route(ops.retrieve(query, keys, 5, **options), expected, device)


@pytest.mark.parametrize("aggregate", ["mean", "vote"])
@pytest.mark.parametrize("P", [9, 300])
def test_a_group_of_a_key_that_is_not_a_number_has_cosine_0(device, interpreted, P, aggregate):
    query, keys = normal(5 if interpreted else 33, 24).to(device), normal(P, 24, seed=1).to(device)
    keys[2, 5], keys[P - 1] = torch.nan, torch.nan
    usable = keys.clone()
    usable[2, :8], usable[P - 1] = 0, 0
    for k in (1, 4):
        expected = ops.retrieve(query, usable, k, groups=3, aggregate=aggregate)
        for asked in (keys, ops.prepare_keys(keys, groups=3)):
            assert_same_route(ops.retrieve(query, asked, k, groups=3, aggregate=aggregate), expected, device)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_query_that_is_not_finite_is_an_error_that_names_the_row(device, number):
    if device != "cpu":
        pytest.skip("on an accelerator the check would wait for the device")
    query = torch.ones(3, 4)
    query[1, 2] = number
    with pytest.raises(InputError, match=r"^query: row 1 "):
        ops.retrieve(query, torch.ones(2, 4), 1)


ONES = torch.ones
ERRORS = [
    ("query", {"query": ONES(8)}),
    ("query", {"query": ONES(2, 8, dtype=torch.int64)}),
    ("keys", {"keys": ONES(8)}),
    ("keys", {"keys": ONES(3, 7)}),
    ("keys", {"keys": ONES(3, 8, dtype=torch.float64)}),
    ("keys", {"keys": ONES(3, 8, device="meta")}),
    ("k", {"k": 0}),
    ("groups", {"groups": 3}),
    ("groups", {"groups": 0}),
    ("metric", {"metric": "euclid"}),
    ("metric", {"metric": "dot", "groups": 2}),
    ("metric", {"metric": "dot", "aggregate": "vote"}),
    ("aggregate", {"aggregate": "max"}),
    ("weighting", {"weighting": "none"}),
    *(("temperature", {"temperature": t}) for t in (0.0, -1.0, math.nan, math.inf)),
    ("bias", {"bias": ONES(3)}),
    ("bias", {"metric": "dot", "bias": ONES(2)}),
    ("bias", {"metric": "dot", "bias": ONES(3, device="meta")}),
    ("mask", {"mask": ONES(2, dtype=torch.bool)}),
    ("mask", {"mask": ONES(3, 2, dtype=torch.bool), "key_slot": torch.tensor([0, 0, 1])}),
    ("key_slot", {"key_slot": torch.tensor([0, 1])}),
    ("key_slot", {"key_slot": ONES(3)}),
    ("key_slot", {"key_slot": torch.tensor([0, 2, 1])}),
    ("key_slot", {"key_slot": torch.tensor([-1, 0, 1])}),
    ("key_slot", {"key_slot": torch.tensor([0, 1, 2]), "mask": ONES(2, dtype=torch.bool)}),
    ("key_slot", {"key_slot": torch.tensor([0, 1, 2]), "aggregate": "vote"}),
    ("mask", {"mask": ONES(3, 2, dtype=torch.bool)}),
    ("mask", {"mask": ONES(3)}),
    ("mask", {"mask": ONES(3, dtype=torch.bool, device="meta")}),
]


@pytest.mark.parametrize(("name", "wrong"), ERRORS)
def test_each_wrong_argument_is_an_error_that_names_it(name, wrong):
    call = {"query": ONES(2, 8), "keys": ONES(3, 8), "k": 2} | wrong
    with pytest.raises(InputError, match=rf"^{name}: .*"):
        ops.retrieve(**call)


def test_keys_prepared_for_other_groups_or_that_cannot_be_are_an_error():
    with pytest.raises(InputError, match=r"^groups: expected 2, as the keys were prepared for, got 4$"):
        ops.retrieve(ONES(2, 8), ops.prepare_keys(ONES(3, 8), groups=2), 1, groups=4)
    other = torch.tensor([0, 1, 1])
    with pytest.raises(InputError, match=r"^key_slot: the keys were prepared with one of their own$"):
        ops.retrieve(ONES(2, 8), ops.prepare_keys(ONES(3, 8), key_slot=torch.tensor([0, 0, 1])), 1, key_slot=other)
    with pytest.raises(InputError, match=r"^key_slot: expected slots in rising order from 0$"):
        ops.prepare_keys(ONES(3, 8), key_slot=other.flip(0))
    for name, keys in (("keys", ONES(3)), ("keys", ONES(3, 8, dtype=torch.int64)), ("groups", ONES(3, 7))):
        with pytest.raises(InputError, match=rf"^{name}: "):
            ops.prepare_keys(keys, groups=2)
    with pytest.raises(InputError, match=r"^metric: groups and aggregate='vote' go with 'cosine', got 'dot'$"):
        ops.prepare_keys(ONES(3, 8), groups=2, metric="dot")


def test_it_compiles_into_one_graph(device):
    query, keys = normal(3, 8).to(device), normal(5, 8).to(device)
    compiled = torch.compile(lambda q, p: ops.retrieve(q, p, 2, groups=2), fullgraph=True, backend="aot_eager")
    several = ops.prepare_keys(keys, groups=2, key_slot=torch.tensor([0, 0, 1, 2, 2], device=device))
    for asked in (keys, ops.prepare_keys(keys, groups=2), several):
        torch.compiler.reset()
        assert_same_route(compiled(query, asked), ops.retrieve(query, asked, 2, groups=2), device)
    by_product = torch.compile(lambda q, p: ops.retrieve(q, p, 2, metric="dot"), fullgraph=True, backend="aot_eager")
    asked = ops.prepare_keys(keys, metric="dot")
    assert_same_route(by_product(query, asked), ops.retrieve(query, asked, 2, metric="dot"), device)
