"""Ray Data: `predict` keeps a dataset's columns and adds the same answers as a single process."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow
import pytest
import ray
from ray.exceptions import RayTaskError

from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.integrations.ray import predict
from slm_fast.windows import WINDOW
from tests.models import one_thread, sentence  # noqa: F401

ROWS = 2 * WINDOW + 300


@pytest.fixture(autouse=True)
def in_order(cluster: str):
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def rows(count: int) -> list[dict]:
    """`count` rows, one in 500 with an empty text."""
    rng = random.Random(0)
    texts = [sentence(rng.choice(("sea", "farm")), rng, words=rng.randint(1, 20)) for _ in range(count)]
    return [{"text": "" if i % 500 == 7 else text, "label": "no", "number": i} for i, text in enumerate(texts)]


def test_a_dataset_has_its_columns_and_the_answers_of_a_file(cluster: str, store: Path, tmp_path: Path) -> None:
    given = rows(ROWS)
    dataset = ray.data.from_arrow([pyarrow.Table.from_pylist(given[:777]), pyarrow.Table.from_pylist(given[777:])])
    found = predict(dataset, store, top_k=None, concurrency=(1, 2)).take_all()
    assert [{name: row[name] for name in given[0]} for row in found] == given
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in given))
    ScalableLM.from_pretrained(store).predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", top_k=None)
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for name in ("task", "label", "score", "route"):
        assert [row[f"predicted_{name}"] for row in found] == [row.get(name) for row in expected]
    kept = [{each["label"]: each["probability"] for each in row["predicted_probabilities"] or ()} for row in found]
    assert kept == [row.get("probabilities", {}) for row in expected]
    assert [row["error"] for row in found] == [row.get("error") for row in expected]
    assert sum(row["error"] is not None for row in found) == 5


def test_what_cannot_be_is_said_before_anything_is_computed(cluster: str, store: Path, tmp_path: Path) -> None:
    dataset = ray.data.from_items([{"text": "sea1", "predicted_label": "x"}])
    with pytest.raises(InputError, match="column 'predicted_label': already exists"):
        predict(dataset, store)
    with pytest.raises(InputError, match="task 'lake': not learned by"):
        predict(dataset, store, task="lake")
    with pytest.raises(InputError, match="sample: "):
        predict(dataset, store, sample=True)
    with pytest.raises(InputError, match="nowhere"):
        predict(dataset, tmp_path / "nowhere")


def test_a_store_that_changed_meanwhile_is_told_of(cluster: str, store: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(store, tmp_path / "store")
    dataset, made = ray.data.from_items([{"text": "sea1"}]), []
    answered = predict(dataset, tmp_path / "store")
    monkeypatch.setattr(ray.data.Dataset, "map_batches", lambda _, actor, **how: made.append((actor, how)))
    predict(dataset, f"file://{tmp_path}/store")
    ScalableLM.from_pretrained(tmp_path / "store").forget("farm")
    with pytest.raises((RayTaskError, ray.exceptions.RayActorError), match="was changed since it was asked"):
        answered.take_all()
    [(actor, how)] = made  # of the store at a URL, in this process
    with pytest.raises(WorkError, match="was changed since it was asked"):
        actor(**how["fn_constructor_kwargs"])
