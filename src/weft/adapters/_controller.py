"""What acts across the layers of an adapter or in time; `weft.steps` tells it of the optimiser's steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft import steps
from weft.adapters._delta import Delta, Group
from weft.errors import UsageError, WeftError


class Controller(steps.Controller):
    """Sees every delta of one adapter and is told of each optimiser step."""

    @property
    def deltas(self) -> list[Any]:
        """The adapter's parts."""
        return self.parts

    def penalty(self) -> Tensor | None:
        """The scalar added to the objective; by default the sum over deltas."""
        terms = [t for d in self.deltas if (t := d.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def penalised(self) -> bool:
        own = type(self).penalty is not Controller.penalty
        return own or type(self.deltas[0]).penalty is not Delta.penalty

    def check(self, optimizer: Optimizer) -> None:
        """Raise UsageError where the optimiser's groups are not those that the method declares."""
        if not self.config.require_groups:
            return
        declared: dict[int, tuple[str, Group]] = {
            id(p): (name, group)
            for d in self.deltas
            for name, group in d.groups(self.config).items()
            for n, p in d.named_parameters()
            if n == name
        }
        slug = self.config.slug()
        remedy = "use weft.optimizer_and_scheduler(model, args), or set require_groups=False"
        for group in optimizer.param_groups:
            asked = [declared.get(id(p), ("", Group())) for p in group["params"]]
            given = {**group, "lr": group.get("initial_lr", group["lr"])}  # a schedule has scaled lr already
            for name, wanted in asked:
                for key, value in wanted.settings().items():
                    if key in given and given[key] != value:
                        raise UsageError(
                            f"{slug} needs {name!r} in a group with {key}={value}, not {given[key]}: {remedy}"
                        )
            factors = {wanted.lr_factor: name for name, wanted in asked}
            if len(factors) > 1:
                name = next(name for factor, name in factors.items() if factor != 1.0)
                raise UsageError(f"{slug} needs {name!r} in a group of its own, with another learning rate: {remedy}")

    def checkpoint(self) -> dict[str, Tensor]:
        tensors = {}
        for i, d in enumerate(self.deltas):
            whole = d.state_dict()
            released, _ = d.compact(dict(whole))
            if any(released.get(k) is not v for k, v in whole.items()):  # the released adapter has lost capacity
                tensors.update({f"delta/{i}/{k}": v.detach().clone() for k, v in whole.items()})
        before = self.config.finished_tasks()
        tasks = {"tasks": torch.tensor(before)} if before else {}
        return {**super().checkpoint(), **tasks, **tensors}

    def restore(self, state: dict[str, Tensor]) -> None:
        then, now = int(state.get("tasks", 0)), self.config.finished_tasks()
        if then != now:
            raise WeftError(
                f"{self.config.slug()}: the state is that of an adapter before which {then} tasks were finished, and "
                f"before this one there were {now}: a task that has ended does not go on"
            )
        self.step = int(state["step"])  # which a delta may ask for when it is loaded
        for i, d in enumerate(self.deltas):
            own = {k.split("/", 2)[2]: v for k, v in state.items() if k.startswith(f"delta/{i}/")}
            if own:
                d.load_state_dict(own)
        super().restore({k: v for k, v in state.items() if k != "tasks" and not k.startswith("delta/")})
