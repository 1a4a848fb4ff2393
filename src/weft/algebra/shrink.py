"""Shrinkage of covariances and second moments towards a multiple of I: what a small calibration set cannot know."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def shrink(
    s: Tensor, amount: float | Literal["auto"], *, n: float | None = None, fourth: float | None = None
) -> Tensor:
    """(1 − amount)·s + amount·(trace s / d)·I for s (d × d): the same trace, eigenvalues closer together.

    Args:
        s: a covariance or a second moment, divided by n.
        amount: from 0 (s itself) to 1 (a multiple of I), or "auto" for `ledoit_wolf`, which needs the other two:
        n: rows behind s.
        fourth: mean of ‖x‖⁴ over them, x less its mean where s is a covariance (`Moments.fourth`).
    """
    if amount == "auto":
        if n is None or fourth is None:
            raise ValueError('amount="auto" needs n and fourth, the number of rows and their mean ‖x‖⁴')
        amount = ledoit_wolf(s, n, fourth)
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount} is not within 0..1")
    shrunk = (1 - amount) * s
    shrunk.diagonal().add_(amount * s.diagonal().mean())
    return shrunk


def ledoit_wolf(s: Tensor, n: float, fourth: float) -> float:
    """The amount that brings s closest to what it estimates, in expected ‖·‖_F².

    After Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004:

        min(1, (mean ‖x‖⁴ − ‖s‖_F²) / n / ‖s − (trace s / d)·I‖_F²)

    The numerator is the variance of s over n independent rows. Tokens of one text are not independent: it is too small
    for them, and so is the amount.
    """
    s = s.double()
    spread = float((s - s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype, device=s.device)).square().sum())
    variance = max(fourth - float(s.square().sum()), 0.0) / n
    return min(variance / spread, 1.0) if spread else 0.0
