"""Tests of the serving benchmark: equal requests to all servers, counts and times, and failure on a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import mixed_texts
from served import serving, store_with

from benchmarks.speed.serving.__main__ import LITSERVE, OURS, PIPELINES, figures, requests_of, wrong
from benchmarks.speed.serving.load import Load, arrive, load
from benchmarks.speed.serving.writing import NEW_TOKENS, stream_all
from slm_fast.data import Row

TEXTS = {"sea": mixed_texts(5), "farm": mixed_texts(7, seed=1)}


def test_every_server_is_asked_for_the_same_rows_in_the_same_order() -> None:
    asked = {name: requests_of(name, TEXTS, 3) for name in (OURS, PIPELINES, LITSERVE)}
    bodies = [[(body["input"], rows) for _, body, rows in requests] for requests in asked.values()]
    assert bodies[0] == bodies[1] == bodies[2]
    assert sorted(text for texts, _ in bodies[0] for text in texts) == sorted([*TEXTS["sea"], *TEXTS["farm"]])
    told = {path: texts for (path, _, _), (texts, _) in zip(asked[PIPELINES], bodies[0], strict=True)}
    assert all(set(texts) <= set(TEXTS[path.removeprefix("/")]) for path, texts in told.items())


def test_clients_count_rows_and_refusals_and_stop_at_a_wrong_answer(tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store")) as (client, served):
        found = load(client.port, requests_of(OURS, TEXTS, 3), 2, 0.2)
        assert len(found.seconds) < found.rows <= 3 * len(found.seconds)
        assert (found.refused, 0.2 <= found.elapsed < 20) == (0, True)
        sent = arrive(client.port, requests_of(OURS, TEXTS, 3), 100.0, 0.5)
        assert (len(sent.seconds), sent.refused) == (50, 0)  # all that were due, however late the answers
        assert sent.elapsed > 0.4
        with pytest.raises(RuntimeError, match="/nothing: 404"):
            load(client.port, [("/nothing", {}, 1)], 1, 0.1)
        served.engine.room.most_rows = 0  # refuse every request
        found = load(client.port, requests_of(OURS, TEXTS, 3), 2, 0.1)
        assert (found.rows, found.refused) == (0, len(found.late))
        assert found.refused > 0


def test_answers_that_name_a_file_which_their_generation_lacks_are_counted(tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store")) as (client, served):
        found = load(client.port, requests_of(OURS, TEXTS, 3), 2, 0.2, keep=True)
        number, files = served.engine.generation.number, dict(served.engine.generation.files)
    assert len(found.answers) == len(found.seconds) > 0
    assert wrong(found, {number: files}) == 0
    assert wrong(found, {"another": files}) == found.rows
    assert 0 < wrong(found, {number: {**files, "sea": files["farm"]}}) < found.rows


def test_percentiles_are_of_the_answers() -> None:
    found = Load(2.0, 100, 3, [i / 1000 for i in range(1, 101)], [0.004])
    assert (found.rows_per_second, found.percentile(0.5), found.percentile(0.99)) == (50, 50.0, 99.0)
    row = figures("serving", OURS, 8, found, 100.0)
    assert (row["to_predict"], row["p50_ms"], row["p99_ms"], row["refused_p99_ms"]) == (0.5, 50.0, 99.0, 4.0)
    assert str(Load().percentile(0.5)) == str(Load().gap) == "nan"
    assert Load(answered=[3.0, 1.0, 1.5]).gap == 1500.0
    both = Load.of([Load(4.0, 6, 1, [0.5], [0.1], [11.0, 13.5]), Load(), Load(1.0, 4, 0, [0.25], [], [30.0, 30.5])])
    assert (both.rows_per_second, both.refused, both.seconds, both.late) == (2.0, 1, [0.5, 0.25], [0.1])
    assert both.gap == 2500.0  # the time between two rounds does not count


def test_streamed_texts_are_those_of_predict_with_the_times_of_their_parts(tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store", "llama")
    rows = [Row(text, instruction="word1 word2") for text in mixed_texts(5)]
    expected = [answer.text for answer in slm.predict(rows, max_new_tokens=NEW_TOKENS)]
    with serving(slm, max_new_tokens=NEW_TOKENS) as (client, _):
        found = stream_all(client.port, "auto", rows, 3, 0.5)
        assert {place for place, _ in found.texts} == set(range(5))
        assert all(text == expected[place] for place, text in found.texts)
        assert 0 < len(found.first) <= len(found.texts)
        assert len(found.between) > len(found.texts)
        assert all(seconds >= 0 for seconds in [*found.first, *found.between])
        with pytest.raises(RuntimeError, match="no-such-task: 404"):
            stream_all(client.port, "no-such-task", rows, 1, 0.1)
