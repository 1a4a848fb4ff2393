"""A few numbers that tell whether an adapter meets the weight it was made for."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import UsageError

ENTRIES = 8
TOLERANCE = 0.02  # lets a float32 base meet its bfloat16 copy (2⁻⁸), and nothing else
QUANTISED = 0.7  # lets a base meet its copy of two bits and more; another model's entries are √2 away


def sketch(weight: Tensor, quantised: bool = False) -> list[float]:
    """The weight's shape, its number of dimensions first, then eight evenly spaced entries, and a 1 if quantised."""
    shape = [float(weight.dim()), *map(float, weight.shape)]
    if weight.is_meta:
        return shape
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, ENTRIES, dtype=torch.float64).long().to(flat.device)
    return shape + flat[index].double().cpu().tolist() + [1.0] * quantised


def check(name: str, weight: Tensor, saved: list[float], quantised: bool = False) -> None:
    """Raise UsageError where a weight is not the one whose sketch was saved with the adapter."""
    dims = int(saved[0]) + 1
    shape = tuple(int(n) for n in saved[1:dims])
    if shape != tuple(weight.shape):
        raise UsageError(
            f"the adapter was made for another base model: {name} was {shape} and is {tuple(weight.shape)} here"
        )
    if weight.is_meta or len(saved) == dims:
        return
    then = torch.tensor(saved[dims : dims + ENTRIES], dtype=torch.float64)
    now = torch.tensor(sketch(weight)[dims:], dtype=torch.float64)
    if quantised or len(saved) > dims + ENTRIES:
        differs = (then - now).norm() > QUANTISED * then.norm() + 1e-8
    else:
        differs = (then - now).abs().max() > TOLERANCE * then.abs().max() + 1e-8
    if differs:
        raise UsageError(f"the adapter was made for another base model: the values of {name} differ from those it met")
