"""Stores made by the command line's tests are small ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_features() -> Iterator[None]:
    """64 random features rather than 2,048, whose statistics take seconds of every call that opens a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_fast.configure.MAX_FEATURES", 64)
        yield
