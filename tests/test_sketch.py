"""The sampled tasks, chosen by name, define covariance and centre; other tasks leave existing keys unchanged."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from gaussians import closed_form, draw
from torch import Tensor

import slm_fast.router
import slm_fast.sketch
from slm_fast.covariance import Kept
from slm_fast.errors import WorkError
from slm_fast.random_features import RandomFeatureRouter, feature_matrix
from slm_fast.router import GaussianRouter, Part
from slm_fast.sketch import SAMPLED, sampled

CPU = torch.device("cpu")
NAMES = "abcdefghij"
KINDS = ("gaussian", "features")
BY_HASH = "jdfcbehagi"  # the first three are sampled; the others follow in this order
INSIDE = BY_HASH[:3]


@pytest.fixture(autouse=True)
def of_three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slm_fast.sketch, "SAMPLED", 3)
    monkeypatch.setattr(slm_fast.sketch, "ALL", 3)


def new_router(kind: str, width: int) -> GaussianRouter:
    if kind == "features":
        return RandomFeatureRouter(k=2, matrix=feature_matrix(min(width, 20), 2 * width, CPU))
    return GaussianRouter(k=2)


def parts_of(kind: str, width: int) -> dict[str, Part]:
    """Router parts of tasks with one to four labels, by name."""
    found = {}
    for i, name in enumerate(NAMES):
        labels = torch.arange(30 + 7 * i) % (1 + i % 4)
        found[name] = new_router(kind, width).fit(draw(len(labels), i, width=width), 1, seed=i, labels=labels)
    return found


def loaded(kind: str, width: int, parts: dict[str, Part], names: Iterator[str] | list[str] | str) -> GaussianRouter:
    router = new_router(kind, width)
    router.load({name: parts[name] for name in names}, CPU)
    return router


def answers(router: GaussianRouter, asked: Tensor) -> list[Tensor]:
    """Tensors that determine routing, label scores and distances, and their results."""
    route = router.route(asked)
    found = [*router.discriminant, router.scatter.coarse, router.scatter.fine, *route]
    if isinstance(router, RandomFeatureRouter):
        found += [*router.label_scores(asked), router.pooled.lower]
    for task in range(len(router.names)):
        found.append(router.distance(asked, torch.full((len(asked),), router.task_of_slot.index(task))))
    return found


def assert_same(router: GaussianRouter, fresh: GaussianRouter, asked: Tensor) -> None:
    assert router.names == fresh.names
    assert list(router.sketch.parts) == sampled(fresh.names)
    for mine, theirs in zip(answers(router, asked), answers(fresh, asked), strict=True):
        assert torch.equal(mine, theirs)


# Which tasks are sampled


def test_the_sample_is_the_names_of_lowest_sha256_in_order_whatever_order_they_come_in() -> None:
    names = [f"task-{i}" for i in range(40)]
    expected = sorted(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:3])
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert sampled(names) == expected
    assert (sampled([]), sampled({"b": 1, "a": 2}), SAMPLED) == ([], ["a", "b"], 512)
    assert "".join(sorted(NAMES, key=lambda name: hashlib.sha256(name.encode()).hexdigest())) == BY_HASH


def test_a_name_more_changes_at_most_one_that_is_in_the_sample_for_another() -> None:
    names = [f"task-{i}" for i in range(60)]
    changed = 0
    for i in range(3, len(names)):
        before, after = set(sampled(names[:i])), set(sampled(names[: i + 1]))
        assert (len(after - before), after - before) in ((0, set()), (1, {names[i]}))
        changed += before != after
    assert 1 <= changed <= 20  # the n-th name changes the sample with probability 3 / n


def test_up_to_all_tasks_are_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slm_fast.sketch, "ALL", 7)
    assert [len(sampled(NAMES[:n])) for n in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 3, 3]


# Histories


@pytest.mark.parametrize("width", [3, 17, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_any_history_across_the_boundary_leaves_the_bits_of_a_fresh_router(kind: str, width: int) -> None:
    parts, asked = parts_of(kind, width), draw(5, 3, width=width)
    for seed in range(3):
        rng, older = random.Random(f"{kind} {width} {seed}"), []
        router = loaded(kind, width, parts, rng.sample(NAMES, rng.randrange(7)))
        for _ in range(25):
            some = rng.sample(NAMES, rng.choice((1, 1, 3)))
            gone = [name for name in some if name in router.names]
            router = router.changed({name: parts[name] for name in some if name not in gone}, gone)
            if not router.names:
                continue
            look = rng.choice(("not at all", "a route", "everything"))
            if look == "a route":
                router.route(asked)
            elif look == "everything":
                assert_same(router, loaded(kind, width, parts, router.names), asked)
                older.append(router)
        for router in older[-4:]:
            assert_same(router, loaded(kind, width, parts, router.names), asked)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_learned_anew_under_its_name_has_its_new_keys(kind: str) -> None:
    parts, asked = parts_of(kind, 9), draw(5, 3, width=9)
    router = loaded(kind, 9, parts, NAMES)
    answers(router, asked)
    for name in ("a", "d"):  # outside and inside the sample
        changed = {**parts, name: parts["f"]}
        for again in (
            router.changed({}, [name]).changed({name: parts["f"]}),
            router.changed({name: parts["f"]}, [name]),
        ):
            assert_same(again, loaded(kind, 9, changed, NAMES), asked)


# Cost of a change


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, object]]:
    """Returns a function that counts, since its last call: tasks expanded, covariances inverted, tasks' means read."""
    done: dict[str, list[int]] = {"expanded": [], "inverted": [], "means": []}

    def count(owner: object, attribute: str, kind: str) -> None:
        plain = getattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, lambda *args: done[kind].append(1) or plain(*args))

    count(slm_fast.sketch, "scatter_of", "expanded")
    count(slm_fast.router.torch, "cholesky_inverse", "inverted")
    for owner in (GaussianRouter, RandomFeatureRouter):
        count(owner, "means", "means")

    def told() -> dict[str, object]:
        found = {kind: len(calls) for kind, calls in done.items()}
        for calls in done.values():
            calls.clear()
        return found

    return told


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_outside_the_sample_costs_its_own_keys_alone(kind: str, work: Callable[[], dict]) -> None:
    parts, asked = parts_of(kind, 9), draw(5, 3, width=9)
    router = loaded(kind, 9, parts, "abdefgj")
    router.route(asked)
    assert work() == {"expanded": 3, "inverted": 1, "means": 3 + 7}
    assert router.sketch.inverse is None  # kept only once a task is learned
    router = router.changed({"c": parts["c"]})
    router.route(asked)
    assert work() == {"expanded": 0, "inverted": 1, "means": 1}
    router = router.changed({"h": parts["h"]})
    router.route(asked)
    assert work() == {"expanded": 0, "inverted": 0, "means": 1}
    router = router.changed({}, ["b"]).changed({}, ["h"])
    router.route(asked)
    assert work() == {"expanded": 0, "inverted": 0, "means": 0}
    router = router.changed({}, ["j"])  # another task replaces it in the sample
    assert work() == {"expanded": 2, "inverted": 0, "means": 0}
    router.route(asked)
    assert work() == {"expanded": 0, "inverted": 1, "means": 3 + 6}
    assert router.sketch.inverse is None
    assert router._known is None


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_were_kept_of_some_tasks_are_not_computed_again(kind: str, work: Callable[[], dict]) -> None:
    parts, asked = parts_of(kind, 9), draw(5, 3, width=9)
    most, everything = loaded(kind, 9, parts, "abdfhj"), loaded(kind, 9, parts, NAMES)
    assert most.discriminant
    work()
    router = new_router(kind, 9)
    router.load({name: parts[name] for name in "abdfhj"}, CPU, Kept(keys=most.known_keys))
    router.route(asked)
    assert router.is_kept
    assert work() == {"expanded": 0, "inverted": 0, "means": 0}
    router.load({name: parts[name] for name in NAMES}, CPU, Kept(keys=most.known_keys))
    assert not router.is_kept
    router.route(asked)
    assert work() == {"expanded": 3, "inverted": 1, "means": 3 + 4}
    assert_same(router, everything, asked)


def test_a_sum_that_was_kept_of_other_tasks_is_brought_up_to_date(work: Callable[[], dict]) -> None:
    parts, asked = parts_of("features", 9), draw(5, 3, width=9)
    fresh, lagging = loaded("features", 9, parts, NAMES), loaded("features", 9, parts, "cdj")
    router = new_router("features", 9)
    work()

    def load(names: frozenset[str]) -> None:
        kept = Kept(lambda: (names, lagging.scatter))
        router.load({name: parts[name] for name in NAMES}, CPU, kept)

    load(frozenset("cdj"))
    assert work()["expanded"] == 2  # c is subtracted, f is added
    assert_same(router, fresh, asked)
    work()
    load(frozenset("cdz"))  # z is unknown, so the sum is computed from scratch
    assert work()["expanded"] == 3
    assert_same(router, fresh, asked)


def test_a_task_in_the_sample_that_is_damaged_is_forgotten_and_one_that_would_enter_is_named() -> None:
    parts, asked = parts_of("features", 9), draw(5, 3, width=9)

    class Damaged(dict[str, Tensor]):
        broken = False

        def __getitem__(self, key: str) -> Tensor:
            if self.broken and key == "factor":
                raise WorkError("damaged")
            return super().__getitem__(key)

    parts = {name: Damaged(part) for name, part in parts.items()}
    router = loaded("features", 9, parts, NAMES)
    expected = loaded("features", 9, parts, NAMES.replace("d", ""))
    parts["d"].broken = True
    assert_same(router.changed({}, ["d"]), expected, asked)
    entering = BY_HASH[3]
    parts[entering].broken = True
    with pytest.raises(WorkError, match="damaged"):
        router.changed({}, ["j"])
    parts["d"].broken = False
    router = router.changed({}, [entering]).changed({}, ["j"])
    assert_same(router, loaded("features", 9, parts, set(NAMES) - {"j", entering}), asked)


# Distances


@pytest.mark.parametrize("name", ["d", "b"])
def test_rows_are_left_out_of_the_covariance_where_they_are_in_it(name: str) -> None:
    """Squared distances leave each row out of its task's mean and, if the task is sampled, out of the covariance."""
    width = 6
    router, queries = RandomFeatureRouter(k=2, matrix=feature_matrix(4, 3, CPU)), {}
    for i, task in enumerate(NAMES):
        queries[task] = draw(20 + i, i, width=width)
    router.load({task: router.fit(query, 1, 0) for task, query in queries.items()}, CPU)
    _, far = router._left_out(router.names.index(name))
    part, sigma = router.parts[router.names.index(name)], router.pooled.lower @ router.pooled.lower.T
    query, mean, count = router.expand(part["sample"]).double(), part["mean"].double()[0], float(part["count"][0])
    for row, found in zip(query, far, strict=True):
        apart = row - mean
        covariance = sigma
        if name in INSIDE:
            covariance = sigma - router.pooled.of_a_row * count / (count - 1) * apart.outer(apart)
        left = apart * count / (count - 1)
        torch.testing.assert_close(found, left @ torch.linalg.solve(covariance, left), rtol=1e-6, atol=1e-9)


def test_scores_are_gaussian_log_densities_in_the_covariance_of_the_sample() -> None:
    queries = {name: draw(20 + i, i) for i, name in enumerate(NAMES)}
    router, asked = GaussianRouter(k=2), draw(7, 99)
    router.load({name: router.fit(query, 1, 0) for name, query in queries.items()}, CPU)
    centre, keys, bias = (part.double() for part in router.discriminant)
    scores = (asked.double() - centre) @ keys.T + bias
    inside = sorted(INSIDE)
    expected = torch.from_numpy(closed_form([queries[name] for name in inside], asked))
    own = scores[:, [router.names.index(name) for name in inside]]
    torch.testing.assert_close(own - own[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-3)
    means = torch.stack([queries[name].double().mean(0) for name in inside])
    torch.testing.assert_close(centre, means.mean(0), rtol=1e-5, atol=1e-6)
    precision = torch.linalg.inv(router._lower() @ router._lower().T)
    for place, name in enumerate(router.names):  # keys of all tasks use the same covariance
        apart = queries[name].double().mean(0) - centre
        torch.testing.assert_close(keys[place], precision @ apart, rtol=1e-4, atol=1e-4)
