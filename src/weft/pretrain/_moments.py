"""What an optimiser holds for the entries of a parameter, for methods that take other entries in their place."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from weft.errors import UsageError


def moments_of(optimizer: Optimizer | None, p: Tensor, method: str, otherwise: str = "") -> list[Tensor]:
    """What the optimiser holds for every entry of p; a change in place is a change of its state.

    Args:
        optimizer: None is one from outside torch, which nobody can look into.
        method, otherwise: who asks, and what else the user could do, say ", or set reset_share=0".

    Raises UsageError where it holds anything else but numbers, one for each entry.
    """
    if optimizer is None:
        raise UsageError(f"{method} resets moments of torch.optim.Optimizers alone: use one{otherwise}")
    held = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor) and v.dim() > 0}
    for name, value in held.items():
        if value.shape != p.shape or not value.is_floating_point():
            raise UsageError(
                f"{method} cannot reset {name} of {type(optimizer).__name__}: use AdamW or another optimiser whose "
                f"moments have the parameter's shape{otherwise}"
            )
    return list(held.values())


def restart(optimizer: Optimizer | None, p: Tensor, method: str) -> None:
    """Set p's moments to 0, and the count of its steps, so that AdamW goes on as if p had never moved.

    Raises as `moments_of`.
    """
    for moment in moments_of(optimizer, p, method):
        moment.zero_()
    state = optimizer.state.get(p, {}) if optimizer is not None else {}
    if "step" in state:
        state["step"] = state["step"] * 0  # a number, or a tensor without dimensions
