"""Interrupts a call at each line in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any


def broken_off(call: Callable[[], object], *modules: ModuleType) -> Iterator[int]:
    """Run `call` repeatedly, each time raising KeyboardInterrupt one line of the modules' code later, until the call
    completes. Yields after each interrupted run, so that a test can check the state it left behind."""
    files = {module.__file__ for module in modules}
    last = 0
    while True:
        last += 1
        line = 0

        def trace(frame: FrameType, event: str, _: Any, last: int = last) -> Any:
            nonlocal line
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                line += 1
                if line == last:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        yield last
