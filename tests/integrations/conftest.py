"""What tests of Ray share: a cluster on this machine, and a store that its workers find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import slm_fast
from tests.models import beside_its_backbone, random_task

PACKAGE = Path(slm_fast.__file__).parents[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster, which this process is not connected to."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(PACKAGE))
        patch.setenv("SLM_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))  # that of the workers, too
        how = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 << 20}
        context = ray.init("local", **how, log_to_driver=False, logging_level="ERROR")
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two random tasks, over a backbone that lies beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_fast.configure.MAX_FEATURES", 64)
        folder = tmp_path_factory.mktemp("ray")
        yield beside_its_backbone(
            folder, lambda slm: [random_task(slm, topic, labels=(topic, "no", "yes")) for topic in ("farm", "sea")]
        )
