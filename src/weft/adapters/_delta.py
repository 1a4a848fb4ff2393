"""One adapter on one weight: what a method says, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.adapters._kinds import Linear
from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.adapters._config import AdapterConfig
    from weft.adapters._controller import Controller


@dataclass(frozen=True)
class Site:
    """Where an adapter attaches: a weight seen as a matrix W (out × in)."""

    name: str  # the module's path in the model; blocks and experts add "#i"
    kind: Linear
    out: int
    in_: int
    weight: Callable[[], Tensor]  # the original W, out × in, at least float32
    device: torch.device
    stored: bool  # tensors come from a file: compute nothing from W
    rank: int | None  # rank recorded for this module when the adapter was saved
    unmerged: Callable[[], Tensor]  # the original W in its own dtype; for a delta to keep, as is the next
    bias: Callable[[], Tensor | None]  # the original bias

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor beside the weight."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def check_rank(self, r: int) -> int:
        """r, or UsageError where it exceeds a side of W."""
        if r > min(self.out, self.in_):
            raise UsageError(
                f"r={r} is larger than {self.name} allows: its weight is {self.out} × {self.in_}; "
                f"use r ≤ {min(self.out, self.in_)} or leave it out with exclude_modules"
            )
        return r


@dataclass(frozen=True)
class Group:
    """How one of a method's tensors wants to be optimised; None means as the run says."""

    lr: float | None = None
    lr_factor: float = 1.0
    weight_decay: float | None = None
    eps: float | None = None

    def settings(self) -> dict[str, float]:
        """The options of an optimiser's group that are asked for by value."""
        lr = None if self.lr is None else self.lr * self.lr_factor
        named = {"lr": lr, "weight_decay": self.weight_decay, "eps": self.eps}
        return {key: value for key, value in named.items() if value is not None}


class Delta(nn.Module):
    """ΔW (out × in), and Δbias where the method moves it, on one weight.

    A method defines `delta` and, where that is faster, `add` and `forward`. Tensors are float32 (never narrowed by a
    cast of the model): Parameters are trained, persistent buffers are frozen and saved, other buffers are neither.
    """

    def __init__(self, config: AdapterConfig, site: Site) -> None:
        super().__init__()
        self.config, self.name, self.kind = config, site.name, site.kind
        self.out, self.in_ = site.out, site.in_
        self.dropout: float = getattr(config, "dropout", 0.0)
        self.controller: Controller | None = None

    # --- what a method says -------------------------------------------------------------------------------------

    def delta(self) -> Tensor:
        """ΔW, out × in, float32 or wider: what merge and export use."""
        raise NotImplementedError(f"{type(self).__name__} must define delta()")

    def bias_delta(self) -> Tensor | None:
        """Δbias (out,), for methods that move it."""
        return None

    def penalty(self) -> Tensor | None:
        """A scalar whose gradient is added once per optimiser step, and never to the reported loss."""
        return None

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        """Tensors that need a parameter group of their own, by name."""
        return {}

    @classmethod
    def stage_steps(cls, config: Any) -> int | None:
        """Optimiser steps after which the learning-rate schedule starts anew; None: never."""
        return None

    @classmethod
    def finish(cls, config: Any, deltas: list[Any]) -> None:
        """Called once all deltas of an adapter exist: shared bases are made here."""

    def controller_class(self) -> type[Controller]:
        from weft.adapters._controller import Controller

        return Controller

    def count(self) -> int:
        """Trainable numbers, from the card's formula and not from the tensors."""
        raise NotImplementedError(f"{type(self).__name__} must define count()")

    def spare(self) -> int:
        """Those of `count` that only leave room for growth and are never all in use: a budget does not count them."""
        return 0

    def compact(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
        """The tensors to release, and the rank they have where it is not the config's r."""
        return tensors, None

    def expand(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released tensors, in the shapes that this delta allocated."""
        return tensors

    def legacy(self) -> dict[str, Tensor] | None:
        """At the end of a task, what stays beside the weight, for `inherit`; None: ΔW is merged into it."""
        return None

    def inherit(self, legacy: Mapping[str, Tensor]) -> None:
        """Carry on what the delta of the task before has left."""
        raise NotImplementedError(f"{type(self).__name__} leaves something and must define inherit()")

    def checksums(self) -> dict[str, str]:
        """By name, what a saved adapter must find again though it does not hold it; compared by the method."""
        return {}

    # --- what follows -------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x·ΔWᵀ (+ Δbias)."""
        m = self.delta()
        m = m.to(self._compute_dtype(x, m))
        bias = self.bias_delta()
        return self.kind.dense(self._drop(x), m, None if bias is None else bias.to(m.dtype))

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x·ΔWᵀ (+ Δbias), the form that the layer calls."""
        return y + self(x).to(y.dtype)

    folds_narrow = False  # whether `fold` never rounds W + ΔW, so that it serves narrow weights and autocast as well

    def folds(self, x: Tensor) -> bool:
        """Whether W + ΔW, multiplied once, costs less than a separate product; the layer asks where it may fold."""
        return False

    def fold(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """x·(W + ΔW)ᵀ + bias + Δbias, where `folds` said so; W is out × in."""
        shift = self.bias_delta()
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return self.kind.dense(x, w + self.delta().to(w.dtype), bias)

    wraps = False  # whether `wrap` serves a layer whose weight is not at hand (a quantised one) better than `add`

    def wrap(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapted layer's result, where the method acts on the layer's input."""
        raise NotImplementedError(f"{type(self).__name__} wraps and must define wrap()")

    def _drop(self, x: Tensor) -> Tensor:
        return self.kind.drop(x, self.dropout, self.training) if self.dropout else x

    @staticmethod
    def _compute_dtype(x: Tensor, own: Tensor) -> torch.dtype:
        return x.dtype if x.is_floating_point() else own.dtype  # indices carry no precision

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Delta:
        def widen(t: Tensor) -> Tensor:
            moved = fn(t)
            narrower = moved.is_floating_point() and moved.element_size() < t.element_size()
            return t.to(moved.device) if narrower else moved

        return super()._apply(widen, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.controller is not None:
            self.controller.forget(self)


class LowRankDelta(Delta):
    """ΔW = B·A with thin factors; a method defines `factors`."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out × r) and A (r × in), with every scale and gate folded in; exported as they are."""
        raise NotImplementedError(f"{type(self).__name__} must define factors()")

    def delta(self) -> Tensor:
        b, a = self.factors()
        return b @ a

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of rank ≤ `rank`: the best approximation of B·A, found through the thin factors alone."""
        b, a = self.factors()
        if b.shape[1] <= rank:
            return b, a
        qb, rb = torch.linalg.qr(b)
        qa, ra = torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT)
        return qb @ (u[:, :rank] * s[:rank]), vh[:rank] @ qa.mT

    def up(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        """h·Bᵀ, added onto the layer's result where that is given; the place to bend a gradient."""
        return self.kind.up(h, b, onto)

    def forward(self, x: Tensor) -> Tensor:
        b, a = self.factors()
        if b.shape[1] == 0:
            return self.kind.dense(x, b @ a).to(self._compute_dtype(x, a))
        dtype = self._compute_dtype(x, a)
        h = self.kind.down(self._drop(x), a.to(dtype))
        return self.up(h, b.to(dtype))

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        b, a = self.factors()
        if b.shape[1] == 0:
            return y
        dtype = self._compute_dtype(x, a)
        h = self.kind.down(self._drop(x), a.to(dtype))
        if h.dtype != y.dtype:
            return y + self.up(h, b.to(dtype)).to(y.dtype)
        return self.up(h, b.to(dtype), onto=y)


class Several(nn.ModuleList):
    """The deltas of one weight that is several matrices: blocks of a fused projection, or experts."""

    @property
    def leaves(self) -> list[Delta]:
        return list(self)  # type: ignore[arg-type]


class Blocks(Several):
    """Query, key and value of a fused projection: one delta each, stacked along the rows."""

    def delta(self) -> Tensor:
        return torch.cat([d.delta() for d in self.leaves])

    def bias_delta(self) -> Tensor | None:
        parts = [d.bias_delta() for d in self.leaves]
        return None if all(p is None for p in parts) else torch.cat([p for p in parts if p is not None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([d(x) for d in self.leaves], dim=self.leaves[0].kind.channel_dim)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self(x).to(y.dtype)

    wraps = False  # each block would turn the input in its own way, and the layer is asked once

    @property
    def folds_narrow(self) -> bool:
        return all(d.folds_narrow for d in self.leaves)

    def folds(self, x: Tensor) -> bool:
        return all(d.folds(x) for d in self.leaves)

    def fold(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        sizes = [d.out for d in self.leaves]
        biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
        parts = [d.fold(x, rows, b) for d, rows, b in zip(self.leaves, w.split(sizes), biases)]
        return torch.cat(parts, dim=self.leaves[0].kind.channel_dim)


class Experts(Several):
    """One delta an expert; ΔE is experts × out × in."""

    def delta(self) -> Tensor:
        return torch.stack([d.delta() for d in self.leaves])

    def bias_delta(self) -> None:
        return None


def leaves(module: nn.Module) -> list[Delta]:
    """The deltas behind one entry of a layer."""
    return module.leaves if isinstance(module, Several) else [module]  # type: ignore[list-item]


def named_leaves(module: nn.Module) -> Mapping[str, Delta]:
    """As `leaves`, by the prefix that their tensors have in a state dict ("" or "0.", "1.", …)."""
    if isinstance(module, Several):
        return {f"{i}.": d for i, d in enumerate(module.leaves)}
    return {"": module}  # type: ignore[dict-item]
