"""When Python may look for cycles to free: it stops all threads for it, the longer the more objects there are."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Inside the block Python does not look for cycles, in no thread of the process. Where many objects are made that
    stay, that takes as long as the rest."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def settle() -> None:
    """From now on Python passes over all objects that are there, as those of a server are: with 1,000 tasks a look at
    them takes a third of a second, in which nobody is answered."""
    gc.collect()
    gc.freeze()


@contextmanager
def settled() -> Iterator[None]:
    """Inside the block it is as after `settle`."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()
