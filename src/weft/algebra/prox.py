"""Proximal operators and the level schedules that drive them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_threshold(v: Tensor, t: float | Tensor) -> Tensor:
    """The prox of t·‖·‖₁: sign(v)·max(|v| − t, 0), elementwise.

    >>> soft_threshold(torch.tensor([0.3, -0.3, 0.05]), 0.1)
    tensor([ 0.2000, -0.2000,  0.0000])
    """
    return torch.sign(v) * torch.clamp(v.abs() - t, min=0)


def reference_prox(v: Tensor, t: float) -> Tensor:
    """The prox of SoRA's and CoDyRA's code, three masked statements in turn: what the first two shrink to within t is
    zeroed as well, so that entries up to 2t are lost, and |v| = t is left alone.

    >>> reference_prox(torch.tensor([0.3, 0.15, -0.3]), 0.1)
    tensor([ 0.2000,  0.0000, -0.2000])
    """
    v = torch.where(v > t, v - t, v)
    v = torch.where(v < -t, v + t, v)
    return torch.where(v.abs() < t, torch.zeros_like(v), v)


def levels(start: float, stop: float, count: int, spacing: str) -> list[float]:
    """`count` thresholds from `start` to `stop`, both ends exact.

    spacing: "linear" (evenly spaced), "log_linear" (the logarithm of evenly spaced exponentials; close to linear when
    the values are small) or "exp_linear" (geometric; needs start > 0).
    """
    if count == 1:
        return [stop]
    steps = [i / (count - 1) for i in range(count)]
    if spacing == "linear":
        values = [start + (stop - start) * u for u in steps]
    elif spacing == "log_linear":
        low, high = math.exp(start), math.exp(stop)
        values = [math.log(low + (high - low) * u) for u in steps]
    elif spacing == "exp_linear":
        if start <= 0:
            raise ValueError(f"exp_linear levels are geometric and need a start above 0, not {start}")
        values = [start * (stop / start) ** u for u in steps]
    else:
        raise ValueError(f"unknown spacing {spacing!r}: use linear, log_linear or exp_linear")
    return [start, *values[1:-1], stop]
