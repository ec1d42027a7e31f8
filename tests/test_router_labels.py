"""Label means of the gaussian router: compared with the closed form, and on tasks that differ only in label means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussians import WIDTH, closed_form, draw, softmax
from torch import Tensor

from slm_fast.router import GaussianRouter

CPU = torch.device("cpu")


def labelled(rows: int, seed: int, labels: int) -> tuple[Tensor, Tensor]:
    """Queries of one task, each label with a different mean, and their label numbers: ([rows, WIDTH], [rows])."""
    number = torch.arange(rows) % labels
    return torch.cat([draw(1, 1000 * seed + i)[:, :] for i in range(labels)])[number] + draw(
        rows, seed, mean=0.0
    ), number


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_task_is_as_near_as_the_nearest_of_its_labels(k: int) -> None:
    tasks = [labelled(60 + seed, seed, labels) for seed, labels in enumerate((4, 1, 7))]
    router = GaussianRouter(k=k, temperature=3.0)
    router.load([router.fit(query, 1, 0, number) for query, number in tasks], CPU)
    asked = torch.cat([query[:15] for query, _ in tasks])
    groups = [query[number == label] for query, number in tasks for label in range(int(number.max()) + 1)]
    scores = closed_form(groups, asked)  # [B, 4 + 1 + 7]
    best = np.stack([scores[:, :4].max(1), scores[:, 4], scores[:, 5:].max(1)], 1)
    route = router.route(asked)
    order = np.argsort(-best, axis=1, kind="stable")[:, :k]
    assert route.slot_ids.tolist() == order.tolist()
    np.testing.assert_allclose(route.weights, softmax(np.take_along_axis(best, order, 1) / 3.0), atol=2e-5)
    assert router.task_of_slot == [0, 1, 2]


def test_tasks_of_one_mean_are_told_apart_by_their_labels() -> None:
    number = torch.arange(200) % 2
    sides = (2.0 * number - 1)[:, None] * 6
    tasks = [draw(200, seed, mean=0.0) + sides * torch.eye(WIDTH)[axis] for seed, axis in ((1, 0), (2, 1))]
    right = {}
    for name, labels in (("with", number), ("without", None)):
        router = GaussianRouter(k=1)
        router.load([router.fit(query[:100], 1, 0, None if labels is None else labels[:100]) for query in tasks], CPU)
        found = router.route(torch.cat([query[100:] for query in tasks])).slot_ids[:, 0]
        right[name] = float((found == torch.arange(2).repeat_interleave(100)).float().mean())
    assert right["with"] > 0.97
    assert right["without"] < 0.75


def test_labels_within_several_slots_are_in_the_slots_order() -> None:
    query, number = labelled(90, 3, 5)
    router = GaussianRouter(k=3)
    part = router.fit(query, 3, 0, number)
    slot = part["mean_slot"].tolist()
    assert slot == sorted(slot)
    assert set(slot) == {0, 1, 2}
    assert part["count"].sum() == 90
    assert router.slots(part) == 3
    router.load([part, router.fit(draw(40, 1), 1, 0)], CPU)
    assert router.task_of_slot == [0, 0, 0, 1]
    assert set(router.route(draw(30, 1)).slot_ids[:, 0].tolist()) == {3}
    mask = torch.tensor([False, True, True, False])
    assert set(router.route(query, mask).slot_ids.flatten().tolist()) == {-1, 1, 2}


def test_a_part_of_before_labels_had_means_routes_as_it_did() -> None:
    parts = [GaussianRouter().fit(draw(40, seed), 1 + seed, 0) for seed in range(3)]
    old = [{name: tensor for name, tensor in part.items() if name != "mean_slot"} for part in parts]
    routes = []
    for held in (parts, old, [old[0], parts[1], old[2]]):
        router = GaussianRouter(k=4)
        router.load(held, CPU)
        routes.append(router.route(draw(25, 1)))
    for route in routes[1:]:
        assert torch.equal(route.slot_ids, routes[0].slot_ids)
        assert torch.equal(route.weights, routes[0].weights)


@pytest.mark.parametrize("rows", ["a row a label", "one text", "two texts", "a constant feature"])
def test_labels_of_few_or_equal_rows_give_numbers(rows: str) -> None:
    query, number = draw(12, 1), torch.arange(12)
    if rows != "a row a label":
        number = number % 3
        query = {"one text": query[:1].expand(12, -1), "two texts": query[number % 2], "a constant feature": query}[
            rows
        ]
        query = query.clone()
        query[:, 0] = 1.0
    router = GaussianRouter(k=2)
    router.load([router.fit(query, 1, 0, number), router.fit(draw(30, 2), 1, 0)], CPU)
    route = router.route(torch.cat([query, draw(8, 2)]))
    assert route.weights.isfinite().all()
    assert (route.slot_ids[:12, 0] == 0).all()
    assert router.distance(query, route.slot_ids[:12, 0]).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in router.parts[0].values())


def test_held_out_distances_are_to_the_rows_own_label_in_whatever_order_labels_stand() -> None:
    query, number = labelled(200, 5, 2)  # labels alternate row by row
    query = query + 30.0 * number[:, None]
    in_blocks = number.argsort(stable=True)
    turns, blocks = (
        GaussianRouter().fit(query[order], 1, 0, number[order]) for order in (torch.arange(200), in_blocks)
    )
    assert float(turns["distance"][95]) < 2.3 * WIDTH**0.5
    torch.testing.assert_close(turns["distance"], blocks["distance"])
