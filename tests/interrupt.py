"""Breaking off a call at each of its lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any


def broken_off(call: Callable[[], object], *modules: ModuleType) -> Iterator[int]:
    """Runs `call` again and again, each time breaking it off a line of the modules' code later, until it runs through.
    Yields after each time it was broken off, so that a test can look at what it left behind."""
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
