"""The gaussian router over random features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussians import softmax
from models import make_slm, reopened, toy_task
from torch import Tensor

import slm_fast.random_features
from slm_fast.covariance import unpack
from slm_fast.ops.sum_scatters import expand
from slm_fast.random_features import (
    KEPT,
    LABEL_TEMPERATURE,
    MOST_SHRINKAGE,
    PRIOR_ROWS,
    SAMPLE,
    SHRINKAGE,
    RandomFeatureRouter,
    drawn_means,
    feature_matrix,
)
from slm_fast.router import GaussianRouter

CPU, WIDTH, LEADING, FEATURES = torch.device("cpu"), 9, 6, 14
MATRIX = feature_matrix(LEADING, FEATURES, CPU)


def new_router(k: int = 2) -> RandomFeatureRouter:
    return RandomFeatureRouter(k=k, temperature=3.0, matrix=MATRIX)


def draw(labels: Tensor, seed: int, *, centre: float = 0.0) -> Tensor:
    """Queries [N, WIDTH], each drawn around the centre of its label."""
    generator = torch.Generator().manual_seed(seed)
    centres = centre + torch.randn(int(labels.max()) + 1, WIDTH, generator=generator)
    return centres[labels] + 0.6 * torch.randn(len(labels), WIDTH, generator=generator)


LABELS = {"a": torch.arange(40) % 3, "b": torch.arange(31) % 2, "c": torch.zeros(24, dtype=torch.int64)}
QUERIES = {name: draw(labels, i, centre=i) for i, (name, labels) in enumerate(LABELS.items())}


def loaded(*names: str, k: int = 2) -> RandomFeatureRouter:
    router = new_router(k)
    router.load({name: new_router().fit(QUERIES[name], 1, 0, LABELS[name]) for name in names}, CPU)
    return router


def test_features_are_the_query_and_rectified_signed_sums_of_its_first_numbers() -> None:
    query = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    weight = MATRIX.weight
    assert {round(float(value), 6) for value in weight.unique()} == {-round(LEADING**-0.5, 6), round(LEADING**-0.5, 6)}
    expected = torch.cat([query, torch.relu(query[:, :LEADING] @ weight.T)], 1)
    torch.testing.assert_close(new_router().expand(query), expected)
    assert torch.equal(feature_matrix(LEADING, FEATURES, CPU).weight, weight)


def drawn(mean: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Means [M, D] of a task's labels, shrunk towards the mean of all its rows."""
    whole = (count[:, None] * mean).sum(0) / count.sum()
    return whole + (KEPT * count / (count + PRIOR_ROWS))[:, None] * (mean - whole)


def discriminant(router: RandomFeatureRouter, asked: Tensor) -> np.ndarray:
    """Reference scores [B, M] in numpy float64, computed from the router's parts, up to a constant per row."""
    parts = router.parts
    mean = np.concatenate([drawn(part["mean"].double().numpy(), part["count"].double().numpy()) for part in parts])
    scatter = sum(unpack(expand(part["factor"], part["exponent"], part["diagonal"])).numpy() for part in parts)
    freedom = sum(float(part["count"].sum()) for part in parts) - len(mean)
    sample, width = scatter / freedom, mean.shape[1]
    scale, alpha = np.trace(sample) / width, np.mean(sample**2)
    amount = (alpha + scale**2) / ((freedom + 1) * (alpha - scale**2 / width))
    amount = min(MOST_SHRINKAGE, SHRINKAGE * min(1.0, amount))
    covariance = (1 - amount) * sample + amount * scale * np.eye(width)
    apart = router.expand(asked).double().numpy()[:, None] - mean
    return -0.5 * np.einsum("bmd,bmd->bm", apart, np.linalg.solve(covariance, apart[..., None])[..., 0])


def test_a_route_is_by_the_best_mean_of_each_task_under_the_shrunk_covariance() -> None:
    router = loaded("a", "b", "c", k=3)
    asked = torch.cat([query[:7] for query in QUERIES.values()])
    score = discriminant(router, asked)
    by_task = np.stack([score[:, :3].max(1), score[:, 3:5].max(1), score[:, 5]], 1)
    order = np.argsort(-by_task, axis=1, kind="stable")
    route = router.route(asked)
    np.testing.assert_array_equal(route.slot_ids, order)
    np.testing.assert_allclose(route.weights, softmax(np.take_along_axis(by_task, order, 1) / 3.0), atol=2e-4)


def test_label_scores_are_those_of_the_means_and_say_whose_they_are() -> None:
    router = loaded("a", "b")
    asked = QUERIES["a"][:6]
    scores, task, label = router.label_scores(asked)
    assert (task.tolist(), label.tolist()) == ([0, 0, 0, 1, 1], [0, 1, 2, 0, 1])
    expected = discriminant(router, asked) / LABEL_TEMPERATURE
    np.testing.assert_allclose(scores - scores[:, :1], expected - expected[:, :1], atol=1e-4, rtol=1e-4)


def test_of_many_means_those_of_the_routes_tasks_alone_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    router = loaded("a", "b", "c")
    asked = QUERIES["b"][:6]
    everything, task, _ = router.label_scores(asked)
    monkeypatch.setattr(slm_fast.random_features, "MANY_MEANS", 5)
    scores, own, label = router.label_scores(asked, torch.tensor([[2, 1], [1, -1]]))
    assert (own.tolist(), label.tolist()) == ([0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0])  # -1 becomes slot 0 with weight 0
    scores, own, label = router.label_scores(asked, torch.tensor([[2, 1], [1, 2]]))
    assert (own.tolist(), label.tolist()) == ([1, 1, 2], [0, 1, 0])
    torch.testing.assert_close(scores, everything[:, task > 0])


@pytest.mark.parametrize("stored", [[1.0, 0.0, 64.0], [1.0, 0.0, 64.0, 0.0]])
def test_a_part_of_before_constants_were_written_routes_by_its_means_as_they_are(stored: list[float]) -> None:
    router, older = loaded("a", "b", "c"), new_router(2)
    parts = [{name: tensor for name, tensor in part.items() if name != "constants"} for part in router.parts]
    older.load(parts, CPU)
    asked = torch.cat([query[:9] for query in QUERIES.values()])
    plain = new_router(2)
    plain.load([part | {"constants": torch.tensor(stored)} for part in parts], CPU)
    assert torch.equal(older.label_scores(asked)[0], plain.label_scores(asked)[0])
    assert not torch.allclose(older.label_scores(asked)[0], router.label_scores(asked)[0])
    slot = older.route(asked).slot_ids[:, 0]
    assert torch.equal(older.distance(asked, slot), plain.distance(asked, slot))


def test_the_mean_of_a_slot_without_rows_stays_where_it_is() -> None:
    part = new_router().fit(QUERIES["a"][:2].repeat(4, 1), 3, 0)
    assert (part["count"] == 0).any()
    found = drawn_means(part)
    empty = part["count"] == 0
    torch.testing.assert_close(found[empty], part["mean"].double()[empty])
    assert not torch.allclose(found[~empty], part["mean"].double()[~empty])


def test_without_labels_scores_name_none() -> None:
    router = new_router()
    router.load({"free": router.fit(QUERIES["a"], 2, 0)}, CPU)
    _, task, label = router.label_scores(QUERIES["a"][:2])
    assert (task.tolist(), label.tolist()) == ([0, 0], [-1, -1])


@pytest.mark.parametrize("task", [0, 1, 2])
def test_rows_of_the_sample_are_measured_as_if_they_had_been_left_out(task: int) -> None:
    router = loaded("a", "b", "c")
    relative, absolute = router._left_out(task)
    part, sigma = router.parts[task], router.pooled.lower @ router.pooled.lower.T
    mean, query = part["mean"].double(), router.expand(part["sample"]).double()
    counts, whole = (
        part["count"].double().numpy(),
        torch.from_numpy(drawn(mean.numpy(), part["count"].double().numpy())),
    )
    for row, own in enumerate(part["sample_mean"].long().tolist()):
        count, apart = float(part["count"][own]), query[row] - mean[own]
        fewer, left_out = counts.copy(), mean.clone()
        fewer[own] -= 1
        left_out[own] -= apart / (count - 1)
        others = whole.clone()  # leaving the row out changes only its own label's mean
        others[own] = torch.from_numpy(drawn(left_out.numpy(), fewer))[own]
        share = router.pooled.of_a_row * count / (count - 1)
        inverse = torch.linalg.inv(sigma - share * apart.outer(apart))
        towards = others - router.centre.double()
        scores = (query[row] - router.centre.double()) @ inverse @ towards.T
        scores -= ((towards @ inverse) * towards).sum(1) / 2
        left = query[row] - others[own]
        torch.testing.assert_close(-relative[row], scores.max(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(absolute[row], left @ inverse @ left, rtol=1e-3, atol=1e-3)


def test_a_distance_adds_that_from_the_mean_to_that_from_all_means_by_their_widths() -> None:
    router = loaded("a", "b", "c")
    near, far = router._left_out(1)
    asked = torch.cat([query[:20] for query in QUERIES.values()])
    found = router.distance(asked, torch.ones(len(asked), dtype=torch.int64))
    keys = slice(router.first_mean[1], router.first_mean[2])
    query = router.expand(asked).double()
    scores = (query - router.centre.double()) @ router.keys[keys].double().T + router.bias[keys].double()
    apart = query - drawn_means(router.parts[1])[scores.argmax(1)]
    absolute = ((apart @ torch.cholesky_inverse(router.pooled.lower)) * apart).sum(1)
    weight = 0.5 * (near.max() - near.sort().values[len(near) // 2]) / (far.max() - far.sort().values[len(far) // 2])

    def shares(values: Tensor, sample: Tensor) -> Tensor:
        return (values[:, None] > sample).double().mean(1)

    both = shares(weight * absolute - scores.amax(1), near + weight * far)
    expected = torch.maximum(both, shares(absolute / 2, far))
    own = shares(near + weight * far, near + weight * far)  # the sample's rows, between which shares are interpolated
    expected = (expected[:, None] > torch.maximum(own, shares(far / 2, far))).double().mean(1)
    inside = expected < 1  # beyond the sample distances go on
    assert 5 < inside.sum() < len(asked)
    torch.testing.assert_close(found[inside].double(), expected[inside], atol=0.05, rtol=0)


def test_about_the_share_that_is_asked_for_is_kept_of_rows_that_were_not_learned() -> None:
    labels = torch.arange(600) % 4
    queries = [draw(labels, seed, centre=seed) for seed in range(2)]
    router = new_router()
    router.load([router.fit(query[:300], 1, 0, labels[:300]) for query in queries], CPU)
    held_out = torch.cat([query[300:] for query in queries])
    found = router.distance(held_out, router.route(held_out).slot_ids[:, 0])
    for share in (0.5, 0.8, 0.95):
        kept = 1 - float((found > share).float().mean())
        assert abs(kept - share) < 0.06


def test_what_resembles_nothing_is_farther_than_all_that_was_learned() -> None:
    router = loaded("a", "b", "c")
    far = torch.full((1, WIDTH), -60.0)
    assert float(router.distance(far, router.route(far).slot_ids[:, 0])) > 1.0


def test_no_more_of_the_rows_are_kept_than_the_sample_holds() -> None:
    labels = torch.arange(500) % 5
    part = new_router().fit(draw(labels, 0), 1, 0, labels)
    assert len(part["sample"]) == SAMPLE
    assert part["sample_mean"].unique().tolist() == [0, 1, 2, 3, 4]


ODD = {
    "one row a label": (torch.arange(5), None),
    "one row": (torch.zeros(1, dtype=torch.int64), None),
    "rows that are all alike": (torch.arange(8) % 2, lambda query: query[:1].expand(8, -1)),
    "a number that never changes": (torch.arange(12) % 2, lambda query: query.index_fill(1, torch.tensor([2]), 3.0)),
    "numbers of very different size": (torch.arange(30) % 2, lambda query: query * torch.logspace(-4, 4, WIDTH)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tasks_are_learned_and_no_number_is_lost(kind: str) -> None:
    labels, change = ODD[kind]
    query = draw(labels, 3)
    query = query if change is None else change(query).contiguous()
    router = new_router()
    router.load({"odd": router.fit(query, 1, 0, labels), "a": loaded("a").parts[0]}, CPU)
    asked = torch.cat([query, QUERIES["a"][:3], torch.full((1, WIDTH), 1e4)])
    route = router.route(asked)
    assert route.weights.isfinite().all()
    assert router.label_scores(asked)[0].isfinite().all()
    for task in (0, 1):
        assert router.distance(asked, torch.full((len(asked),), task)).isfinite().all()
    assert (router.distance(query, torch.full((len(query),), 1)) <= 1.0).all()


def test_a_store_of_before_there_were_random_features_answers_and_grows_as_it_did(tmp_path: Path) -> None:
    slm = make_slm("bert", features=0)
    slm.learn(toy_task("sea", rows=20), epochs=1)
    slm.learn(toy_task("farm", rows=20), epochs=1)
    slm.save_pretrained(tmp_path / "new")
    manifest = tmp_path / "new" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["model"]["config"]["features"]
    manifest.write_text(json.dumps(content))
    texts = [row.text for topic in ("sea", "farm") for row in toy_task(topic, rows=9, seed=4).rows]
    older = reopened(tmp_path / "new")
    assert older.predict(texts, abstain=0.9) == slm.predict(texts, abstain=0.9)
    older.learn(toy_task("sky", rows=20), epochs=1)
    assert reopened(tmp_path / "new").tasks == ["farm", "sea", "sky"]
    assert "scatter" in older.model.pool.tasks[0].router


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_lone_slot_is_every_rows_route_as_retrieval_finds_it_and_needs_no_keys(k: int) -> None:
    router, query = loaded("a", k=k), QUERIES["b"][:5]
    found = router.route(query)
    assert "discriminant" not in vars(router)
    expected = GaussianRouter.route(router, router.expand(query))
    assert torch.equal(found.slot_ids, expected.slot_ids)
    assert torch.equal(found.weights, expected.weights)
    assert found.slot_ids.dtype == expected.slot_ids.dtype
    assert found.weights.dtype == expected.weights.dtype
