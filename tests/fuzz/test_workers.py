"""`slm-fast learn --jobs` with workers killed at random: one kill in `make test`, up to 20 in `make fuzz`."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from command import slm_fast
from effort import SEED, times
from models import one_thread  # noqa: F401
from stores import tree
from test_jobs import NAMES, call, folder, wait_for, workers_of  # noqa: F401


@pytest.mark.parametrize("round_", range(times(1, 10)))
def test_tasks_learned_side_by_side_make_the_store_of_one_process_though_workers_are_killed(
    folder: Path,  # noqa: F811
    round_: int,
) -> None:
    rng, killed, done = random.Random(f"jobs {SEED} {round_}"), [], threading.Event()

    def kill() -> None:
        for _ in range(times(1, 2)):  # a task gets three attempts, so its worker may be killed twice
            wait_for("no worker", lambda: done.is_set() or workers_of(os.getpid()))
            time.sleep(rng.uniform(0, 8))
            for pid in workers_of(os.getpid())[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    said = slm_fast(*call(folder, f"two{round_}", "--jobs", 2))
    done.set()
    killer.join()
    assert said.returncode == 0, said.stderr
    assert tree(folder / f"two{round_}") == tree(folder / "one")
    learned = [line.split()[1] for line in said.stderr.splitlines() if line.startswith("learned")]
    assert sorted(learned) == sorted(NAMES)
    assert killed or round_
    assert workers_of(os.getpid()) == []
