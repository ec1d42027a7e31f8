"""Tests of the GPU operator benchmark on a CPU: a dry run, correctness checks, verdicts and the backend order."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.operators.gpu import __main__ as command
from benchmarks.speed.operators.gpu.compare import checked
from benchmarks.speed.operators.gpu.expected import page
from benchmarks.speed.operators.gpu.verdicts import preference, verdicts
from benchmarks.tables import RESULTS, read_csv, write_csv
from slm_fast.ops import dispatch


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="only Triton's interpreter runs its kernels on a CPU")
@pytest.mark.skipif(dispatch.TRITON_MISSING is not None, reason=str(dispatch.TRITON_MISSING))
def test_a_dry_run_times_every_way_and_writes_what_it_found(tmp_path, capsys):
    assert command.main([str(tmp_path), "--dry-run"]) == 0
    rows = read_csv(tmp_path / "multi_lora_gpu.csv")
    assert {"linear", "triton", "triton with base", "gather bmm", "materialised", "peft mixed", "arrow"} <= {
        row["way"] for row in rows
    }
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert {row["size"] for row in rows} == {"decode", "tokens", "other"}
    searches = read_csv(tmp_path / "retrieve_gpu.csv")
    assert {"triton", "gemm + topk", "bmm + topk a group"} <= {row["way"] for row in searches}
    ours = [row for row in rows + searches if row["way"].startswith("triton")]
    assert all(row["repeats"] == "yes" and float(row["error"]) < 2e-2 for row in ours)
    targets = [row["target"] for row in read_csv(tmp_path / "targets_gpu.csv")]
    assert targets.count("multi_lora: to_linear") == 5
    assert {"retrieve: p50_us", "multi_lora: error in bfloat16, worst", "multi_lora: calls that gave other bits"} <= {
        *targets
    }
    assert capsys.readouterr().out.rstrip().splitlines()[-1].strip().startswith("multi_lora: calls")
    assert ("cpu", "multi_lora", "decode") in dispatch.read_measured(tmp_path / "preference.csv")


def test_the_order_it_proposes_is_by_time_and_dispatch_reads_it(tmp_path):
    case = {"how": "graph", "pass": "forward", "B": 1, "T": 64, "I": 8, "O": 8, "P": 3, "dtype": "bfloat16"}
    times = {"triton": 5.0, "cuda": 3.0, "triton with base": 2.5, "cuda with base": 2.0, "gather bmm": 1.0}
    rows = [case | {"size": "decode", "way": way, "p50_us": str(time)} for way, time in times.items()]
    write_csv(tmp_path / "preference.csv", preference(rows, "multi_lora"))
    assert dispatch.read_measured(tmp_path / "preference.csv") == {
        ("cuda", "multi_lora", "decode"): ("cuda", "triton", "reference"),
        ("cuda", "adapted_linear", "narrow"): ("triton", "reference"),
        ("cuda", "adapted_linear", "packed"): ("cuda", "reference"),
    }


def test_a_way_that_fails_or_computes_something_else_is_left_out_and_said(capsys):
    def broken():
        raise RuntimeError("no such kernel")

    exact = torch.ones(3, dtype=torch.float64)
    ways = {"linear": lambda: 5 * exact, "vllm x K": broken, "materialised": lambda: 2 * exact}
    turns = iter([1.0, 1.0, 1.0, 1.5])
    ways |= {"gather bmm": lambda: exact, "triton": lambda: exact.float(), "cuda": lambda: next(turns) * exact}
    found = checked(ways, (exact,), 1e-4)
    assert {name: about["repeats"] for name, about in found.items()} == {
        "linear": "-", "gather bmm": "-", "triton": "yes", "cuda": "NO",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "vllm x K left out: RuntimeError: no such kernel" in said
    assert "materialised left out: relative error 1.0e+00" in said


def test_each_target_is_judged_by_the_fastest_of_our_ways_and_of_speed_ups_by_the_worst_case():
    case = {"how": "graph", "pass": "forward", "I": 8, "O": 8, "dtype": "bfloat16", "repeats": "yes", "error": "1e-3"}
    rows = []
    for batch, alternative, target in ((1, 4.0, 1.2), (2, 2.4, "-")):
        for way, time in {
            "linear": 10.0,
            "triton": 13.0,
            "cuda": 12.0,
            "gather bmm compiled": 10 + alternative,
        }.items():
            about = {"B": batch, "way": way, "p50_us": time, "added_us": time - 10, "to_linear": time / 10}
            rows.append(case | about | {"target": target})
    rows[1] |= {"repeats": "NO", "error": "3e-2"}
    found = {row["target"]: (row["got"], row[""]) for row in verdicts(rows, "multi_lora")}
    assert found == {
        "multi_lora: to_linear": ("1.2", "met"),
        "multi_lora: gather bmm compiled's added time to ours, worst": ("1.2", "MISSED"),
        "multi_lora: error in bfloat16, worst": ("0.03", "MISSED"),
        "multi_lora: calls that gave other bits": ("1", "MISSED"),
    }


def test_the_page_of_what_was_expected_has_the_measured_figures():
    assert (RESULTS / "gpu_expected.md").read_text() == page()
