"""Random queries of toy tasks, and the closed form that the gaussian router is compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WIDTH = 12


def draw(rows: int, seed: int, *, width: int = WIDTH, mean: float = 1.0) -> Tensor:
    """Queries [rows, width] of one task: Gaussian, with a mean of its own and a covariance that all tasks share."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    centre = mean * torch.randn(width, generator=generator)
    return centre + torch.randn(rows, width, generator=generator) @ mix / width**0.5


def closed_form(queries: list[Tensor], asked: Tensor) -> np.ndarray:
    """log N(asked; m_p, S) [B, P] in numpy float64, up to a constant per row.

    S is the pooled covariance with the oracle-approximating shrinkage of scikit-learn (Chen et al. 2010).
    """
    data = [query.double().numpy() for query in queries]
    means = np.stack([rows.mean(0) for rows in data])
    centred = np.concatenate([rows - rows.mean(0) for rows in data])
    width, freedom = centred.shape[1], len(centred) - len(data)
    sample = centred.T @ centred / freedom
    mu, alpha = np.trace(sample) / width, np.mean(sample**2)
    shrinkage = min(1.0, (alpha + mu**2) / ((freedom + 1) * (alpha - mu**2 / width)))
    covariance = (1 - shrinkage) * sample + shrinkage * mu * np.eye(width)
    difference = asked.double().numpy()[:, None] - means  # [B, P, D]
    return -0.5 * np.einsum("bpd,bpd->bp", difference, np.linalg.solve(covariance, difference[..., None])[..., 0])


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)
