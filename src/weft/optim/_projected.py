"""The projected engine: a projector × an inner rule × when to refit.

    every `update_proj_gap` steps    P ← fit(G)
    every step                       R = down(G);   N ← rule(R);   W ← (1 − lr·λ)·(W − number·scale·up(N))

A method says which projector a parameter gets. Parameters of groups without a `rank` take the same rule on G itself.
The lift is one in-place matrix product into W, decay included: no second full-size tensor exists.

Under FSDP2 a parameter is a row-sharded DTensor. G is gathered where P is fitted; otherwise what has W's rows stays
with its rows, and what lost them is summed over the processes and sharded by columns, so moments are sharded too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.errors import UsageError
from weft.optim._optimizer import Group, Optimizer, State, named, whole
from weft.optim._rules import AdamW8bit, Number, Rule, rule


class Projector(Protocol):
    """How one gradient is made small and an update large again. It keeps nothing: its tensors lie in the state."""

    def fit(self, state: State, g: Tensor, like: Tensor, key: tuple[object, ...]) -> None:
        """Choose the subspace by the whole gradient g (out × in).

        Args:
            like: the gradient as this process holds it, which says where the subspace's tensors go.
            key: names this fit for what is drawn.
        """

    def down(self, state: State, g: Tensor) -> Tensor:
        """R, the small gradient."""

    def lift_(self, state: State, w: Tensor, n: Tensor, alpha: Number, beta: Number) -> None:
        """w ← beta·w + alpha·up(n), in place."""


class Whole:
    """No projection: R is G."""

    def fit(self, state: State, g: Tensor, like: Tensor, key: tuple[object, ...]) -> None:
        pass

    def down(self, state: State, g: Tensor) -> Tensor:
        return g

    def lift_(self, state: State, w: Tensor, n: Tensor, alpha: Number, beta: Number) -> None:
        if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
            w.copy_(w * beta + n * alpha)
            return
        if beta != 1:
            w.mul_(beta)
        w.add_(n.to(w.dtype), alpha=alpha)


WHOLE = Whole()


class Projected(Optimizer):
    """An optimiser whose groups with a `rank` keep their moments in a subspace of the gradient.

    Groups take `rank`, `update_proj_gap` (steps between fits), `scale` (of the lifted update) and what the method adds.

    Attributes:
        decay_first: weights decay before the update, not after it, which would decay the update too.
    """

    decay_first = False

    def __init__(
        self,
        params: Iterable[Any],
        defaults: Group,
        *,
        inner: str = "adamw",
        stagger: bool = False,
        compile: bool = False,
    ) -> None:
        """
        Args:
            inner: the rule in the subspace, a name of `_rules.RULES`.
            stagger: fit the parameters' subspaces in turn over the gap, not all in one step (the first fits are).
            compile: compile a parameter's step, one graph a shape.
        """
        self.rule = rule(inner)
        self.stagger = stagger
        self._compiled = compile
        self._move: Callable[..., None] = torch.compile(_move, dynamic=False) if compile else _move
        super().__init__(params, {"rank": None, "update_proj_gap": 200, "scale": 1.0, **defaults})

    def check(self, group: Group) -> None:
        rank, gap, name = group["rank"], group["update_proj_gap"], type(self).__name__
        if not isinstance(gap, int) or gap < 1:
            raise UsageError(f"{name}: update_proj_gap={gap!r} must be a whole number of steps, at least 1")
        if isinstance(self.rule, AdamW8bit) and any(isinstance(p, DTensor) for p in group["params"]):
            raise UsageError(
                f"{name}: the moments of inner='adamw8bit' cannot be sharded as a DTensor is, but those of 'adamw' and "
                "'adafactor' can"
            )
        if rank is None:
            return
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UsageError(f"{name}: rank={rank!r} must be a whole number of at least 1")
        for p in group["params"]:
            if p.dim() != 2:
                raise UsageError(f"{name}: a parameter of shape {tuple(p.shape)} is no matrix, so it has no rank")
            if rank > min(p.shape):
                raise UsageError(
                    f"{name}: rank={rank} is above the shorter side of a {p.shape[0]} × {p.shape[1]} matrix; "
                    "weft.optim.param_groups leaves such matrices as they are"
                )

    def projector(self, group: Group, p: Tensor) -> Projector:
        """The projector of a parameter of this group, which has a rank."""
        raise NotImplementedError

    def rule_of(self, group: Group) -> Rule:
        """The rule that the parameters of this group take."""
        return self.rule

    def wants_whole(self, group: Group) -> bool:
        """Whether every step of this group needs the whole gradient, not only those that begin with a fit."""
        return group["rank"] is None

    def update(self, group: Group, parameters: list[tuple[str, Tensor]]) -> None:
        for name, p in parameters:
            assert p.grad is not None
            self.move(group, name, p, p.grad)

    def move(self, group: Group, name: str, p: Tensor, g: Tensor) -> None:
        """Take one parameter's step along its gradient g."""
        state = self.state[p]
        projector = self.projector(group, p) if group["rank"] is not None else WHOLE
        due = fit_is_due(state)
        state.setdefault("step", 0)
        if due:
            self.fit(projector, group, state, g, name)
        self.follow(projector, group, state, p, projector.down(state, g))

    def fit(self, projector: Projector, group: Group, state: State, g: Tensor, name: str) -> None:
        """Choose a new subspace, and the step of the next choice."""
        projector.fit(state, whole(g), g, (name, state["step"]))
        gap = group["update_proj_gap"]
        first = self._phase(name, gap) if self.stagger and not state["step"] else gap
        state["next_fit"] = state["step"] + first

    def _phase(self, name: str, gap: int) -> int:
        """The step of a parameter's second fit, 1 … gap, spread evenly over all parameters."""
        names = [each for place, group in enumerate(self.param_groups) for each, _ in named(group, place)]
        return 1 + names.index(name) * gap // len(names)

    def follow(self, projector: Projector, group: Group, state: State, p: Tensor, r: Tensor) -> None:
        """Take the step along the small gradient r."""
        r, inner = r.to(torch.promote_types(r.dtype, torch.float32)), self.rule_of(group)
        if not state["step"]:
            state.update(inner.start(r, group))
        state["step"] += 1
        scale = group["scale"] if group["rank"] is not None else 1.0
        beta = 1 - group["lr"] * group["weight_decay"]
        scale = scale if self.decay_first else scale * beta
        numbers: tuple[Number, ...] = (*inner.numbers(group, state["step"]), scale, beta)
        if self._compiled:  # a graph is made anew for every number that it depends on
            numbers = tuple(torch.tensor(number, dtype=torch.float32) for number in numbers)
            state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            group = {key: group[key] for key in ("betas", "eps") if key in group}
        self._move(inner, projector, state, p, r, group, numbers)


def fit_is_due(state: State) -> bool:
    """Whether the step that follows begins with a fit: the first one does."""
    return not state or state["step"] >= state["next_fit"]


def _move(
    inner: Rule, projector: Projector, state: State, w: Tensor, r: Tensor, constants: Group, numbers: tuple[Number, ...]
) -> None:
    """W ← β·W − number·scale·up(N), N the direction that the rule makes of r."""
    *own, scale, beta = numbers
    n, number = inner.direction(state, r, constants, own)
    projector.lift_(state, w, n, -number * scale, beta)


def update_in_backward(optimizer: Projected, *, accumulation: int = 1) -> list[Any]:
    """Let each parameter take its step as soon as its gradient is there, and free the gradient: one exists at a time.

    Args:
        accumulation: micro-batches a step; losses must be scaled for it, as always. Between fits only the small
            gradient is summed; a full-size one lives on through the micro-batches of a step that begins with a fit
            (`stagger` spreads those).

    The optimiser is the same object for schedulers and checkpoints, and its `step()` moves nothing more. What looks
    at all gradients at once cannot work: clipping by their norm, and a GradScaler. A parameter whose gradient is not
    finite is passed over alone. Returns handles whose `remove()` ends it. Raises UsageError in several processes, whose
    gradients are not summed yet when the hooks see them.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError("update_in_backward sees one process's gradients only: with several processes use step()")
    if not isinstance(accumulation, int) or accumulation < 1:
        raise UsageError(f"accumulation={accumulation!r} must be a whole number of at least 1")
    handles = []
    for place, group in enumerate(optimizer.param_groups):
        for name, p in named(group, place):
            if not p.is_floating_point():
                continue
            trained = p.requires_grad
            p.requires_grad_(True)  # what rests now may be trained later, and takes no hook while it rests
            hook = _Backward(optimizer, place, name, accumulation)
            handles.append(p.register_post_accumulate_grad_hook(hook))  # type: ignore[attr-defined]
            p.requires_grad_(trained)
    return handles


class _Backward:
    """What happens when one parameter's gradient is there."""

    def __init__(self, optimizer: Projected, place: int, name: str, accumulation: int) -> None:
        self.optimizer, self.place, self.name, self.accumulation = optimizer, place, name, accumulation
        self.seen = 0  # micro-batches of this step
        self.small: Tensor | None = None  # and the sum of their small gradients

    @torch.no_grad()
    def __call__(self, p: Tensor) -> None:
        optimizer, group = self.optimizer, self.optimizer.param_groups[self.place]
        state = optimizer.state[p]
        assert p.grad is not None
        self.seen += 1
        last = self.seen == self.accumulation
        if last:
            self.seen = 0
        if optimizer.wants_whole(group) or fit_is_due(state) or self.accumulation == 1:
            if last and optimizer.finite([(self.name, p.grad)]):
                optimizer.move(group, self.name, p, p.grad)
            if last:
                p.grad = None
            return
        projector = optimizer.projector(group, p)
        r = projector.down(state, p.grad)
        r = r if self.small is None else self.small + r
        p.grad = None
        if last and optimizer.finite([(self.name, r)]):
            optimizer.follow(projector, group, state, p, r)
        self.small = None if last else r
