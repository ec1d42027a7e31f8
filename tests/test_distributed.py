"""Several processes learn one task as a single process does, with and without sharding of the backbone (FSDP2)."""

from __future__ import annotations

import functools
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from command import one_line, slm_fast
from forks import forked
from models import make_model, make_slm, make_tokenizer, one_thread, random_task, toy_task  # noqa: F401
from test_data import write_csv

from slm_fast import LearnOptions, ModelConfig, ScalableLM, cli, distributed
from slm_fast.backbone import Backbone
from slm_fast.cli import learn, shell
from slm_fast.distributed import Processes, process_group, shard
from slm_fast.errors import InputError
from slm_fast.learn import learn_task
from slm_fast.store import Store
from slm_fast.task_file import task_from_bytes, task_to_bytes
from slm_fast.tasks import LearnedTask

SAY = "say yes or no"
SHORT: dict[str, Any] = {"epochs": 1, "rank": 3}
# name -> backbone, model options, learn options, number of rows, whether there are validation rows
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, bool]] = {
    "odd last batch": ("bert", {}, {"batch_size": 8, "epochs": 2}, 33, True),
    "fewer rows than processes": (
        "bert",
        {"query": "trunk", "router": "dtkr"},
        {"batch_size": 1, "slots": 2},
        5,
        False,
    ),
    "parts of a step": ("bert", {}, {"batch_size": 7, "accumulate": 4}, 18, False),
    "joint": ("bert", {}, {"joint": True, "batch_size": 5}, 12, False),
    "warm start": ("bert", {}, {"warm_start": "farm", "batch_size": 5}, 12, True),
    "writes": ("t5", {}, {"batch_size": 5}, 11, True),
    "writes causally": ("llama", {}, {"batch_size": 5}, 11, True),
}


def learned_alone(case: str, processes: Processes | None = None, sharded: bool = False) -> LearnedTask:
    """The task that a case learns, in this process alone or, with `processes`, in a group that all call this."""
    name, config, options, rows, valid = CASES[case]
    backbone = Backbone(make_model(name), make_tokenizer(name), "")
    if sharded:
        whole = sum(parameter.numel() for parameter in backbone.layers[0].parameters())
        shard(backbone, processes)
        assert sum(p.to_local().numel() for p in backbone.layers[0].parameters()) < 0.7 * whole
    slm = ScalableLM(backbone, ModelConfig(**config))
    if options.get("joint") or options.get("warm_start"):
        slm.add(random_task(make_slm(name), "farm", rank=2))
    task = toy_task("sea", rows=rows, instruction="" if name == "bert" else SAY)
    checked = toy_task("sea", rows=7, seed=1, instruction="" if name == "bert" else SAY) if valid else None
    more = {} if processes is None else {"processes": processes}
    return learn_task(slm.model, task, LearnOptions(**{**SHORT, **options}), valid=checked, progress=False, **more)


# Processes


def launched(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})


def learns_cases(rank: int, world_size: int, port: int, folder: Path, sharded: bool, cases: list[str]) -> None:
    launched(rank, world_size, port)
    with process_group("cpu") as group:
        for case in cases:
            learned = learned_alone(case, group, sharded)
            (folder / f"{case}.{rank}").write_bytes(task_to_bytes(learned))


def calls_cli(rank: int, world_size: int, port: int, folder: Path, calls: Sequence[Sequence[str]], dies: bool) -> None:
    launched(rank, world_size, port)
    if dies and rank:  # while the second task is learned
        all_reduce, steps = distributed.ProcessGroup.all_reduce, []

        def reduce_or_die(*arguments: Any) -> None:
            steps.append(1)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            all_reduce(*arguments)

        distributed.ProcessGroup.all_reduce = reduce_or_die
    said = io.StringIO()
    with redirect_stderr(said):
        status = cli.main(list(calls[rank]))
    (folder / f"said.{rank}").write_text(said.getvalue())
    sys.exit(status)


def together(target: Callable[..., None], world_size: int, *arguments: object) -> list[int | None]:
    """Call `target` in `world_size` processes, each with its rank; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forked(target, i, world_size, port, *arguments) for i in range(world_size)]
    until = time.monotonic() + 240
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


@functools.cache
def alone(case: str) -> LearnedTask:
    return learned_alone(case)


@pytest.mark.parametrize(
    ("world_size", "sharded", "cases"),
    [(2, False, [*CASES]), (3, False, ["fewer rows than processes", "parts of a step"]), (2, True, [*CASES])],
)
def test_processes_learn_what_one_learns(world_size: int, sharded: bool, cases: list[str], tmp_path: Path) -> None:
    assert together(learns_cases, world_size, tmp_path, sharded, cases) == [0] * world_size
    for case in cases:
        expected = alone(case)
        for rank in range(world_size):
            file = tmp_path / f"{case}.{rank}"
            found = task_from_bytes(file.read_bytes(), file)
            same = ("name", "labels", "options", "origin")
            assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same], case
            assert found.router.keys() == expected.router.keys()
            for key, tensor in found.router.items():
                torch.testing.assert_close(tensor, expected.router[key], rtol=0, atol=0)
            pairs = [*zip(found.values.values(), expected.values.values(), strict=True)]
            pairs += [(found.head, expected.head)] if found.head and expected.head else []
            for got, wanted in pairs:
                for tensor, reference in zip(got, wanted, strict=True):
                    torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-6, msg=f"{case}, rank {rank}")


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    make_model("bert").save_pretrained(folder / "bert")
    make_tokenizer("bert").save_pretrained(folder / "bert")
    for name, seed in (("sea", 0), ("farm", 0), ("other", 1)):
        rows = toy_task("farm" if name == "farm" else "sea", rows=9, seed=seed).rows
        write_csv(folder / f"{name}.csv", *((row.text, row.target or "") for row in rows))
    return folder


def call(folder: Path, store: Path, sea: str = "sea.csv", *more: object) -> list[str]:
    files = [f"--task=sea={folder / sea}", f"--task=farm={folder / 'farm.csv'}"]
    return list(map(str, ["learn", store, "--backbone", folder / "bert", "--epochs", 1, *files, *more]))


def said(folder: Path) -> list[str]:
    return [(folder / f"said.{rank}").read_text() for rank in (0, 1)]


def test_launched_processes_make_one_store_and_the_first_says_so(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = slm_fast(*call(folder, one))
    for more, done in (((), "learned"), (("--fsdp",), "kept")):
        assert together(calls_cli, 2, tmp_path, [call(folder, two, "sea.csv", *more)] * 2, False) == [0, 0]
        main, other = said(tmp_path)
        lines = [line for line in main.splitlines() if not line.startswith("slm-fast: warning: ")]
        assert lines == [
            line.replace(str(one), str(two))
            .replace("learned", done)
            .replace(f"{two}: 1", f"{two}: {1 + (done == 'kept')}")
            for line in alone.stderr.splitlines()
        ]
        assert other == ""
    assert Store.open(two).verify() == []
    for found, expected in zip(Store.open(two).load(), Store.open(one).load(), strict=True):
        assert found.origin == expected.origin
        for module, pair in found.values.items():
            for tensor, reference in zip(pair, expected.values[module], strict=True):
                torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-6)


def test_what_is_wrong_in_one_process_ends_all_in_one_line(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    good, missing = call(folder, store), call(folder, store, "missing.csv")
    for calls, status, line in (
        ([good, missing], 2, f"process 1: {folder / 'missing.csv'}: no such file"),
        ([missing, missing], 2, f"{folder / 'missing.csv'}: no such file"),
        ([good, call(folder, store, "other.csv")], 1, "task 'sea': process 1 has other rows, options, tasks, backbone"),
        ([[*good, "--valid", "sea=-"]] * 2, 2, "standard input (-): does not go with the processes of a launcher"),
    ):
        assert together(calls_cli, 2, tmp_path, calls, False) == [status] * 2
        main, other = said(tmp_path)
        assert main.startswith(f"slm-fast: error: {line}")
        assert (main.count("\n"), other) == (1, "")
    assert not Store.exists(store) or Store.open(store).files == {}


def test_a_process_that_dies_ends_the_others_in_one_line_and_what_was_committed_stays(
    folder: Path, tmp_path: Path
) -> None:
    assert together(calls_cli, 2, tmp_path, [call(folder, tmp_path / "store")] * 2, True) == [1, -signal.SIGKILL]
    first, last = (tmp_path / "said.0").read_text().splitlines()
    assert first.startswith("learned sea from 9 rows")
    assert last.startswith("slm-fast: error: another process of this run is no more: ")
    assert list(Store.open(tmp_path / "store").files) == ["sea"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--jobs", "2"), "--jobs: does not go with the processes of a launcher"),
        (("--valid", "sea=/dev/stdin"), r"standard input \(-\): does not go with the processes of a launcher"),
        (("--fsdp", "--autocast"), "--autocast: does not go with --fsdp"),
    ],
)
def test_what_does_not_go_with_several_processes_is_said(folder: Path, tmp_path: Path, more, said: str) -> None:
    arguments = shell._parser().parse_args(call(folder, tmp_path / "store", "sea.csv", *more))
    with pytest.raises(InputError, match=said):
        learn._read(arguments, launched=True)


def test_a_process_alone_is_told_that_fsdp_needs_several(folder: Path, tmp_path: Path) -> None:
    one_line(slm_fast(*call(folder, tmp_path / "store", "sea.csv", "--fsdp")), 2, "--fsdp: needs several processes")


@pytest.mark.parametrize(
    ("environment", "shards"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "true"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False),
    ],
)
def test_what_accelerate_was_told_decides_on_shards(environment: dict[str, str], shards: bool, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.asks_for_shards() is shards


def test_rows_are_shared_out_and_a_process_without_any_passes_one_that_does_not_count() -> None:
    group = Processes()
    for world_size, rows in ((1, 5), (2, 5), (3, 2), (4, 1)):
        shares = []
        for group.rank in range(world_size):
            group.world_size = world_size
            shares.append(group.share(list(range(10, 10 + rows))))
        assert sorted(row for mine, count in shares if count for row in mine) == list(range(10, 10 + rows))
        assert all(mine for mine, _ in shares)
        assert [count for _, count in shares] == [rank < rows for rank in range(world_size)]
