"""Pooling of the trunk's hidden states: means and maxima over real tokens, wherever padding is."""

from __future__ import annotations

import pytest
import torch

from slm_fast.query import MAX_SCALE, TrunkQuery


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 3, 5), (1, 7, 0), (4,)], ids=str)
def test_pooling_is_the_mean_over_real_tokens(dtype, side, lengths):
    hidden = torch.randn(len(lengths), 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    hidden[mask == 0] = torch.nan
    pooled = TrunkQuery.pool(hidden, mask)
    assert pooled.dtype == torch.float32
    for row, states, real in zip(pooled, hidden.double(), mask.bool(), strict=True):
        expected = states[real].mean(0) if real.any() else torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(row.double(), expected, rtol=1e-6, atol=1e-6)


def test_padding_between_real_tokens_is_left_out_too():
    hidden, mask = torch.randn(2, 6, 3), torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 0]])
    expected = torch.stack([hidden[0, [0, 1, 3, 4]].mean(0), hidden[1, [0, 1, 3]].mean(0)])
    torch.testing.assert_close(TrunkQuery.pool(hidden, mask), expected)


def test_gradients_reach_real_tokens_alone():
    hidden, mask = torch.randn(2, 4, 3, requires_grad=True), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    TrunkQuery.pool(hidden, mask).sum().backward()
    expected = (mask / mask.sum(1, keepdim=True))[..., None].expand(2, 4, 3)
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (4, 1, 3), (0, 2, 4)], ids=str)
@pytest.mark.parametrize("side", ["right", "left", "middle"])
def test_maxima_are_over_real_tokens(lengths, side):
    hidden, mask = torch.randn(3, 4, 5), torch.arange(4) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    elif side == "middle":
        hidden, mask = torch.cat([hidden, hidden + 1], 1), torch.cat([mask, mask.flip(1)], 1)
    hidden[~mask] = torch.nan
    pooled: list[torch.Tensor] = []
    TrunkQuery((0,), 5, hidden.device, maximum=True).read(hidden, mask.long(), pooled)
    expected = [row[real].amax(0) if real.any() else torch.zeros(5) for row, real in zip(hidden, mask, strict=True)]
    assert torch.equal(pooled[1], torch.stack(expected) * MAX_SCALE)
