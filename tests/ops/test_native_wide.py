"""retrieve by product among wide keys, which some processors multiply in tiles of bfloat16."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops


def assert_equals_the_specification(query, keys, k, **options):
    got = ops.retrieve(query, keys, k, **options)
    with ops.use_backend("reference"):
        expected = ops.retrieve(query, keys, k, **options)
    assert torch.equal(got.slot_ids, expected.slot_ids)
    torch.testing.assert_close(got.weights, expected.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [32, 127, 129, 300, 1031])
@pytest.mark.parametrize("B", [9, 48, 57, 96, 200])
def test_products_with_wide_keys_are_ranked_among_near_ties(B, width):
    """Numbers from tiny to large, a key that is zero, and one with a number that bfloat16 rounds to infinity."""
    random = torch.Generator().manual_seed(width)
    query, kinds = torch.randn(B, width, generator=random), torch.randn(9, width, generator=random)
    keys = kinds[torch.randint(9, (500,), generator=random)]
    keys = torch.where(torch.rand(500, width, generator=random) > 0.9, torch.nextafter(keys, keys + 1), keys)
    bias = torch.randint(3, (500,), generator=random) / 1e6
    keys[0] = 0
    for factor in (torch.ones(1), 2.0 ** torch.randint(-40, 40, (width,), generator=random), torch.tensor([1e-37])):
        scaled = query * factor, keys / factor.clamp(min=2.0**-20)
        scaled[1][1, 0] = 3.4e38 if factor[0] < 1e-30 else 1
        assert_equals_the_specification(*scaled, 3, metric="dot")
        assert_equals_the_specification(*scaled, 3, metric="dot", bias=bias)
