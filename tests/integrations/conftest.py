"""Fixtures for the Ray tests: a local cluster, and a store that its workers can open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import slm_fast
from tests.models import beside_its_backbone, random_task

PACKAGE = Path(slm_fast.__file__).parents[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a local cluster that this process has started and is connected to."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(PACKAGE))
        patch.setenv("SLM_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))  # the workers inherit it
        how = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 << 20}
        context = ray.init("local", **how, log_to_driver=False, logging_level="ERROR")
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of two random tasks, with its backbone in the same folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_fast.configure.MAX_FEATURES", 64)
        folder = tmp_path_factory.mktemp("ray")
        yield beside_its_backbone(
            folder, lambda slm: [random_task(slm, topic, labels=(topic, "no", "yes")) for topic in ("farm", "sea")]
        )
