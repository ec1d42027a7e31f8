"""The operators in graphs of torch.compile for any sizes and any numbers among their arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from slm_fast import ops


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[backend.name for backend in ops.backends("cpu")], autouse=True)
def _backend(request):
    torch.compiler.reset()
    with ops.use_backend(request.param):
        yield


def assert_one_graph_gives_the_same(function, *calls, dynamic=None):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for call in calls:
        for got, expected in zip(compiled(*call), function(*call), strict=True):
            torch.testing.assert_close(got, expected)


def test_retrieve_compiles_for_any_size():
    sizes = [(normal(B, 8), normal(P, 8, seed=1)) for B, P in ((3, 5), (2, 7))]
    assert_one_graph_gives_the_same(partial(ops.retrieve, k=2), *sizes, dynamic=True)


def retrieve(query, keys, k, groups, temperature):
    return ops.retrieve(query, keys, k, groups=groups, weighting="softmax", temperature=temperature)


def test_retrieve_compiles_for_a_second_temperature():
    query, keys = normal(3, 8), normal(5, 8, seed=1)
    assert_one_graph_gives_the_same(retrieve, *((query, keys, 2, 1, t) for t in (1.0, 0.5, 3.0)))


def test_retrieve_compiles_for_any_number_among_its_arguments():
    query, keys = normal(3, 8), normal(5, 8, seed=1)
    calls = [(query, keys, 2, 1, 1.0), (query, keys, 3, 2, 0.5), (query, keys, 7, 4, 3.0)]
    assert_one_graph_gives_the_same(retrieve, *calls, dynamic=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_key_loss_compiles_for_any_number_among_its_arguments(dynamic):
    def key_loss(query, keys, k, groups, mask_prob, seed):
        return [ops.key_loss(query, keys, k, groups=groups, mask_prob=mask_prob, seed=seed)]

    query, keys = normal(3, 8), normal(5, 8, seed=1)
    calls = [(query, keys, 2, 1, 0.1, 3), (query, keys, 3, 2, 0.5, -9), (query, keys, 7, 4, 0.3, 2**62)]
    assert_one_graph_gives_the_same(key_loss, *calls, dynamic=dynamic)
