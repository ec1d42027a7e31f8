"""Routers: routes and distances compared with closed forms, exact removal of tasks, and degenerate or invalid input."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from gaussians import WIDTH, closed_form, draw, softmax
from torch import Tensor

from slm_fast import ops
from slm_fast.dtkr import DtkrRouter, orthogonal_keys
from slm_fast.errors import InputError, WorkError
from slm_fast.router import GaussianRouter, percentiles, share_below

CPU = torch.device("cpu")


def gaussian(*queries: Tensor, slots: int = 1, **options: float) -> GaussianRouter:
    router = GaussianRouter(**options)
    router.load([router.fit(query, slots, seed=0) for query in queries], CPU)
    return router


# Gaussian


@pytest.mark.parametrize("rows", [(5, 9, 400), (60, 61, 62), (3, 3, 3)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_gaussian_routes_equal_linear_discriminant_analysis(rows: tuple[int, ...], k: int) -> None:
    queries = [draw(n, seed) for seed, n in enumerate(rows)]
    asked = torch.cat([draw(20, seed) for seed in range(4)])
    route = gaussian(*queries, k=k, temperature=3.0).route(asked)
    scores = closed_form(queries, asked)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert route.slot_ids.tolist() == best.tolist()
    expected = softmax(np.take_along_axis(scores, best, 1) / 3.0)
    np.testing.assert_allclose(route.weights.numpy(), expected, atol=2e-5)


def test_gaussian_scores_stay_exact_far_from_the_origin() -> None:
    shift = 300.0
    queries = [draw(50, seed) + shift for seed in range(3)]
    asked = torch.cat([draw(20, seed) + shift for seed in range(3)])
    route = gaussian(*queries, k=3, temperature=3.0).route(asked)
    expected = softmax(closed_form(queries, asked) / 3.0)
    np.testing.assert_allclose(route.weights.numpy(), np.sort(expected)[:, ::-1], atol=1e-3)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_rows_that_may_have_one_slot_each_get_what_retrieving_it_gives(k: int) -> None:
    router = gaussian(*(draw(20, seed) for seed in range(3)), k=k)
    asked, mask = draw(4, 9), torch.eye(3, dtype=torch.bool)[[2, 0, 0, 1]]
    given = {"bias": router.bias, "metric": "dot", "weighting": "softmax"}
    for rows in (4, 4, 1, 0):  # the first time, keys are made
        expected = ops.retrieve(asked[:rows] - router.centre, router.keys, k, mask=mask[:rows], **given)
        for found, right in zip(router.route(asked[:rows], mask[:rows]), expected, strict=True):
            assert (found.dtype, found.tolist()) == (right.dtype, right.tolist())
    mask[0] = torch.tensor([True, False, True])  # another number of slots in one row
    expected = ops.retrieve(asked - router.centre, router.keys, k, mask=mask, temperature=4.0, **given)
    assert all(map(torch.equal, router.route(asked, mask), expected))
    mask[1] = False
    assert router.route(asked, mask).slot_ids[1].tolist() == [-1] * k


def test_several_slots_a_task_are_its_clusters_under_one_covariance() -> None:
    clusters = [draw(40, seed, mean=8.0) for seed in range(6)]
    queries = [torch.cat(clusters[:3]), torch.cat(clusters[3:])]
    router = gaussian(*queries, slots=3, k=6, temperature=3.0)
    assert router.task_of_slot == [0, 0, 0, 1, 1, 1]
    assert router.parts[0]["count"].tolist() == [40, 40, 40]
    asked = torch.cat([draw(20, seed, mean=8.0) for seed in range(6)])
    route = router.route(asked)
    expected = softmax(closed_form(clusters, asked) / 3.0)
    np.testing.assert_allclose(route.weights.numpy(), np.sort(expected)[:, ::-1], atol=2e-5)
    slot_of_cluster = route.slot_ids[:, 0].view(6, 20).mode(1).values  # clusters may come in any order
    assert slot_of_cluster[:3].sort().values.tolist() == [0, 1, 2]
    assert slot_of_cluster[3:].sort().values.tolist() == [3, 4, 5]


def test_a_tasks_part_is_its_own_count_mean_and_packed_scatter() -> None:
    query = draw(33, 1)
    part = GaussianRouter().fit(query, 1, seed=0)
    centred = query.double() - query.double().mean(0)
    scatter = centred.T @ centred
    assert {name: list(tensor.shape) for name, tensor in part.items()} == {
        "count": [1], "mean": [1, WIDTH], "mean_slot": [1], "scatter": [WIDTH * (WIDTH + 1) // 2], "distance": [101],
    }  # fmt: skip
    assert part["count"].item() == 33
    torch.testing.assert_close(part["mean"][0], query.double().mean(0).float())
    rows, columns = np.triu_indices(WIDTH)
    np.testing.assert_allclose(part["scatter"], scatter.numpy()[rows, columns], rtol=1e-6, atol=1e-5)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in part.values())


@pytest.mark.parametrize("slots", [1, 3])
def test_the_same_queries_and_seed_give_the_same_part_bit_for_bit(slots: int) -> None:
    first, second = (GaussianRouter().fit(draw(90, 1), slots, seed=5) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_task_added_and_taken_away_leaves_every_bit_of_the_router_as_it_was() -> None:
    router = GaussianRouter()
    parts = [router.fit(draw(50 + seed, seed), 1, seed=0) for seed in range(4)]
    kept = [parts[0], parts[1], parts[3]]
    fresh = GaussianRouter()
    fresh.load(kept, CPU)
    router.load(parts, CPU)
    changed = router.keys.clone()
    router.load(kept, CPU)
    assert changed.shape != router.keys.shape
    for name in ("keys", "bias", "centre"):
        assert torch.equal(getattr(router, name), getattr(fresh, name))
    asked = draw(30, 9)
    assert torch.equal(router.route(asked).weights, fresh.route(asked).weights)


def test_a_task_stands_where_it_stands_however_its_neighbours_are_ordered() -> None:
    queries = [draw(50, seed) for seed in range(3)]
    asked = draw(30, 9)
    for order in permutations(range(3)):
        route = gaussian(*(queries[i] for i in order), k=3).route(asked)
        as_first = torch.tensor(order)[route.slot_ids]
        expected = gaussian(*queries, k=3).route(asked)
        assert torch.equal(as_first, expected.slot_ids)
        torch.testing.assert_close(route.weights, expected.weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_single_task_takes_every_query(k: int) -> None:
    route = gaussian(draw(20, 1), k=k).route(draw(7, 2))
    assert route.slot_ids.tolist() == [[0] + [-1] * (k - 1)] * 7
    assert route.weights.tolist() == [[1.0] + [0.0] * (k - 1)] * 7


def test_one_row_is_enough_for_a_task() -> None:
    queries = [draw(1, 1, mean=5.0), draw(1, 2, mean=5.0)]
    route = gaussian(*queries).route(torch.cat(queries))
    assert route.slot_ids[:, 0].tolist() == [0, 1]


def test_rows_that_are_all_alike_still_make_a_task() -> None:
    queries = [draw(1, seed).repeat(9, 1) for seed in range(2)] + [draw(50, 2)]
    for chosen in (queries[:2], queries):
        route = gaussian(*chosen).route(torch.stack([query[0] for query in chosen]))
        assert route.slot_ids[:, 0].tolist() == list(range(len(chosen)))
        assert route.weights.isfinite().all()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("alike", ["all rows", "but two", "every second"])
def test_fewer_distinct_rows_than_slots_still_make_a_task_that_routes(alike: str) -> None:
    query = draw(24, 1)
    if alike == "every second":
        query[1::2] = query[1]
    else:
        query[1 if alike == "all rows" else 2 :] = query[0]
    router = GaussianRouter()
    part = router.fit(query, 3, seed=0)
    assert {name for name, tensor in part.items() if not tensor.isfinite().all()} == set()
    router.load([part, router.fit(draw(50, 2), 1, seed=0)], CPU)
    assert router.route(query).slot_ids[:, 0].max() < 3


@pytest.mark.parametrize("rows", [1, 2])
def test_more_slots_than_rows_is_a_wrong_call(rows: int) -> None:
    with pytest.raises(InputError, match=f"slots: 3 slots need at least as many rows, got {rows}"):
        GaussianRouter().fit(draw(rows, 1), 3, seed=0)


def test_queries_of_the_task_lie_within_its_distances_and_others_beyond() -> None:
    router = gaussian(draw(400, 1), draw(300, 2))
    unseen = draw(800, 1)[400:]  # rows of the same task, not used in fitting
    slot = torch.zeros(400, dtype=torch.int64)
    distance = router.distance(unseen, slot)
    assert (distance > 0.99).float().mean() < 0.05
    assert 0.3 < (distance > 0.5).float().mean() < 0.7
    assert (router.distance(draw(400, 3, mean=3.0), slot) > 1.0).all()


def test_distance_is_mahalanobis_in_the_tasks_own_covariance_whatever_else_is_known() -> None:
    query, asked = draw(200, 1), draw(20, 5)
    slot = torch.zeros(20, dtype=torch.int64)
    alone = gaussian(query).distance(asked, slot)
    beside = gaussian(query, draw(90, 2, mean=9.0)).distance(asked, slot)
    assert torch.equal(alone, beside)
    expected = torch.from_numpy(np.sqrt(-2 * closed_form([query], asked)[:, 0]))
    limits = gaussian(query).parts[0]["distance"]
    np.testing.assert_allclose(alone, share_below(expected, limits), atol=1e-3)
    assert 0.1 < alone.std() < 0.5


def test_a_share_is_where_a_distance_lies_among_percentiles() -> None:
    limits = torch.linspace(2.0, 4.0, 101)
    given = torch.tensor([-1.0, 2.0, 2.01, 3.0, 4.0, 4.5, torch.inf])
    found = share_below(given, limits)
    np.testing.assert_allclose(found[:-1], [0.0, 0.0, 0.005, 0.5, 1.0, 1.5], atol=1e-6)
    assert found[-1] == torch.inf
    steps = torch.cat([torch.zeros(51), torch.ones(50)])  # half of the values are 0, the other half 1
    assert share_below(torch.tensor([0.0, 1e-6, 1.0, 1.1]), steps).tolist()[:1] == [0.0]
    assert (share_below(torch.tensor([0.0, 1e-6, 1.0, 1.1]), steps) > 0.5).tolist() == [False, True, True, True]
    assert (share_below(torch.tensor([0.0, 1e-6, 1.0, 1.1]), steps) > 1.0).tolist() == [False, False, False, True]
    one = torch.full((101,), 3.0)
    assert share_below(torch.tensor([2.9, 3.0]), one).tolist() == [0.0, 0.0]
    assert share_below(torch.tensor([3.1]), one) > 1.0
    assert share_below(given, torch.full((101,), torch.inf)).tolist() == [0.0] * 7


def test_distance_is_measured_from_the_task_of_the_slot_given() -> None:
    router = gaussian(draw(90, 1), draw(90, 2), slots=2)
    asked = draw(6, 1)
    found = router.distance(asked, torch.tensor([0, 1, 2, 3, 0, 2]))
    for i, task in enumerate([0, 0, 1, 1, 0, 1]):
        alone = GaussianRouter()
        alone.load([router.parts[task]], CPU)
        torch.testing.assert_close(found[i : i + 1], alone.distance(asked[i : i + 1], torch.tensor([0])))


def test_the_distances_kept_of_a_task_are_those_of_each_half_of_its_rows_from_the_other() -> None:
    query = draw(41, 1)
    halves = query[0::2], query[1::2]
    squared = [-2 * closed_form([fitted], held_out)[:, 0] for fitted, held_out in (halves, halves[::-1])]
    expected = np.percentile(np.sqrt(np.concatenate(squared)), np.arange(101))
    found = GaussianRouter().fit(query, 1, seed=0)["distance"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    own = np.sqrt(-2 * closed_form([query], query)[:, 0])
    assert found[50] > np.median(own)  # in-sample distances are smaller, so new rows would seem far


def test_percentiles_are_those_of_numpy() -> None:
    values = torch.randn(57, generator=torch.Generator().manual_seed(0)).double()
    np.testing.assert_allclose(percentiles(values), np.percentile(values, np.arange(101)), rtol=1e-6)


# Dynamic task-related knowledge retrieval (dtkr)


@pytest.mark.parametrize(("slots", "groups"), [(1, 1), (4, 3), (4, 1), (3, 6), (12, 1)])
def test_keys_start_orthogonal_in_each_group(slots: int, groups: int) -> None:
    keys = orthogonal_keys(slots, WIDTH, groups, torch.Generator().manual_seed(0))
    for part in keys.view(slots, groups, -1).unbind(1):
        width = part.shape[1]
        product, size = (part @ part.T, slots) if slots <= width else (part.T @ part, width)
        torch.testing.assert_close(product, torch.eye(size), atol=1e-5, rtol=0)


def dtkr(**options: object) -> DtkrRouter:
    return DtkrRouter(**{"k": 2, "groups": 3, **options})


def test_the_same_queries_and_seed_give_the_same_keys_and_another_seed_others() -> None:
    first, second, other = (dtkr().fit(draw(70, 1), 4, seed)["keys"] for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=1e-2)


def test_key_preparation_brings_the_keys_nearer_to_the_queries() -> None:
    query = draw(200, 1)
    start = dtkr(epochs=0).fit(query, 4, seed=0)["keys"]
    end = dtkr(epochs=20, learning_rate=1e-2).fit(query, 4, seed=0)["keys"]

    def mean_cosine(keys: Tensor) -> float:
        return -float(ops.key_loss(query, keys, 2, groups=3, mask_prob=0.0, seed=0))

    assert mean_cosine(end) > mean_cosine(start) + 0.1
    assert not end.requires_grad


@pytest.mark.parametrize("aggregate", ["mean", "vote"])
def test_the_route_is_grouped_retrieval_over_all_tasks_keys(aggregate: str) -> None:
    router = dtkr(aggregate=aggregate)
    parts = [router.fit(draw(40, seed), 1 + seed, seed=seed) for seed in range(3)]
    router.load(parts, CPU)
    asked = draw(25, 8)
    keys = torch.cat([part["keys"] for part in parts])
    expected = ops.retrieve(asked, keys, 2, groups=3, aggregate=aggregate, metric="cosine", weighting="ratio")
    found = router.route(asked)
    assert torch.equal(found.slot_ids, expected.slot_ids)
    assert torch.equal(found.weights, expected.weights)
    assert router.task_of_slot == [0, 1, 1, 2, 2, 2]


def test_dtkr_distance_is_one_minus_the_cosine_to_the_tasks_nearest_key() -> None:
    router = dtkr()
    parts = [router.fit(draw(60, seed), 2, seed=seed) for seed in range(2)]
    router.load(parts, CPU)
    asked, slots = draw(8, 0), torch.tensor([0, 1, 2, 3] * 2)
    distance = router.distance(asked, slots)
    for i, task in enumerate((slots // 2).tolist()):
        grouped = [parts[task]["keys"].view(2, 3, -1), asked[i].view(1, 3, -1)]
        cosine = torch.nn.functional.cosine_similarity(*grouped, dim=-1).mean(1)
        expected = share_below(1 - cosine.max()[None], parts[task]["distance"])
        torch.testing.assert_close(distance[i : i + 1], expected.float(), atol=1e-4, rtol=1e-4)


def test_groups_that_do_not_divide_the_width_are_a_wrong_call() -> None:
    with pytest.raises(InputError, match="groups: expected a divisor of the query width 12, got 5"):
        dtkr(groups=5).fit(draw(9, 1), 2, seed=0)


# Both routers


def loaded(kind: str) -> GaussianRouter | DtkrRouter:
    router = {"gaussian": GaussianRouter(k=3), "dtkr": dtkr(k=3)}[kind]
    router.load([router.fit(draw(40, seed), 2, seed=seed) for seed in range(3)], CPU)
    return router


@pytest.mark.parametrize("kind", ["gaussian", "dtkr"])
def test_a_masked_slot_is_never_returned_and_the_others_share_its_weight(kind: str) -> None:
    router = loaded(kind)
    asked = draw(20, 1)
    one = torch.tensor([False, False, True, True, False, False])
    route = router.route(asked, one)
    assert set(route.slot_ids.flatten().tolist()) == {2, 3, -1}
    torch.testing.assert_close(route.weights.sum(1), torch.ones(20))
    each = torch.stack([one, ~one]).repeat(10, 1)
    mixed = router.route(asked, each)
    assert torch.equal(mixed.slot_ids[0::2], route.slot_ids[0::2])
    assert not {2, 3} & set(mixed.slot_ids[1::2].flatten().tolist())


@pytest.mark.parametrize("kind", ["gaussian", "dtkr"])
def test_the_route_of_a_query_does_not_depend_on_its_batch(kind: str) -> None:
    router = loaded(kind)
    asked = draw(33, 4)
    together = router.route(asked)
    for i in range(33):
        alone = router.route(asked[i : i + 1])
        assert torch.equal(alone.slot_ids[0], together.slot_ids[i])
        torch.testing.assert_close(alone.weights[0], together.weights[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["gaussian", "dtkr"])
def test_no_queries_give_no_routes(kind: str) -> None:
    router = loaded(kind)
    route = router.route(torch.empty(0, WIDTH))
    assert list(route.slot_ids.shape) == list(route.weights.shape) == [0, 3]
    assert router.distance(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("kind", ["gaussian", "dtkr"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_is_named_by_its_row(kind: str, bad: float) -> None:
    router = loaded(kind)
    query = draw(9, 1)
    query[6, 3] = bad
    for call in (lambda: router.route(query), lambda: router.fit(query, 2, seed=0)):
        with pytest.raises(WorkError, match="query: row 6 holds a number that is not finite"):
            call()


def test_queries_that_differ_by_rounding_have_no_covariance_of_their_own() -> None:
    query = draw(1, 1).repeat(20, 1)
    near = query * (1 + 2.0**-21 * torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2)))
    slot = torch.zeros(20, dtype=torch.int64)
    assert (gaussian(near).distance(query, slot, 2.0**-18) <= 1.0).all()
    assert (gaussian(near).distance(query + 0.1, slot, 2.0**-18) > 1.0).all()


def test_a_task_whose_distances_cannot_be_computed_is_far_from_everything() -> None:
    router, query = gaussian(draw(30, 1), draw(30, 2)), draw(3, 3)
    part = dict(router.parts[1])
    part["scatter"] = part["scatter"].flip(0) * 1e3
    router.parts[1] = part
    distance = router.distance(query, torch.tensor([0, 1, 0]))
    assert distance.isinf().tolist() == [False, True, False]
