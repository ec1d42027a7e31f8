"""Tests of the task identifiers of EPI and Any-SSR against independent computations of their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.continual.methods.any_ssr import AnySsr
from benchmarks.continual.methods.epi import Epi

Taught = dict[str, tuple[Tensor, Tensor | None]]  # task name -> queries [N, 6], labels [N]


@pytest.fixture
def taught() -> Taught:
    """Three tasks with overlapping queries: one has no labels, another has a label with a single row."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=random)

    def rows(count: int, labels: list[int]) -> tuple[Tensor, Tensor]:
        label = torch.tensor(labels * count)[:count]
        centre = torch.randn(max(labels) + 1, 6, generator=random)[label]
        return (centre + 0.6 * torch.randn(count, 6, generator=random) @ mix).float(), label

    first, second = rows(40, [0, 1]), rows(30, [0, 1, 2])
    second[1][7] = 3
    return {"b": first, "a": second, "free": (rows(25, [0])[0], None)}


def observed(identifier: Epi | AnySsr, taught: Taught) -> Epi | AnySsr:
    for name, (query, labels) in taught.items():
        identifier.observe(name, query, labels)
    identifier.prepare()
    return identifier


def test_epi_finds_the_nearest_class_by_mahalanobis_distance_in_the_average_covariance(taught: Taught) -> None:
    classes, covariances = [], []
    for task, (query, labels) in enumerate(taught.values()):
        own = torch.zeros(len(query)) if labels is None else labels
        rows = [query[own == label].double() for label in own.unique()]
        classes += [(task, part.mean(0)) for part in rows]
        several = [part for part in rows if len(part) > 1]
        spread = [((part - part.mean(0)).T @ (part - part.mean(0))) / (len(part) - 1) for part in several]
        covariances.append(torch.stack(spread).mean(0))
    inverse = torch.stack(covariances).mean(0).inverse()
    assert len(classes) == 2 + 4 + 1
    queries = torch.cat([query for query, _ in taught.values()])
    expected = torch.full((len(queries), 3), torch.inf, dtype=torch.float64)
    for i, query in enumerate(queries.double()):
        for task, mean in classes:
            expected[i, task] = min(expected[i, task], (query - mean) @ inverse @ (query - mean))
    epi = observed(Epi(), taught)
    assert epi.names == ["b", "a", "free"]
    torch.testing.assert_close(epi.distances(queries).double(), expected, rtol=1e-4, atol=1e-4)
    assert epi.identify(queries).tolist() == expected.argmin(1).tolist()
    assert len(set(epi.identify(queries).tolist())) == 3
    assert epi.nbytes == 4 * (6 * 6 + 7 * 6)


def test_epi_finds_the_task_where_directions_were_never_seen() -> None:
    random = torch.Generator().manual_seed(1)
    epi = Epi()
    for name, centre in (("a", 0.0), ("b", 3.0)):
        query = torch.zeros(20, 9)
        query[:, :2] = centre + torch.randn(20, 2, generator=random)
        epi.observe(name, query, None)
    epi.prepare()
    assert epi.identify(torch.tensor([[0.0, 0.1, *[5.0] * 7], [3.0, 2.9, *[-5.0] * 7]])).tolist() == [0, 1]


def targets(taught: Taught) -> Tensor:
    """One-hot task targets of all rows, [N, T]."""
    place = [torch.full((len(query),), i) for i, (query, _) in enumerate(taught.values())]
    return torch.nn.functional.one_hot(torch.cat(place)).double()


def test_any_ssr_is_the_ridge_regression_on_all_tasks_at_once(taught: Taught) -> None:
    ssr = observed(AnySsr(features=50, ridge=0.5, dtype=torch.float64), taught)
    x = torch.cat([ssr.expand(query) for query, _ in taught.values()])
    assert x.min() == 0 < x.max()
    stacked = torch.cat([x, 0.5**0.5 * torch.eye(50, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([targets(taught), torch.zeros(50, 3)])).solution
    torch.testing.assert_close(ssr.weights, expected, rtol=1e-6, atol=1e-6)
    queries = torch.cat([query for query, _ in taught.values()])
    assert ssr.identify(queries).tolist() == (x @ expected).argmax(1).tolist()


def test_any_ssr_is_the_papers_recursion_from_task_to_task(taught: Taught) -> None:
    ssr = observed(AnySsr(features=50, ridge=0.5, dtype=torch.float64), taught)
    inverse, weights = torch.eye(50, dtype=torch.float64) / 0.5, torch.zeros(50, 0, dtype=torch.float64)
    for query, _ in taught.values():
        x = ssr.expand(query)
        weights = torch.nn.functional.pad(weights, (0, 1))
        own = torch.zeros(len(x), weights.shape[1], dtype=torch.float64)
        own[:, -1] = 1
        gain = inverse @ x.T @ (torch.eye(len(x), dtype=torch.float64) + x @ inverse @ x.T).inverse()
        inverse = inverse - gain @ x @ inverse
        weights = weights + inverse @ x.T @ (own - x @ weights)
    torch.testing.assert_close(ssr.weights, weights, rtol=1e-6, atol=1e-6)


def test_any_ssr_does_not_depend_on_the_order_of_tasks(taught: Taught) -> None:
    first = observed(AnySsr(features=50, ridge=0.5), taught)
    second = observed(AnySsr(features=50, ridge=0.5), dict(reversed(taught.items())))
    assert second.names == first.names[::-1]
    torch.testing.assert_close(second.weights, first.weights.flip(1), rtol=1e-3, atol=1e-4)
    queries = torch.cat([query for query, _ in taught.values()])
    assert (2 - second.identify(queries)).tolist() == first.identify(queries).tolist()
    assert first.nbytes == 4 * (50 * 50 + 50 * 3)
