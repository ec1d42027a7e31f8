"""Tests of the inference benchmark: all ways compute equal states, and a run keeps the results of earlier runs."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import pytest
import torch
from models import (
    FAMILIES,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,  # noqa: F401
    random_task,
    route_of,
    toy_task,
)

from benchmarks.speed.backbones import sharing
from benchmarks.speed.inference import __main__ as command
from benchmarks.speed.inference import sections
from benchmarks.speed.inference.ways import (
    BARE,
    ONE_TASK,
    OURS,
    PEFT,
    PER_SAMPLE,
    PLAIN,
    SENTENCE,
    TWO_MODELS,
    Batch,
    Step,
    Ways,
    answer,
)
from benchmarks.speed.layers import Pass, base_only, one_task, per_sample, released, replace_layers
from benchmarks.speed.texts import LENGTHS, add_data, mixed, texts_of
from benchmarks.tables import read_csv, write_csv
from slm_fast.ops import Route

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.05, "atol": 0.1}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Path of a second tiny model, which serves as the sentence encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    make_model("bert", seed=1).save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    return str(folder)


def make_ways(name: str, encoder: str, dtype: torch.dtype = torch.float32) -> Ways:
    train = {topic: [row.text for row in toy_task(topic, rows=16).rows] for topic in ("farm", "sea")}
    rows = [(topic, row.text) for topic in train for row in toy_task(topic, rows=9, seed=1).rows]
    model = make_model(name).to(dtype)
    return Ways(model, make_tokenizer(name), encoder, train, rows, tokens=64, batches=2)


def own_route(ways: Ways, tasks: list[str]) -> Route:
    """A route that sends each row to its own task's slot only, with weight 1."""
    names = sorted(ways.train)
    return route_of([[names.index(task)] for task in tasks], [[1.0]] * len(tasks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_gives_the_states_that_slm_fast_gives_on_the_same_route(name, dtype, encoder):
    ways = make_ways(name, encoder, dtype)
    steps = {way: make() for way, make in ways.steps.items()}
    alone = ways.passing(one_task)
    with torch.inference_mode():
        for batch in ways.batches:
            check_mixed(ways, steps, batch, CLOSE[dtype])
        for batch in ways.by_task:
            route = own_route(ways, batch.tasks)
            found = answer(alone, batch.encoded, route)
            torch.testing.assert_close(found, answer(ways.slm, batch.encoded, route), **CLOSE[dtype])


def check_mixed(ways: Ways, steps: dict[str, Step], batch: Batch, close: dict[str, float]) -> None:
    hidden = {way: step(batch) for way, step in steps.items()}
    shape = (*batch.encoded.input_ids.shape, ways.slm.model.backbone.width)
    assert {found.shape for found in hidden.values()} == {shape}
    bare = answer(ways.slm, batch.encoded, ways.slm.model.empty_route(shape[0]))
    for way in (BARE, PLAIN, TWO_MODELS):
        torch.testing.assert_close(hidden[way], bare, **close)
    oracle = answer(ways.slm, batch.encoded, own_route(ways, batch.tasks))
    torch.testing.assert_close(hidden[PEFT], oracle, **close)
    torch.testing.assert_close(hidden[PER_SAMPLE], hidden[OURS], **close)
    if bare.dtype == torch.float32:  # precise enough to tell increments from rounding errors
        assert (oracle - bare).abs().max() > 10 * (hidden[PEFT] - oracle).abs().max()
    query = ways.paper.model.query.encode_tokens(batch.encoded)
    assert torch.equal(hidden[SENTENCE], answer(ways.paper, batch.encoded, ways.paper.model.route(query)))


def test_batches_of_one_task_hold_the_same_rows_as_the_mixed_ones(encoder):
    ways = make_ways("bert", encoder)
    passed = []
    ways.steps = {way: lambda: lambda batch: passed.append(batch) for way in ways.steps}
    for way in (OURS, ONE_TASK):
        for part in ways.passes(way):
            part()
    assert passed == [*ways.batches, *ways.by_task]
    mixed_rows, alike = (
        sorted((task, tuple(ids[mask.bool()].tolist())) for batch in batches for task, ids, mask in rows_in(batch))
        for batches in (ways.batches, ways.by_task)
    )
    assert mixed_rows == alike
    assert len(mixed_rows) == ways.rows
    assert all(len(set(batch.tasks)) == 1 for batch in ways.by_task)


def rows_in(batch):
    return zip(batch.tasks, batch.encoded.input_ids, batch.encoded.attention_mask, strict=True)


@pytest.mark.parametrize(
    ("way", "ids", "weights"),
    [
        (per_sample, [[0, 1], [1, 0], [1, 0]], [[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]]),
        (released, [[0, 1], [1, 0], [1, 0]], [[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]]),
        (one_task, [[1], [1], [1]], [[1.0], [1.0], [1.0]]),
        (base_only, [[-1], [-1], [-1]], [[0.0], [0.0], [0.0]]),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_layers_in_the_place_of_ours_give_what_the_operator_gives(
    name: str, way: Pass, ids: list[list[int]], weights: list[list[float]]
) -> None:
    ours, theirs = make_slm(name), make_slm(name)
    ours.add([random_task(ours, topic) for topic in ("farm", "sea")])
    theirs.add(list(ours.learned.values()))
    replace_layers(theirs, dict.fromkeys(theirs.model.modules, way))
    batch = ours.model.backbone.tokenization.encode(["sea1 sea2", "farm1 farm2 farm3", "sea4"], 32)
    route = route_of(ids, weights)
    expected = ours.model.forward(batch, route).hidden
    torch.testing.assert_close(theirs.model.forward(batch, route).hidden, expected, rtol=1e-4, atol=1e-5)


def test_copies_share_their_parameters():
    model = make_slm("bert").model.backbone.model
    for mine, theirs in zip(model.parameters(), sharing(model).parameters(), strict=True):
        assert mine is theirs


def test_made_up_texts_are_the_same_each_time_and_as_long_as_real_ones():
    made = texts_of(None, "test", 50)
    assert made == texts_of(None, "test", 50)
    assert made != texts_of(None, "train", 50)
    assert sum(map(len, made["ag_news"])) < sum(map(len, made["yelp"]))
    rows = mixed(made)
    assert sorted(rows) == sorted((name, text) for name, own in made.items() for text in own)


def test_data_is_the_five_tasks_folder_or_the_one_that_holds_it_and_nothing_else(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_data(parser)
    assert parser.parse_args([]).data is None
    folder = tmp_path / "classification"
    for name in LENGTHS:
        with pytest.raises(SystemExit):
            parser.parse_args(["--data", str(tmp_path)])
        assert f"--data: {tmp_path}: expected classification/ag_news/train.jsonl.gz in it" in capsys.readouterr().err
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl.gz").write_bytes(b"")
    for given in (tmp_path, folder):
        assert parser.parse_args(["--data", str(given)]).data == folder


def line(section: str, backbone: str, dtype: str, way: str) -> dict[str, str]:
    return {"section": section, "backbone": backbone, "dtype": dtype, "way": way}


def test_a_new_run_replaces_its_own_lines_only(tmp_path):
    path = tmp_path / "inference.csv"
    old = [line("ways", "minilm", "float32", "a"), line("ways", "minilm", "bfloat16", "a"),
           line("user", "minilm", "float32", "a"), line("user", "minilm", "bfloat16", "b")]  # fmt: skip
    write_csv(path, command.merge(path, old))
    new = [line("ways", "minilm", "float32", "c"), line("ways", "minilm", "float32", "d")]
    write_csv(path, command.merge(path, new))
    ways = [(row["section"], row["dtype"], row["way"]) for row in read_csv(path)]
    assert ways == [("user", "float32", "a"), ("user", "bfloat16", "b"), ("ways", "bfloat16", "a"),
                    ("ways", "float32", "c"), ("ways", "float32", "d")]  # fmt: skip


def test_a_run_of_some_ways_keeps_the_others(tmp_path):
    path = tmp_path / "inference.csv"
    write_csv(path, [line("ways", "minilm", "float32", way) | {"ms": "1"} for way in "abc"])
    merged = command.merge(path, [line("ways", "minilm", "float32", way) | {"ms": "2"} for way in "ab"], ways=True)
    assert sorted((row["way"], row["ms"]) for row in merged) == [("a", "2"), ("b", "2"), ("c", "1")]


def test_each_section_backbone_and_dtype_runs_once():
    options = argparse.Namespace(
        section=["user", "ways"], backbone=["minilm", "bert-base"], dtype=["float32", "bfloat16"]
    )
    assert command.parts(options) == [
        ("user", "minilm", "float32"),
        *(("ways", backbone, dtype) for backbone in options.backbone for dtype in options.dtype),
    ]


def test_the_ratios_are_those_of_rows_a_second_and_of_added_time():
    ms = {BARE: 100, OURS: 110, TWO_MODELS: 220, PEFT: 140, PER_SAMPLE: 300}
    rows = [{"way": way, "p50_ms": str(p50)} for way, p50 in ms.items()]
    assert [claim.rpartition(": ")[2] for claim in sections.claims(rows)] == ["0.909", "2.00", "0.250", "0.050"]
    assert sections.claims([{"way": f"{n} tasks", "p50_ms": p50} for n, p50 in ((5, 95), (200, 100))]) == [
        "rows/s with 200 tasks, of those with 5: 0.950"
    ]
    assert sections.claims(rows[:1]) == []


def part_here(words: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
    """Measures a part in this process instead of a new one."""
    assert words[:3] == [sys.executable, "-m", "benchmarks.speed.inference"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", list(words[2:]))
        status = command.main()
    return subprocess.CompletedProcess(words, status, said.getvalue())


def test_the_command_saves_a_line_for_each_way(few_features, tmp_path, monkeypatch, capfd):
    output = tmp_path / "few.csv"
    arguments = ["--batches", "1", "--batch-tokens", "64", "--rounds", "1", "--ways", "gaussian", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["inference", *arguments, "--output", str(output)])
    monkeypatch.setattr(command.subprocess, "run", part_here)
    assert command.main() == 0
    assert [row["way"] for row in read_csv(output)] == [BARE, OURS]
    assert "of the bare backbone's" in capfd.readouterr().out
    assert output.with_suffix(".png").exists()
    assert set(LENGTHS) == set(sections.TASKS)
