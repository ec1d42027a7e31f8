"""What some processors multiply in tiles: retrieve by product among wide keys, and multi_lora in bfloat16."""

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


@pytest.mark.parametrize("R", [(1, 1), (1, 3), (2, 8), (3, 11), (4, 12), (8, 16)])
@pytest.mark.parametrize("T", [16, 31, 64, 65, 150])
def test_increments_of_many_tokens_stay_within_their_rows(T, R):
    """Features that fill tiles and some that do not, ranks from 1 to 128, a sample without slots, one with numbers that
    are not finite, and rows of x and base that are not adjacent in memory."""
    (K, r), random = R, torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(shape, generator=random).bfloat16()

    for features_in, features_out in ((32, 33), (96, 64), (160, 200), (40, 96)):
        x, base = normal(4, T, features_in + 7)[..., :features_in], normal(4, T, features_out + 3)[..., :features_out]
        lora_a, lora_b = normal(5, r, features_in), normal(5, r, features_out)
        slot_ids, weights = torch.randint(-1, 5, (4, K), generator=random), torch.rand(4, K, generator=random)
        slot_ids[1] = -1
        x[2, T // 2, 3], x[2, T - 1, 0] = torch.nan, torch.inf
        got = ops.multi_lora(x, lora_a, lora_b, slot_ids, weights, base)
        with ops.use_backend("reference"):
            x64, a64, b64, weights64, base64 = (part.double() for part in (x, lora_a, lora_b, weights, base))
            expected = ops.multi_lora(x64, a64, b64, slot_ids, weights64, base64)
        assert torch.equal(got[1], base[1])
        broken = ~expected.isfinite()
        assert torch.equal(~got.isfinite(), broken)
        difference = (got.double() - expected).masked_fill(broken, 0).norm()
        assert difference <= 6e-3 * expected.masked_fill(broken, 0).norm()


@pytest.mark.parametrize(
    ("B", "T", "P", "K", "r", "I", "O"),
    [(4, 128, 5, 4, 12, 768, 384), (2, 600, 3, 4, 16, 128, 64), (3, 17, 3, 1, 3, 32, 160), (2, 290, 4, 3, 7, 96, 96)],
)
def test_gradients_of_long_samples_equal_the_specification_and_samples_without_a_slot_have_none(B, T, P, K, r, I, O):
    random = torch.Generator().manual_seed(0)
    shapes = ((B, T, O), (B, T, I), (P, r, I), (P, r, O))
    grad, x, a, b = (torch.randn(shape, generator=random).bfloat16() for shape in shapes)
    ids, weights = torch.randint(-1, P, (B, K), generator=random), torch.rand(B, K, generator=random)
    ids[-1] = -1
    found = torch.ops.slm_fast.multi_lora_native_backward(grad, x, a, b, ids, weights, [True] * 4)
    wide = [t.double() for t in (grad, x, a, b)]
    expected = torch.ops.slm_fast.multi_lora_reference_backward(*wide, ids, weights.double(), [True] * 4)
    for got, exact in zip(found, expected, strict=True):
        assert (got.double() - exact).norm() <= 5e-3 * exact.norm()
    assert not found[0][-1].any()
    assert not found[3][-1].any()
