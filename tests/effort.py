"""The extent of the fuzz tests: short in `make test`, long in `make fuzz`, which sets SLM_FAST_FUZZ."""

from __future__ import annotations

import os

EARNEST = bool(os.environ.get("SLM_FAST_FUZZ"))
SEED = int(os.environ.get("SLM_FAST_FUZZ_SEED", "0"))


def times(few: int, many: int) -> int:
    return many if EARNEST else few
