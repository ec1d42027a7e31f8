"""A router after any sequence of changes is bit-identical to one freshly loaded with the same tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupt import broken_off
from test_router import CPU, WIDTH, draw, dtkr
from torch import Tensor

import slm_fast.covariance
import slm_fast.dtkr
import slm_fast.router
from slm_fast import ops
from slm_fast.covariance import covariance, unpack
from slm_fast.dtkr import DtkrRouter
from slm_fast.errors import InputError, WorkError
from slm_fast.ops import Route
from slm_fast.random_features import RandomFeatureRouter, feature_matrix
from slm_fast.router import GaussianRouter, Part, Router

# Adding and removing tasks


SLOTS = {"a": 1, "b": 3, "c": 2, "d": 1, "e": 2}  # slots by task; the tasks have different numbers of queries


KINDS = ("gaussian", "features", "dtkr")


def new_router(kind: str) -> Router:
    if kind == "features":
        return RandomFeatureRouter(k=3, matrix=feature_matrix(WIDTH, 20, CPU))
    return GaussianRouter(k=3) if kind == "gaussian" else dtkr(k=3, epochs=1, steps=1)


PARTS: dict[str, dict[str, Part]] = {
    kind: {
        name: new_router(kind).fit(10.0**i * draw(20 + 9 * i, i), slots, seed=i)
        for i, (name, slots) in enumerate(SLOTS.items())
    }
    for kind in KINDS
}


def fresh_router(kind: str, names: list[str]) -> Router:
    router = new_router(kind)
    router.load({name: PARTS[kind][name] for name in names}, CPU)
    return router


def bits(router: Router) -> dict[str, Tensor]:
    """The tensors that determine routes."""
    if isinstance(router, GaussianRouter):
        sums = {"coarse": router.scatter.coarse, "fine": router.scatter.fine}
        return {"keys": router.keys, "bias": router.bias, "centre": router.centre, **sums}
    assert isinstance(router, DtkrRouter)
    return {"keys": router.keys.keys}  # not `prepared`: its format is the backend's, and gaps in it are uninitialised


def assert_same(router: Router, fresh: Router) -> None:
    assert router.names == fresh.names
    assert [id(part) for part in router.parts] == [id(part) for part in fresh.parts]
    assert router.task_of_slot == fresh.task_of_slot
    if not fresh.names:
        return
    mine, theirs = bits(router), bits(fresh)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    asked = torch.cat([10.0**i * draw(4, i) for i in range(len(SLOTS))])
    one, other = router.route(asked), fresh.route(asked)
    assert torch.equal(one.slot_ids, other.slot_ids)
    assert torch.equal(one.weights, other.weights)
    slot = one.slot_ids[:, 0]
    assert torch.equal(router.distance(asked, slot), fresh.distance(asked, slot))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(sorted(SLOTS)), st.booleans()), max_size=12))
def test_a_router_with_any_history_is_that_of_its_tasks_alone(kind: str, history: list[tuple[str, bool]]) -> None:
    router = fresh_router(kind, [])
    older = []
    for name, looked_at in history:  # each name toggles its task: removed if present, else added
        router = router.changed({}, [name]) if name in router.names else router.changed({name: PARTS[kind][name]})
        if looked_at:
            assert_same(router, fresh_router(kind, router.names))
            older.append(router)
    assert_same(router, fresh_router(kind, router.names))
    for router in older:
        assert_same(router, fresh_router(kind, router.names))


def plain_route(parts: list[Part], asked: Tensor) -> Route:
    """The route of a gaussian router whose scatters are summed in float64, in order."""
    scatter = sum((part["scatter"].double() for part in parts), torch.zeros(()))
    count = torch.cat([part["count"] for part in parts]).double()
    mean_PD = torch.cat([part["mean"] for part in parts]).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance(count, mean_PD, unpack(scatter)).matrix))
    centre = mean_PD.mean(0)
    keys_PD = (mean_PD - centre) @ inverse
    bias = (-0.5 * (keys_PD * (mean_PD - centre)).sum(1)).float()
    return ops.retrieve(
        asked - centre.float(), keys_PD.float(), 3, bias=bias, metric="dot", weighting="softmax", temperature=4.0
    )


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("tasks", [1, 2, 20])
def test_exact_sums_route_as_sums_in_float64_do(scale: float, tasks: int) -> None:
    queries = [scale * draw(25 + seed, seed, width=17) for seed in range(tasks)]
    parts = [GaussianRouter().fit(query, 1 + (seed == 1), seed=0) for seed, query in enumerate(queries)]
    router = GaussianRouter(k=3)
    router.load(parts, CPU)
    asked = torch.cat(queries)
    found, expected = router.route(asked), plain_route(parts, asked)
    assert torch.equal(found.slot_ids, expected.slot_ids)
    torch.testing.assert_close(found.weights, expected.weights, atol=1e-6, rtol=0)


def test_a_list_of_parts_keeps_its_order_also_past_ten() -> None:
    parts = [GaussianRouter().fit(draw(9, seed), 1, seed=0) for seed in range(12)]
    router = GaussianRouter()
    router.load(parts, CPU)
    assert [id(part) for part in router.parts] == [id(part) for part in parts]


def test_slots_are_numbered_by_name_however_parts_are_given() -> None:
    router = GaussianRouter()
    router.load({name: PARTS["gaussian"][name] for name in ("c", "a", "b")}, CPU)
    assert router.names == ["a", "b", "c"]
    assert router.task_of_slot == [0, 1, 1, 1, 2, 2]


class Counted(dict[str, Tensor]):
    """A router's part that counts how often its scatter is read."""

    asked = 0

    def __getitem__(self, key: str) -> Tensor:
        self.asked += key == "scatter"
        return super().__getitem__(key)


def test_a_task_more_or_less_reads_no_other_tasks_scatter() -> None:
    parts = {name: Counted(part) for name, part in PARTS["gaussian"].items()}
    router = GaussianRouter()
    router.load({name: parts[name] for name in "abde"}, CPU)
    for part in parts.values():
        part.asked = 0
    router = router.changed({"c": parts["c"]}).changed({}, ["b"])
    router.route(draw(3, 0))
    assert {name: part.asked for name, part in parts.items()} == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 0}


def test_what_concerns_all_slots_is_computed_once_for_any_number_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    factored = []
    whitener = slm_fast.router.whitener
    monkeypatch.setattr(slm_fast.router, "whitener", lambda *args: factored.append(1) or whitener(*args))
    router = fresh_router("gaussian", [])
    for name, part in PARTS["gaussian"].items():
        router = router.changed({name: part})
    assert factored == []
    router.route(draw(3, 0))
    router.route(draw(5, 1))
    assert factored == [1]


def test_covariances_for_distances_are_kept_by_name_and_only_the_last_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slm_fast.router, "WHITENER_BYTES", 3 * 8 * WIDTH * WIDTH + 1)
    router = fresh_router("gaussian", list("abcde"))
    slot = {name: router.task_of_slot.index(i) for i, name in enumerate(router.names)}
    asked = draw(1, 3)

    def ask(*names: str) -> list[str]:
        for name in names:
            router.distance(asked, torch.tensor([slot[name]]))
        return list(router.whiteners)

    assert ask("a", "b", "c") == ["a", "b", "c"]
    assert ask("a") == ["b", "c", "a"]
    assert ask("e") == ["c", "a", "e"]
    assert list(router.changed({"f": PARTS["gaussian"]["a"]}).whiteners) == ["c", "a", "e"]
    assert list(router.changed({}, ["c"]).whiteners) == ["a", "e"]
    assert list(router.changed({}, ["b"]).whiteners) == ["c", "a", "e"]


def test_a_task_learned_anew_is_measured_by_its_new_covariance() -> None:
    router = fresh_router("gaussian", ["a", "b"])
    asked, slot = draw(5, 3), torch.zeros(5, dtype=torch.int64)
    router.distance(asked, slot)
    alone, new = GaussianRouter(), {"a": PARTS["gaussian"]["d"]}
    alone.load(list(new.values()), CPU)
    for again in (router.changed({}, ["a"]).changed(new), router.changed(new, ["a"])):
        assert torch.equal(again.distance(asked, slot), alone.distance(asked, slot))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["add", "remove", "route"])
def test_a_change_broken_off_anywhere_leaves_the_router_as_it_was(kind: str, change: str) -> None:
    router = fresh_router(kind, ["a", "b", "d"])
    asked = draw(4, 0)
    call = {
        "add": lambda: router.changed({"c": PARTS[kind]["c"]}),
        "remove": lambda: router.changed({}, ["b"]),
        "route": lambda: router.route(asked),
    }[change]
    breaks = 0
    for _ in broken_off(call, slm_fast.router, slm_fast.dtkr, slm_fast.covariance):
        breaks += 1
        assert router.names == ["a", "b", "d"]
    assert breaks >= 5
    assert_same(router, fresh_router(kind, ["a", "b", "d"]))
    assert_same(router.changed({"c": PARTS[kind]["c"]}), fresh_router(kind, ["a", "b", "c", "d"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**52])
def test_a_scatter_that_cannot_be_summed_exactly_is_refused_and_nothing_changes(bad: float) -> None:
    router = fresh_router("gaussian", ["a", "b"])
    part = {**PARTS["gaussian"]["c"], "scatter": torch.full_like(PARTS["gaussian"]["c"]["scatter"], bad)}
    with pytest.raises(WorkError, match="scatter: expected finite numbers"):
        router.changed({"c": part})
    assert_same(router, fresh_router("gaussian", ["a", "b"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_taken_and_one_that_is_not_there_are_wrong_calls(kind: str) -> None:
    router = fresh_router(kind, ["a", "b"])
    with pytest.raises(InputError, match="task 'a': the router has it already"):
        router.changed({"a": PARTS[kind]["a"]})
    with pytest.raises(InputError, match="task 'c': the router does not have it; tasks: a, b"):
        router.changed({}, ["c"])


@pytest.mark.parametrize("kind", KINDS)
def test_options_stay_when_tasks_come_and_go(kind: str) -> None:
    router = GaussianRouter(k=1, temperature=9.0) if kind == "gaussian" else dtkr(k=1, aggregate="vote")
    router.load({}, CPU)
    assert router.changed({"a": PARTS[kind]["a"]}).changed({"b": PARTS[kind]["b"]}).changed({}, ["a"]) == router


@pytest.mark.parametrize("kind", ["gaussian", "features"])
def test_routes_are_the_same_once_keys_are_prepared_for_many_rows(kind):
    router, asked = fresh_router(kind, list(SLOTS)), draw(slm_fast.router.FEW, 9)
    assert isinstance(router, GaussianRouter)
    first = router.route(asked)
    router.route(asked, torch.ones(sum(SLOTS.values()), dtype=torch.bool))
    assert "prepared" not in vars(router)
    later, told = router.route(asked), fresh_router(kind, list(SLOTS))
    assert "prepared" in vars(router)
    told.prepare(for_many=True)
    assert "prepared" in vars(told)
    for route in (later, told.route(asked)):
        assert torch.equal(route.slot_ids, first.slot_ids)
        assert torch.equal(route.weights, first.weights)
    assert "prepared" not in vars(router.changed({}, ["a"]))
