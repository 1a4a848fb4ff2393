"""A few numbers that tell whether an adapter meets the weight it was made for."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import UsageError

ENTRIES = 8
TOLERANCE = 0.02  # lets a float32 base meet its bfloat16 copy (2⁻⁸), and nothing else


def sketch(weight: Tensor) -> list[float]:
    """The weight's shape, its number of dimensions first, then eight evenly spaced entries."""
    shape = [float(weight.dim()), *map(float, weight.shape)]
    if weight.is_meta:
        return shape
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, ENTRIES, dtype=torch.float64).long().to(flat.device)
    return shape + flat[index].double().cpu().tolist()


def check(name: str, weight: Tensor, sketches: dict[str, list[float]]) -> None:
    """Raise UsageError where a weight is not the one that the adapter was made for. Unknown names pass."""
    saved = sketches.get(name)
    if saved is None:
        return
    dims = int(saved[0]) + 1
    shape = tuple(int(n) for n in saved[1:dims])
    if shape != tuple(weight.shape):
        raise UsageError(
            f"the adapter was made for another base model: {name} was {shape} and is {tuple(weight.shape)} here"
        )
    if weight.is_meta or len(saved) == dims:
        return
    then = torch.tensor(saved[dims:], dtype=torch.float64)
    now = torch.tensor(sketch(weight)[dims:], dtype=torch.float64)
    if (then - now).abs().max() > TOLERANCE * then.abs().max() + 1e-8:
        raise UsageError(f"the adapter was made for another base model: the values of {name} differ from those it met")
