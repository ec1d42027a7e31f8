"""The inference benchmark compares ways that compute the same, and keeps the lines of earlier runs."""

from __future__ import annotations

import pytest
import torch
from models import knows, make_slm, one_thread, random_task, route_of  # noqa: F401

from benchmarks import inference
from benchmarks.timing import read_csv, write_csv
from slm_fast.adapted import AdaptedLinear
from slm_fast.model import Passage


@pytest.mark.parametrize(
    ("kind", "ids", "weights"),
    [
        (inference.PerSample, [[0, 1], [1, 0], [1, 0]], [[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]]),
        (inference.OneTask, [[1], [1], [1]], [[1.0], [1.0], [1.0]]),
    ],
)
@torch.inference_mode()
def test_materialised_increments_give_what_the_operator_gives(kind, ids, weights):
    slm = make_slm("bert")
    knows(slm, *(random_task(slm, topic) for topic in ("farm", "sea")))
    encoded = slm.model.backbone.encode(["sea1 sea2", "farm1 farm2 farm3", "sea4"], 32)
    route, found = route_of(ids, weights), []
    for layers in (AdaptedLinear, kind, AdaptedLinear):
        with (
            inference.with_layers(slm, layers),
            slm.model.passing(Passage(encoded.attention_mask), slm.model.pool.values, route),
        ):
            found.append(slm.model.features(encoded))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[2], found[0])


def test_copies_share_their_parameters():
    model = make_slm("bert").model.backbone.model
    for mine, theirs in zip(model.parameters(), inference.sharing(model).parameters(), strict=True):
        assert mine is theirs


def test_made_up_texts_are_the_same_each_time_and_as_long_as_real_ones():
    made = inference.texts_of(None, "test", 50)
    assert made == inference.texts_of(None, "test", 50)
    assert made != inference.texts_of(None, "train", 50)
    assert sum(map(len, made["ag_news"])) < sum(map(len, made["yelp"]))
    rows = inference.mixed(made)
    assert sorted(rows) == sorted((name, text) for name, own in made.items() for text in own)


def test_a_new_run_replaces_its_own_lines_only(tmp_path):
    def line(section: str, backbone: str, dtype: str, way: str) -> dict[str, str]:
        return {"section": section, "backbone": backbone, "dtype": dtype, "way": way}

    path = tmp_path / "inference.csv"
    old = [line("ways", "minilm", "float32", "a"), line("ways", "minilm", "bfloat16", "a"),
           line("user", "minilm", "float32", "a"), line("user", "minilm", "bfloat16", "b")]  # fmt: skip
    write_csv(path, inference.merge(path, old))
    new = [line("ways", "minilm", "float32", "c"), line("ways", "minilm", "float32", "d")]
    write_csv(path, inference.merge(path, new))
    ways = [(row["section"], row["dtype"], row["way"]) for row in read_csv(path)]
    assert ways == [("user", "float32", "a"), ("user", "bfloat16", "b"), ("ways", "bfloat16", "a"),
                    ("ways", "float32", "c"), ("ways", "float32", "d")]  # fmt: skip
