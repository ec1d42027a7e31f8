"""Makes the stores of all command-line tests small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_features() -> Iterator[None]:
    """Use 64 random features instead of 2,048, whose statistics add seconds to every call that opens a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_fast.configure.MAX_FEATURES", 64)
        yield
