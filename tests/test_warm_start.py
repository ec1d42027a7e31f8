"""Warm starts: which task and slots new values start from, what the task's file records, and what stays unchanged."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import (
    FAMILIES,
    easy,
    knows,
    learned,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    replace_options,
    saved,
    texts_of,
    toy_task,
)

from slm_fast import InputError, LearnOptions, ScalableLM, Task
from slm_fast.errors import SlmWarning
from slm_fast.ops import Route
from slm_fast.store import Store
from slm_fast.task_file import digest_of
from slm_fast.tasks import LearnedTask
from slm_fast.warm_start import Start, nearest_of_rank, slot_weights

STILL = {"epochs": 1, "learning_rate": 1e-38, "weight_decay": 0.0}  # updates too small for float32


def three_known(slm: ScalableLM, **options) -> dict[str, LearnedTask]:
    """Tasks with different topics, whose names sort before and after "city"."""
    tasks = [
        random_task(slm, name, topic=topic, **options) for name, topic in (("a", "farm"), ("b", "sky"), ("z", "sea"))
    ]
    knows(slm, *tasks)
    return {task.name: task for task in tasks}


def start_of(slm: ScalableLM, name: str) -> object:
    return learned(slm, name).options.get("warm_start")


def like(task: LearnedTask) -> dict[str, str]:
    return {"task": task.name, "sha256": digest_of(task)}


# Which task is the start


@pytest.mark.parametrize(("name", "router"), [*((name, "gaussian") for name in FAMILIES), ("bert", "dtkr")])
@pytest.mark.parametrize(("topic", "nearest"), [("farm", "a"), ("sky", "b"), ("sea", "z")])
def test_a_task_begins_at_the_values_of_the_one_most_of_its_rows_are_routed_to(name, router, topic, nearest):
    slm = make_slm(name, router=router, groups=8 if router == "dtkr" else None)
    known, task = three_known(slm, rank=8), toy_task("city", topic=topic)
    votes = Counter(answer.task for answer in slm.predict(texts_of(task), max_new_tokens=1))
    if router == "gaussian":  # the dtkr router is rarely right on meaningless words
        assert votes[nearest] > len(task.rows) / 2
    nearest = votes.most_common(1)[0][0]
    slm.learn(task, warm_start=True, slots=1, **STILL)
    assert start_of(slm, "city") == like(known[nearest])
    for module, pair in learned(slm, "city").values.items():
        for new, old in zip(pair, known[nearest].values[module], strict=True):
            assert torch.equal(new, old)


@pytest.mark.parametrize("joint", [False, True])
def test_a_task_that_is_named_is_the_one_begun_at_however_far_it_is(joint):
    slm = make_slm("bert")
    known = three_known(slm, rank=8)
    slm.learn(toy_task("city", topic="farm"), warm_start="z", joint=joint, **STILL)
    assert start_of(slm, "city") == like(known["z"])
    module = slm.model.modules[-1]
    assert torch.equal(learned(slm, "city").values[module][1], known["z"].values[module][1])


def test_the_router_and_the_answers_of_the_others_are_as_after_an_ordinary_start():
    routers, others = [], []
    for start in (False, True):
        slm = make_slm("bert")
        known = three_known(slm)
        slm.learn(toy_task("city", topic="sea"), epochs=2, warm_start=start)
        routers.append(learned(slm, "city").router)
        others.append([saved(slm, name) for name in known])
    assert all(torch.equal(tensor, routers[1][key]) for key, tensor in routers[0].items())
    assert others[0] == others[1]


def test_it_changes_what_is_learned_and_repeats_bit_for_bit():
    def learn(start: bool | str, seed: int = 0) -> bytes:
        slm = make_slm("bert")
        three_known(slm)
        slm.learn(toy_task("city", topic="sea"), epochs=2, warm_start=start, seed=seed)
        return saved(slm, "city")

    assert learn(True) == learn(True) == learn("z")
    assert len({replace_options(learn(*how)) for how in ((False,), (True,), ("a",), (True, 1))}) == 4


def test_the_order_in_which_others_were_learned_makes_no_difference():
    found = []
    for order in (("sea", "farm"), ("farm", "sea")):
        slm = make_slm("bert")
        for name in order:
            slm.learn(toy_task(name), epochs=1)
        slm.learn(toy_task("city", topic="sea"), epochs=1, warm_start=True)
        found.append(saved(slm, "city"))
    assert found[0] == found[1]


def test_with_nothing_learned_yet_the_start_is_an_ordinary_one():
    slms = [make_slm("bert") for _ in range(2)]
    for slm, start in zip(slms, (False, True), strict=True):
        slm.learn(easy("sea"), epochs=1, warm_start=start)
    assert replace_options(saved(slms[0], "sea")) == replace_options(saved(slms[1], "sea"))
    assert [start_of(slm, "sea") for slm in slms] == [None, True]


@pytest.mark.parametrize(("start", "known"), [("sky", "farm"), ("sea", "farm"), ("", "farm")])
def test_a_task_that_is_not_learned_is_named_before_anything_is_computed(start, known):
    slm = make_slm("bert")
    slm.learn(easy("farm", rows=8), epochs=1)
    passes: list[int] = []
    slm.model.backbone.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(InputError, match=f"^warm_start: task '{start}' is not learned; tasks: {known}$"):
        slm.learn(easy("sea"), epochs=1, warm_start=start)
    assert (slm.tasks, passes) == (["farm"], [])
    with pytest.raises(InputError, match=r"^warm_start: task 'farm' is not learned; tasks: none$"):
        make_slm("bert").learn(easy("sea"), epochs=1, warm_start="farm")


# Ranks and slots


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_smaller_rank_all_is_taken_and_the_rest_begins_anew(name):
    slm, anew = make_slm(name), make_slm(name)
    (task,) = (random_task(slm, "sea", rank=3),)
    for model in (slm, anew):
        knows(model, task)
    slm.learn(toy_task("city"), warm_start=True, rank=5, **STILL)
    anew.learn(toy_task("city"), rank=5, **STILL)
    for module, (lora_a, lora_b) in learned(slm, "city").values.items():
        assert torch.equal(lora_a[:, :3], task.values[module][0])
        assert torch.equal(lora_b[:, :3], task.values[module][1])
        assert torch.equal(lora_a[:, 3:], learned(anew, "city").values[module][0][:, 3:])
        assert lora_a[:, 3:].abs().amin(2).max() > 0  # with lora_a and lora_b both zero, there would be no gradient
        assert lora_b[:, 3:].abs().max() < 1e-30


def test_of_a_larger_rank_the_nearest_increments_are_taken():
    slm = make_slm("bert")
    (task,) = (random_task(slm, "sea", rank=6),)
    knows(slm, task)
    slm.learn(toy_task("city"), warm_start=True, rank=2, **STILL)
    for module, (lora_a, lora_b) in learned(slm, "city").values.items():
        whole = task.values[module][0][0].T @ task.values[module][1][0]
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        nearest = u[:, :2] * s[:2] @ v[:2]
        assert torch.allclose(lora_a[0].T @ lora_b[0], nearest, atol=1e-5 * float(s[0]))
        assert (whole - nearest).norm() > 0.1 * whole.norm()  # the smaller rank loses something


@pytest.mark.parametrize(
    ("width_in", "width_out", "rank", "wanted"), [(9, 7, 5, 1), (3, 8, 5, 2), (4, 2, 3, 3), (1, 1, 1, 1)]
)
def test_increments_of_a_rank_are_as_near_as_their_singular_values_allow(width_in, width_out, rank, wanted):
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(2, rank, width_in, generator=generator)
    lora_b = torch.randn(2, rank, width_out, generator=generator)
    short_a, short_b = nearest_of_rank(lora_a, lora_b, wanted)
    whole, found = lora_a.mT @ lora_b, short_a.mT @ short_b
    left_out = torch.linalg.svdvals(whole)[:, wanted:].norm(dim=1)
    assert (whole - found).flatten(1).norm(dim=1) == pytest.approx(left_out, abs=1e-5)
    assert short_a.norm(dim=2) == pytest.approx(short_b.norm(dim=2), rel=1e-4)


def test_each_new_slot_begins_at_the_slot_that_weighs_most_for_its_rows():
    task = random_task(make_slm("bert"), "sea", slots=3)
    theirs = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.4, 0.6], [0.0, 0.1, 0.9]], dtype=torch.float64)
    own = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.7, 0.3, 0.0]], dtype=torch.float64)
    # Total weights 1.1, 1.4, 1.5, used for a slot without rows. Weighted by the second slot's rows: 1.1, 0.93, 0.27.
    assert Start(task, theirs).slots_for(own).tolist() == [2, 0, 2]
    values = {"layer": (torch.zeros(3, 4, 2), torch.zeros(3, 4, 3))}
    parts = {"layer": (torch.randn(3, 4, 2), torch.randn(3, 4, 3))}
    Start(LearnedTask("t", None, parts, {}, None), theirs).fill(values, own)
    for new, old in zip(values["layer"], parts["layer"], strict=True):
        assert torch.equal(new, old[[2, 0, 2]])


def test_the_weights_of_slots_are_those_of_the_route_and_of_no_others():
    route = Route(torch.tensor([[2, 0], [3, -1], [1, 5]]), torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]]))
    assert slot_weights(route, 3).tolist() == [[0.25, 0, 0.75], [0, 0, 0], [0, 0.5, 0]]
    assert slot_weights(route, 6).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("joint", [False, True])
def test_tasks_of_several_slots_begin_at_slots_of_the_other(router, joint):
    slm = make_slm("bert", router=router, groups=8 if router == "dtkr" else None)
    known = three_known(slm, slots=3, rank=4)
    slm.learn(toy_task("city", topic="sea"), warm_start=True, slots=2, rank=4, joint=joint, **STILL)
    assert start_of(slm, "city") == like(known["z"])
    chosen = []
    for module, pair in learned(slm, "city").values.items():
        for new, old in zip(pair, known["z"].values[module], strict=True):
            chosen.append([[s for s in range(3) if torch.equal(mine, old[s])] for mine in new])
    assert all(len(slots) == 1 for slots in chosen[0])
    assert all(choice == chosen[0] for choice in chosen)


# What the file records, and its consequences


def test_the_file_tells_what_it_was_started_from_and_others_say_nothing(tmp_path: Path):
    slm = make_slm("bert")
    slm.save_pretrained(tmp_path / "store")
    slm.learn(easy("sea"), epochs=1)
    slm.learn(easy("farm"), epochs=1, warm_start="sea")
    files = Store.open(tmp_path / "store").files
    again = reopened(tmp_path / "store")
    assert start_of(again, "farm") == {"task": "sea", "sha256": files["sea"]}
    assert "warm_start" not in again.learned["sea"].options
    assert Store.open(tmp_path / "store").verify() == []


def test_forgetting_the_task_begun_at_leaves_this_one_as_it_is(tmp_path: Path):
    slm = make_slm("bert")
    slm.save_pretrained(tmp_path / "store")
    slm.learn(easy("sea"), epochs=1)
    slm.learn(easy("farm"), epochs=1, warm_start=True)
    before, answers = saved(slm, "farm"), [a.label for a in slm.predict(mixed(), task="farm")]
    slm.forget("sea")
    again = reopened(tmp_path / "store")
    assert saved(again, "farm") == before
    assert [a.label for a in again.predict(mixed(), task="farm")] == answers
    assert start_of(again, "farm")["task"] == "sea"
    assert Store.open(tmp_path / "store").verify() == []


def test_a_script_that_is_run_again_or_was_cut_short_ends_with_the_same_store(tmp_path: Path):
    def script(store: Path, tasks: int = 3) -> dict[str, str]:
        slm = reopened(store) if Store.exists(store) else make_slm("bert")
        slm.save_pretrained(store)
        for name in ("sea", "farm", "city")[:tasks]:
            slm.learn(easy(name, rows=16), epochs=1, warm_start=True)
        return Store.open(store).files

    whole = script(tmp_path / "whole")
    script(tmp_path / "cut", tasks=2)
    shutil.copytree(tmp_path / "cut", tmp_path / "copy")
    for store, learned_before in (("cut", ("sea", "farm")), ("whole", ("sea", "farm", "city"))):
        with pytest.warns(SlmWarning, match="already learned from the same rows and options; kept") as warned:
            assert script(tmp_path / store) == whole
        assert [str(one.message).split("'")[1] for one in warned] == list(learned_before)
    assert Store.open(tmp_path / "copy").files != whole


def test_another_start_is_another_task():
    slm = make_slm("bert")
    for name in ("sea", "farm"):
        slm.learn(easy(name, rows=16), epochs=1)
    slm.learn(easy("city", rows=16), epochs=1, warm_start="sea")
    asked = {start: LearnOptions(epochs=1, warm_start=start) for start in (True, "sea", "farm", False)}
    task = easy("city", rows=16)
    assert slm.knows(task, asked[True])
    assert slm.knows(task, asked["sea"])
    for start in ("farm", False):
        with pytest.raises(InputError, match="task 'city': already learned; forget it first"):
            slm.knows(task, asked[start])
    with pytest.raises(InputError, match="task 'sea': already learned; forget it first"):
        slm.knows(easy("sea", rows=16), asked[True])  # sea was learned without warm_start
    slm.forget("city")
    assert not slm.knows(task, asked["farm"])


def test_what_a_task_began_at_decides_its_origin():
    origins = []
    for others in ({"seed": 0}, {"seed": 1}):  # different tasks with the same name
        slm = make_slm("bert")
        slm.learn(easy("sea", rows=16), epochs=1, **others)
        slm.learn(easy("city", rows=16), epochs=1, warm_start="sea")
        slm.learn(Task("farm", easy("city", rows=16).rows), epochs=1)
        origins.append([learned(slm, name).origin for name in ("city", "farm")])
    assert origins[0][0] != origins[1][0]
    assert origins[0][1] == origins[1][1]


def test_the_values_begun_at_answer_before_a_step_is_made():
    """The same rows under another name: with a warm start only the head must be learned, which takes fewer steps."""

    def confidence(start: bool) -> float:
        slm = make_slm("bert")
        task = easy("sea")
        slm.learn(task, epochs=12, batch_size=8, learning_rate=2e-2)
        slm.learn(Task("sea2", task.rows), epochs=2, batch_size=8, learning_rate=5e-3, warm_start=start)
        answers = slm.predict([row.text for row in task.rows], task="sea2")
        right = [a.score if a.label == row.target else 1 - a.score for a, row in zip(answers, task.rows, strict=True)]
        return sum(right) / len(right)

    assert confidence(True) > confidence(False) + 0.05
