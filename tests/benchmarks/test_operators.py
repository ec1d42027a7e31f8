"""Tests of the operator benchmarks: all ways compute the same result, and the command runs the selected shapes."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks.speed.operators import (
    bench_adapted_linear,
    bench_invariant_linear,
    bench_multi_lora,
    bench_retrieve,
    bench_retrieve_keys,
    bench_sum_scatters,
)
from benchmarks.speed.operators.command import run
from slm_fast.ops import dispatch

SMALL = bench_multi_lora.Shape(B=3, T=5, H=64, P=4, K=2, r=3)
FEW = bench_retrieve.Shape(B=5, P=30, D=48, G=6, K=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", ["uniform", "zipf", "same", "distinct"])
def test_every_way_to_add_increments_gives_the_same_output(slots: str, dtype: torch.dtype) -> None:
    # One slot per sample, with weight 1: PEFT's mixed batch has no weights. Arrow is left out: it does its own routing.
    shape = replace(SMALL, slots=slots, dtype=dtype, K=1)
    with torch.inference_mode():
        expected = bench_multi_lora.candidates(shape, compiled=False)["native new"]()
        names = set(bench_multi_lora.candidates(shape, compiled=False)) - {"linear", "arrow"}
        assert names == {"native", "native new", "gather bmm", "gather bmm new", "materialised", "peft mixed", "dense"}
        for name in names:
            y = bench_multi_lora.candidates(shape, compiled=False)[name]()  # rebuilt: some ways modify the base output
            torch.testing.assert_close(y, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("slots", ["uniform", "same"])
def test_the_ways_that_weigh_agree_on_weighted_slots(slots: str) -> None:
    with torch.inference_mode():
        ways = {name: replace(SMALL, slots=slots) for name in ("native", "gather bmm", "materialised", "dense")}
        outputs = [bench_multi_lora.candidates(shape, compiled=False)[name]() for name, shape in ways.items()]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0])


def test_the_gradients_compared_are_the_same() -> None:
    ways = bench_multi_lora.candidates(replace(SMALL, backward=True), compiled=False)
    for ours, theirs in zip(ways["native"](), ways["gather bmm"](), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("vote", [False, True])
def test_every_way_to_retrieve_finds_the_same_slots(vote: bool) -> None:
    shape = replace(FEW, vote=vote)
    with torch.inference_mode():
        ways = bench_retrieve.candidates(shape, compiled=False)
        ids, weights = ways.pop("native")()
        assert ways
        for name, way in ways.items():
            found, shares = way()
            assert torch.equal(found, ids), name
            torch.testing.assert_close(shares, weights, msg=lambda m, name=name: f"{name}: {m}")


def test_every_way_to_retrieve_by_several_keys_finds_slots_of_the_best_keys() -> None:
    for shape in (bench_retrieve_keys.Shape(3, 40), bench_retrieve_keys.Shape(3, 40, G=6, K=4, metric="cosine")):
        with torch.inference_mode():
            ways = bench_retrieve_keys.candidates(shape)
            best = ways["1 key"]().slot_ids[:, 0]
            for name, way in ways.items():
                assert torch.equal(way().slot_ids[:, 0], best // int(name.split()[0])), name


def test_every_way_to_multiply_each_tasks_rows_gives_the_same_products() -> None:
    ways = bench_invariant_linear.candidates(bench_invariant_linear.Shape(3, M=4, D=300))
    products = ways.pop("native")()
    assert len(ways) == 4
    for name, way in ways.items():
        torch.testing.assert_close(way(), products, rtol=1e-12, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not dispatch.has_amx(), reason="this processor has no AMX")
def test_every_way_to_adapt_a_layer_gives_the_same_output() -> None:
    with torch.inference_mode():
        ways = bench_adapted_linear.candidates(bench_adapted_linear.Shape(B=3, T=20, I=64, O=96))
        plain, expected = ways.pop("linear")(), ways.pop("native")()
        assert not torch.equal(plain, expected)
        for name, way in ways.items():
            torch.testing.assert_close(way(), expected, rtol=2e-2, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_every_exact_way_to_sum_scatters_gives_the_same_bits() -> None:
    ways = bench_sum_scatters.candidates(bench_sum_scatters.Shape(3, R=7, D=130))
    coarse, fine = ways.pop("native")()
    bound = ways.pop(bench_sum_scatters.BOUND)()
    total = coarse.double() / 2**10 + fine.double() / 2**56
    torch.testing.assert_close(total[1:130].float(), bound[0, 1:])  # the first row, without its diagonal
    for name, way in ways.items():
        for plane, expected in zip(way(), (coarse, fine), strict=True):
            assert torch.equal(plane, expected), name


def test_the_command_saves_a_line_for_each_way(tmp_path, capsys) -> None:
    output = tmp_path / "few.csv"
    plots = []

    def plot(rows, path) -> None:
        plots.append((len(rows), path.name))

    arguments = ["--seconds", "0", "--sweep", "--output", str(output)]
    assert run("", "few", [], [FEW, replace(FEW, B=1)], bench_retrieve.lines, plot, arguments) == 0
    rows = list(csv.DictReader(line for line in output.read_text().splitlines() if not line.startswith("#")))
    assert [row["B"] for row in rows if row["way"] == "native"] == ["5", "1"]
    assert min(float(r["to_best_alternative"]) for r in rows if "native" not in r["way"] and r["B"] == "5") == 1.0
    assert plots == [(len(rows), "few.png")]
    assert "saved to" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("", "few", [FEW], [], bench_retrieve.lines, plot, ["--only", "1"])
    assert stop.value.code == 2
    assert "expected numbers in 0..0, got [1]" in capsys.readouterr().err
