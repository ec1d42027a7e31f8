"""How long the tests of this folder go on: a little in `make test`, in earnest with `make fuzz`."""

from __future__ import annotations

import os

EARNEST = bool(os.environ.get("SLM_FAST_FUZZ"))
SEED = int(os.environ.get("SLM_FAST_FUZZ_SEED", "0"))


def times(few: int, many: int) -> int:
    return many if EARNEST else few
