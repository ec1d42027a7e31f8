"""The GPU benchmark goes through all its steps on a CPU, where each way's result is held against the others'."""

from __future__ import annotations

import sys

import pytest

from slm_fast.ops import dispatch


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="only Triton's interpreter runs its kernels on a CPU")
@pytest.mark.skipif(dispatch.TRITON_MISSING is not None, reason=str(dispatch.TRITON_MISSING))
def test_a_dry_run_times_every_way_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    from benchmarks.ops import bench_gpu
    from benchmarks.timing import read_csv

    monkeypatch.setattr(sys, "argv", ["bench_gpu", str(tmp_path), "--dry-run"])
    bench_gpu.main()
    rows = read_csv(tmp_path / "multi_lora_gpu.csv")
    assert {"linear", "triton", "triton with base", "gather bmm", "materialised", "peft mixed", "arrow"} <= {
        row["way"] for row in rows
    }
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert {row["size"] for row in rows} == {"decode", "tokens"}
    searches = read_csv(tmp_path / "retrieve_gpu.csv")
    assert {"triton", "gemm + topk", "bmm + topk a group"} <= {row["way"] for row in searches}


def test_the_order_it_proposes_is_by_time_and_dispatch_reads_it(tmp_path):
    from benchmarks.ops.bench_gpu import preference
    from benchmarks.timing import write_csv

    case = {"how": "graph", "pass": "forward", "B": 1, "T": 1, "I": 8, "O": 8, "P": 3, "dtype": "bfloat16"}
    times = {"triton": 5.0, "cuda": 3.0, "triton with base": 2.5, "gather bmm": 1.0}
    rows = [case | {"size": "decode", "way": way, "p50_us": str(time)} for way, time in times.items()]
    write_csv(tmp_path / "preference.csv", preference(rows, "multi_lora"))
    assert dispatch.read_measured(tmp_path / "preference.csv") == {
        ("cuda", "multi_lora", "decode"): ("cuda", "triton", "reference"),
        ("cuda", "adapted_linear", "narrow"): ("triton", "reference"),
    }
