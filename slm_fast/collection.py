"""Control of Python's cyclic garbage collector, which stops all threads, for longer the more objects there are."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable garbage collection in all threads inside the block. Where many lasting objects are created, it would take
    as long as everything else."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def settle() -> None:
    """Exclude all existing objects from future garbage collections: in a server with 1,000 tasks, one pass over them
    blocks all answers for a third of a second."""
    gc.collect()
    gc.freeze()


@contextmanager
def settled() -> Iterator[None]:
    """Call `settle` for the duration of the block."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()
