"""What every optimiser here does besides its rule.

A step with a gradient that is not finite is not taken, for any parameter; state keeps its dtypes through saving and
loading; a key that a parameter group cannot have is refused; parameters have names, so that randomness can be a
function of (name, step).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.errors import UsageError, nearest

Group = dict[str, Any]
State = dict[str, Any]


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose subclass says how one group is updated.

    Attributes:
        skipped: steps that were not taken because a gradient was not finite.
        freezes: whether parameters go without a gradient at times, of which DistributedDataParallel must be told.
    """

    freezes = False

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        """
        Args:
            params: parameters, (name, parameter) pairs or groups of either, as every torch optimiser takes them.
            defaults: every key that a group can have, with its default; `None` where a group without it goes without.

        Raises UsageError for values that cannot work.
        """
        self.skipped = 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters. Raises UsageError for a key that it cannot have and values that cannot work."""
        for key in param_group:
            if key not in self.defaults and key not in ("params", "param_names", "initial_lr"):
                raise UsageError(
                    f"{type(self).__name__}: unknown key {key!r} in a parameter group: {nearest(key, self.defaults)}"
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_common(group)
            self.check(group)
        except UsageError:
            self.param_groups.pop()
            raise

    def _check_common(self, group: Group) -> None:
        name = type(self).__name__
        for key in ("lr", "weight_decay", "eps"):
            value = group.get(key)
            if value is not None and not 0 <= float(value) < math.inf:
                raise UsageError(f"{name}: {key}={value!r} must not be below 0")
        if not all(0 <= beta < 1 for beta in group.get("betas", ())):
            raise UsageError(f"{name}: betas={group['betas']!r} must be at least 0 and below 1")

    def check(self, group: Group) -> None:
        """Refuse values of a group that cannot work with its parameters; a subclass extends it."""

    def update(self, group: Group, parameters: list[tuple[str, Tensor]]) -> None:
        """Move these parameters of a group, which all have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, or none where a gradient is not finite; what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = self._gradients()
        if found and self.finite(found):
            self.take()
        return loss

    def take(self) -> None:
        """Take the step of all groups, whose gradients are finite."""
        for place, group in enumerate(self.param_groups):
            parameters = [(name, p) for name, p in named(group, place) if p.grad is not None]
            if parameters:
                self.update(group, parameters)

    def _gradients(self) -> list[tuple[str, Tensor]]:
        groups = enumerate(self.param_groups)
        return [(name, p.grad) for place, group in groups for name, p in named(group, place) if p.grad is not None]

    def finite(self, found: list[tuple[str, Tensor]]) -> bool:
        """Whether all of these gradients are; if not, that is counted and the first odd one is named in a warning."""
        grads = [grad for _, grad in found]
        if all(grad.device.type == "cpu" and not isinstance(grad, DTensor) for grad in grads):
            total = sum(grad.sum() for grad in grads)  # where the one kernel for all norms is none: half of its time
        else:
            total = whole(torch.nn.utils.get_total_norm(grads))
        if math.isfinite(total):
            return True
        odd = [name for name, grad in found if not bool(torch.isfinite(whole(grad)).all())]
        if not odd:  # sums and squares of finite numbers may be too large
            return True
        self.skipped += 1
        warnings.warn(
            f"the gradient of {odd[0]} is not finite: this step is skipped, the {_ordinal(self.skipped)} so far",
            stacklevel=2,
        )
        return False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype that it was saved in: float32 moments and indices on bfloat16."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, place in zip(group["params"], saved["params"]):
                for key, value in state_dict["state"].get(place, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][key] = value.detach().clone().to(p.device)


def named(group: Group, place: int) -> Iterator[tuple[str, Tensor]]:
    """A group's parameters with their names; one that was given without is called by its place."""
    names = group.get("param_names") or [f"{place}.{i}" for i in range(len(group["params"]))]
    return zip(names, group["params"])


def whole(t: Tensor) -> Tensor:
    """The tensor that a DTensor is a part of, on every process; any other as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _ordinal(n: int) -> str:
    """
    >>> _ordinal(1), _ordinal(12), _ordinal(23)
    ('1st', '12th', '23rd')
    """
    return f"{n}{'th' if n // 10 % 10 == 1 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
