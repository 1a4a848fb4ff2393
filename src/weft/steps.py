"""What acts across layers or in time, and how it learns that a step was taken.

Events come from torch's public optimiser-step hooks, so that any training loop drives them. A controller hangs on its
layers. Penalties enter through gradient hooks on the parameters: once per optimiser step, before clipping, whatever the
accumulation or the loss function.

What it acts on are its parts: modules, each with a `name` that no other part has, whose parameters are the method's.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weft.errors import UsageError, WeftError

_live: weakref.WeakSet[Controller] = weakref.WeakSet()


class Controller:
    """Sees every part of one method on one model and is told of each optimiser step.

    A method overrides `before_step` (gradients are final and clipped), `after_step` (parameters have moved),
    `update_scales`, and `state` / `load_state` for what a resumed run needs. `events = True` makes a missed step an
    error. `step` counts the optimiser steps taken; randomness is a function of (seed, step, module) and drawn in
    `begin`, which runs at the start of every step.
    """

    events: ClassVar[bool] = False
    total_steps: int | None = None  # of the run, where weft.optimizer_and_scheduler was told

    def __init__(self, config: Any, parts: list[Any]) -> None:
        self.config, self.parts = config, parts
        self.step = 0
        self.last_penalty: Tensor | None = None
        self._reset_runtime()
        _live.add(self)
        _install()
        self.begin()
        self._hook_penalties()

    def _reset_runtime(self) -> None:
        self._versions: dict[str, int] = {}  # parameter versions seen by the last training forward
        self._settled: int | None = None  # sum of versions at the last event
        self._held: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []
        self._hooked: dict[tuple[int, str], weakref.ref[Tensor]] = {}
        self._added: dict[tuple[int, str], int] = {}  # step in which a parameter received its penalty gradient
        self._penalty_cache: tuple[int, dict[tuple[int, str], Tensor]] | None = None
        self._differentiating = False
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    # --- for methods --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """At the start of every step, the first included."""

    def before_step(self) -> None:
        """Gradients are final (summed, clipped); the optimiser has not moved yet."""

    def after_step(self) -> None:
        """The optimiser has moved the parameters; `step` still counts the steps before this one."""

    def update_scales(self) -> dict[Tensor, Tensor]:
        """Factors on this step's update, by parameter, each broadcastable to it; where 0 the optimiser's state keeps
        still as well, as if the entry had no gradient, decay or momentum."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond the tensors of the parts."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""

    def penalty(self) -> Tensor | None:
        """The scalar added to the objective."""
        return None

    def penalised(self) -> bool:
        """Whether `penalty` can be other than None."""
        return type(self).penalty is not Controller.penalty

    def check(self, optimizer: Optimizer) -> None:
        """Raise where this optimiser cannot serve; called before its first step."""

    # --- events -------------------------------------------------------------------------------------------------

    def lead(self) -> Tensor | None:
        """The parameter whose optimiser speaks for all."""
        return next((p for part in self.parts for p in part.parameters()), None)

    def started(self, optimizer: Optimizer) -> None:
        if self.events and self.step == 0:
            lead = self.lead()
            taken = optimizer.state.get(lead, {}).get("step", 0) if lead is not None else 0
            if taken > 0:
                raise WeftError(
                    f"{self.config.slug()}: the optimiser was restored at step {int(taken)} but the method's own state "
                    "was not; build it with weft.optimizer_and_scheduler(model, args) before loading"
                )
        self._meet(optimizer)
        with torch.no_grad():
            self.before_step()
            self._held = []
            for p, scale in self.update_scales().items():
                kept = {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if _shaped_like(v, p)}
                self._held.append((p, scale, p.detach().clone(), kept))

    def finished(self, optimizer: Optimizer | None) -> None:
        with torch.no_grad():
            for p, scale, before, kept in self._held:
                moved = torch.where(scale == 1, p, before + scale * (p - before))
                p.copy_(torch.where(scale == 0, before, moved))
                state = optimizer.state.get(p, {}) if optimizer is not None else {}
                for key, value in state.items():
                    if _shaped_like(value, p):
                        old = kept.get(key, torch.zeros_like(value))
                        value.copy_(torch.where(scale == 0, old, value))
            self._held = []
            self.after_step()
            self.step += 1
            self.begin()
        self._versions.clear()
        self._settled = self._version()
        self._hook_penalties()

    def external_step(self) -> None:
        """The event for optimisers without torch's hooks; a no-op where a hook has spoken already."""
        if self._settled is not None and self._settled == self._version():
            return
        with torch.no_grad():
            self.before_step()
        self.finished(None)

    def _version(self) -> int:
        return sum(p._version for part in self.parts for p in part.parameters())

    def _meet(self, optimizer: Optimizer) -> None:
        if optimizer in self._checked:
            return
        adopt_state(optimizer)
        self.check(optimizer)
        self._checked.add(optimizer)

    def watch(self, part: Any) -> None:
        """Called by every eager training forward: a parameter that moved without an event is an error."""
        if not self._hooked:  # a copied or unpickled model
            self._hook_penalties()
        if not self.events:
            return
        version = sum(p._version for p in part.parameters())
        seen = self._versions.setdefault(part.name, version)
        if seen != version:
            raise WeftError(
                f"{self.config.slug()}: parameters of {part.name} changed but no optimiser step was seen; "
                "call weft.step(model) after the step of an optimiser that is not a torch.optim.Optimizer"
            )

    def forget(self, part: Any) -> None:
        """The part's tensors were loaded: start watching anew."""
        self._versions.pop(part.name, None)

    # --- penalties ----------------------------------------------------------------------------------------------

    def _named(self) -> dict[tuple[int, str], Tensor]:
        return {(i, name): p for i, part in enumerate(self.parts) for name, p in part.named_parameters()}

    def _penalty_gradients(self) -> dict[tuple[int, str], Tensor]:
        if self._penalty_cache is not None and self._penalty_cache[0] == self.step:
            return self._penalty_cache[1]
        gradients: dict[tuple[int, str], Tensor] = {}
        self._differentiating = True  # the hooks see the gradients below too, and must not add to them
        with torch.enable_grad():
            value = self.penalty()
            if value is not None and value.requires_grad:
                named = {key: p for key, p in self._named().items() if p.requires_grad}
                found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                gradients.update({key: g for key, g in zip(named, found) if g is not None})
        self._differentiating = False
        self.last_penalty = None if value is None else value.detach()
        self._penalty_cache = (self.step, gradients)
        return gradients

    def _hook_penalties(self) -> None:
        if not self.penalised():
            return
        for key, p in self._named().items():
            ref = self._hooked.get(key)
            if p.requires_grad and (ref is None or ref() is not p):
                p.register_hook(functools.partial(self._add_penalty, key))
                self._hooked[key] = weakref.ref(p)

    def _add_penalty(self, key: tuple[int, str], grad: Tensor) -> Tensor | None:
        if self._differentiating:
            return None
        ref = self._hooked.get(key)
        p = ref() if ref is not None else None
        if p is None or (p.grad is not None and self._added.get(key) == self.step):
            return None  # a later micro-batch of the same step
        if torch.is_autocast_enabled(grad.device.type) and torch.get_autocast_dtype(grad.device.type) == torch.float16:
            raise UsageError(f"{self.config.slug()} adds a penalty, which fp16 loss scaling would distort: use bf16")
        self._added[key] = self.step
        extra = self._penalty_gradients().get(key)
        return None if extra is None else grad + extra.to(grad.dtype)

    # --- copies and checkpoints ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        runtime = (
            "_versions",
            "_settled",
            "_held",
            "_hooked",
            "_added",
            "_penalty_cache",
            "_checked",
            "_differentiating",
        )
        return {k: v for k, v in self.__dict__.items() if k not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()
        _live.add(self)
        _install()

    def key(self) -> str:
        """The controller's name in a checkpoint."""
        return f"{self.config.slug()}/{self.parts[0].name}"

    def checkpoint(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step), **self.state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        self.load_state({k: v for k, v in state.items() if k != "step"})
        self._versions.clear()
        self._penalty_cache = None
        with torch.no_grad():
            self.begin()


def _shaped_like(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 0


def controllers(model: nn.Module) -> Iterator[Controller]:
    """Every controller of the model, once: a layer has them by name in `controllers`."""
    seen: set[int] = set()
    for module in model.modules():
        hanging = getattr(module, "controllers", None)
        for controller in hanging.values() if isinstance(hanging, dict) else ():
            if isinstance(controller, Controller) and id(controller) not in seen:
                seen.add(id(controller))
                yield controller


def step(model: nn.Module) -> None:
    """Tell the model's methods that an optimiser step was taken, for optimisers outside `torch.optim.Optimizer`.

    Call it after the step and before gradients are cleared. Where torch's own hooks have spoken it does nothing. What a
    method scales or holds back of a step (`Controller.update_scales`) takes those hooks: here the step stays as it is.
    """
    for controller in controllers(model):
        controller.external_step()


def controllers_of(optimizer: Optimizer) -> list[Controller]:
    """The controllers whose parameters this optimiser moves."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [c for c in list(_live) if (lead := c.lead()) is not None and id(lead) in owned]


def adopt_state(optimizer: Optimizer) -> None:
    """Let the controllers' state travel in the optimiser's own state dict: tensors only, under the key "weft"."""
    if getattr(optimizer, "_weft_adopted", False):
        return
    optimizer._weft_adopted = True  # type: ignore[attr-defined]

    def save(opt: Optimizer, state: dict[str, Any]) -> None:
        state["weft"] = {c.key(): c.checkpoint() for c in controllers_of(opt)}

    def load(opt: Optimizer, state: dict[str, Any]) -> None:
        saved = state.get("weft", {})
        for c in controllers_of(opt):
            if c.key() in saved:
                c.restore(saved[c.key()])

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def retire(parameters: Iterable[Tensor]) -> None:
    """Make it an error to step these again: they are part of no model any more, so that nothing would be trained."""
    for p in parameters:
        p._weft_retired = True  # type: ignore[attr-defined]
    _install()


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if any(hasattr(p, "_weft_retired") for group in optimizer.param_groups for p in group["params"]):
        raise WeftError(
            "the optimiser holds the adapter of a finished task, so that this step would train nothing: build one for "
            "the model that weft.next_task returned"
        )
    for c in controllers_of(optimizer) if _live else ():
        c.started(optimizer)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for c in controllers_of(optimizer) if _live else ():
        c.finished(optimizer)


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)
