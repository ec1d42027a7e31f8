"""What the fields of /v1/classify mean: `num_classes` whatever is asked for, and `distance` as in `predict`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import isfinite
from pathlib import Path

import openai
import pytest
from models import FAR, knows, learned, make_slm, mixed_texts, random_task
from served import serving, store_with, until

from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.options import PredictOptions
from slm_fast.predict import Prediction
from slm_fast.server import engine as engine_module
from slm_fast.server.queue import Room

TEXTS = mixed_texts(12, seed=4)


def with_a_label_of_probability_zero(path: Path) -> ScalableLM:
    """A store whose task sea has three labels, one of which is never found."""
    slm = store_with(path)
    sea = learned(slm, "sea")
    assert sea.head is not None
    weight, bias = (part.clone() for part in sea.head)
    weight[0], bias[0] = 0.0, -1e6
    knows(slm, learned(slm, "farm"), replace(sea, head=(weight, bias)))
    slm.save_pretrained(path.parent / "zero")
    return slm


@pytest.mark.parametrize(
    ("rate", "given", "rows", "tokens"),
    [(1.0, None, 10, 20), (1000.0, None, 100, 80), (1.0, None, 100, 62), (1e9, None, 100, 2048), (1.0, 35, 100, 35)],
)
def test_a_batch_has_an_eighth_of_what_waits_or_takes_a_moment_unless_a_number_is_given(
    rate: float, given: int | None, rows: int, tokens: int, tmp_path: Path, monkeypatch
) -> None:
    slm, texts = store_with(tmp_path / "store", max_length=20), ["sea1 sea2 sea3"] * rows
    (length,) = {len(reading.ids) for reading in slm.model.tokenize([Row(text) for text in texts])}
    batches, answer_batch = list[int](), engine_module.answer_batch

    def noted(model, rows, *others):
        batches.append(len(rows))
        return answer_batch(model, rows, *others)

    monkeypatch.setattr(Room, "rate", rate)
    with serving(slm, batch_tokens=given, inputs=100) as (client, _):
        monkeypatch.setattr(engine_module, "answer_batch", noted)
        assert len(client.classify(texts)) == rows
    assert length == 5
    assert max(batches) == min(rows, tokens // length)
    assert sum(batches) == rows


@pytest.mark.parametrize("labels", [1, 2, 3, None])
def test_the_number_of_classes_is_that_of_the_tasks_labels_however_many_are_asked_for(labels, tmp_path: Path) -> None:
    slm = with_a_label_of_probability_zero(tmp_path / "store")
    assert all(len(answer.probabilities) == 2 for answer in slm.predict(TEXTS, task="sea", top_k=None))
    with serving(slm) as (client, _):
        for row in client.classify(TEXTS, model="sea", labels=labels):
            assert row["num_classes"] == 3
            assert len(row["probs"]) == len(row["labels"]) == min(labels or 3, 2)
        assert {row["num_classes"] for row in client.classify(TEXTS, model="farm", labels=labels)} == {2}


def test_the_number_of_classes_is_the_same_in_a_batch_with_requests_for_more_labels(
    tmp_path: Path, monkeypatch
) -> None:
    batches, goes_on, answer_batch = list[int](), threading.Semaphore(0), engine_module.answer_batch

    def held(model, rows, *others):
        batches.append(len(rows))
        assert goes_on.acquire(timeout=60)
        return answer_batch(model, rows, *others)

    with serving(store_with(tmp_path / "store")) as (client, served), ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(engine_module, "answer_batch", held)
        first = pool.submit(client.classify, ["sea1"], model="sea", labels=1)  # alone in its batch
        until(lambda: batches == [1])
        asks = [("sea", 1), ("sea", None), ("farm", 1)]
        others = [pool.submit(client.classify, ["sea1"], model=name, labels=labels) for name, labels in asks]
        until(lambda: served.engine._waiting.rows == 3)
        goes_on.release(2)
        found = [one.result()[0] for one in (first, *others)]
        assert batches == [1, 3]
    assert [row["num_classes"] for row in found] == [3, 3, 3, 2]
    assert [len(row["probs"]) for row in found] == [1, 1, 3, 1]


def test_the_classes_of_a_mixed_route_are_the_distinct_labels_of_its_tasks(tmp_path: Path) -> None:
    slm = make_slm("bert")
    labels = {"farm": ("no", "yes"), "sea": ("maybe", "no", "yes"), "sky": ("blue", "grey", "red", "yes")}
    knows(slm, *(random_task(slm, name, topic="sea", labels=own) for name, own in labels.items()))
    slm.save_pretrained(tmp_path / "store")
    expected = slm.predict(TEXTS, top_k=None)
    assert any(len(answer.route.tasks) > 1 for answer in expected)
    with serving(slm) as (client, _):
        for labels_asked in (1, None):
            for row, answer in zip(client.classify(TEXTS, labels=labels_asked), expected, strict=True):
                of_route = {label for task in answer.route.tasks for label in labels[task]}
                assert row["num_classes"] == len(of_route)
                assert set(row["labels"]) <= of_route


def test_a_text_of_no_task_has_no_classes(tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store"), options=PredictOptions(abstain=True)) as (client, _):
        assert [row["num_classes"] for row in client.classify([FAR])] == [0]


def test_a_generated_label_has_the_classes_of_its_task_and_free_text_has_none(tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store", "llama")) as (client, _):
        for name, classes in (("farm", 2), ("sea", 0)):
            rows = client.classify(TEXTS[:3], model=name)
            assert [(row["num_classes"], row["probs"]) for row in rows] == [(classes, [])] * 3


@pytest.fixture(scope="module", params=["bert", "llama"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A server that reports distances, and what `predict` says of the texts."""
    slm = store_with(tmp_path_factory.mktemp("measured") / "store", request.param)
    texts = [*TEXTS[:5], FAR]
    expected = slm.predict(texts, distance=True, max_new_tokens=3)
    assert len({answer.distance for answer in expected}) > 2
    with serving(slm, options=PredictOptions(distance=True), max_new_tokens=3) as (client, _):
        yield client, texts, expected, request.param


def distances(answers: list[Prediction]) -> list[float | None]:
    return [answer.distance if isfinite(answer.distance) else None for answer in answers]


def test_distances_are_those_of_predict(measured) -> None:
    client, texts, expected, name = measured
    far = [None if one is None else pytest.approx(one, abs=1e-3) for one in distances(expected)]
    assert [row["distance"] for row in client.classify(texts)] == far
    assert [row["distance"] for row in client.post("/v1/route", {"input": texts})["data"]] == far
    if name == "llama":
        found = client.post("/v1/completions", {"prompt": texts, "max_tokens": 3})
        assert [choice["distance"] for choice in found["choices"]] == far
        talks = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
        parts = list(talks.completions.create(model="auto", prompt=texts[0], max_tokens=3, stream=True))
        for part in (parts[0], parts[-1]):
            assert part.choices[0].distance == far[0]
