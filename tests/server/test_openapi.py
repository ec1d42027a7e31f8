"""Requests generated from the OpenAPI schema, valid and invalid: none is answered with a 500."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from served import serving, store_with

EARNEST = bool(os.environ.get("SLM_FAST_FUZZ"))
EXAMPLES = 300 if EARNEST else 6
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check_of(bearer: str, seen: list[int]) -> Callable[[schemathesis.Case], None]:
    def check(case: schemathesis.Case) -> None:
        response = case.call(headers={"authorization": bearer})
        seen.append(response.status_code)
        assert response.status_code < 500 or response.status_code == 503, response.text

    return check


@pytest.mark.parametrize("name", ["llama", *(["bert"] if EARNEST else [])])  # a generative model has all paths
def test_no_request_that_follows_from_the_schema_or_breaks_it_is_answered_with_a_500(name: str, tmp_path) -> None:
    slm, seen = store_with(tmp_path / "store", name), list[int]()
    with serving(slm, max_new_tokens=3, admin="admin", key="key") as (client, _):
        schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json", headers={"authorization": "Bearer key"})
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {"/v1/classify", "/predict", "/v1/route", "/v1/tasks", "/v1/chat/completions"} <= {
            operation.path for operation in operations
        }
        for operation in operations:
            strategies = [operation.as_strategy()]
            if operation.body:
                strategies.append(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
            bearer = "Bearer admin" if operation.path.startswith("/v1/tasks") else "Bearer key"
            for strategy in strategies:
                SETTINGS(given(case=strategy)(check_of(bearer, seen)))()
        assert client.get("/health") == {"status": "ok"}
    assert len(seen) > 40
    assert {200, 400} <= set(seen)
