"""ALLoRA: LoRA without dropout or scale, whose steps are larger where the update is still small.

Hai Huang and Randall Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024, arXiv 2410.09692.

    y = x·Wᵀ + (x·Aᵀ)·Bᵀ                                    A: r × in,  B: out × r
    c(v) = 1 / √(‖v‖₂ + 1/η²) = η / √(1 + η²·‖v‖₂)           no gradient flows through c

A is Kaiming-uniform, B zero, so ΔW = 0 and every c = η at the start. The forward pass is LoRA's with scale 1, bit for
bit; only what is learnt from it changes. c follows the weights: it is computed once per optimiser step, in float32.

norm="delta_row" (the default; which norm the paper means could not be confirmed): c_i from row i of ΔW = B·A, one per
    output unit. For a gradient G (tokens × out) of the layer's result
        ∂B = diag(c)·Gᵀ·(x·Aᵀ)      ∂A = (G·diag(c)·B)ᵀ·x      ∂x = G·diag(c)·B·A
    The adapter's share of ∂x is scaled too, the base's is not. c is folded into the thin factors (G·(c∘B)), never
    multiplied into G; only convolutions pass over their result. For experts, which compute with W + ΔW, it scales ∂ΔW:
    the same ∂A and ∂B, while ∂x stays as it is. The norms come from the Gram matrix: ‖ΔW_i‖² = B_i·(A·Aᵀ)·B_iᵀ.
norm="param_row" (what public optimisers do): rows of ∂A and of ∂B, each by c of the row itself; ∂x stays as it is.
apply_to="update": gradients are LoRA's, and the optimiser's finished step is multiplied by c, weight decay included:
    rows of B (delta_row), or rows of A and B (param_row). Adam divides a slowly varying factor out of a gradient again:
    with Adam, "grad" leaves B's steps nearly as they were, and only "update" is a learning rate that adapts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Delta, LowRankDelta, Site
from weft.adapters._kinds import Conv, Linear
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    arxiv="2410.09692",
    year=2024,
    summary="LoRA without dropout or scale, whose steps are larger where the update is still small",
    recipe={
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
    },
    limitations=(
        "Made for short runs. Adam divides the scaling of gradients out again: with it only apply_to=update has the "
        "effect. Clipping by the global norm undoes the amplification, so the recipe does not clip."
    ),
)


@dataclass
class AlloraConfig(AdapterConfig):
    """Options of ALLoRA."""

    r: int = field(default=8, metadata={"help": "rank"})
    eta: float = field(default=2.0, metadata={"help": "η, the amplification where the norm is zero"})
    norm: Literal["delta_row", "param_row"] = field(
        default="delta_row", metadata={"help": "norm of rows of ΔW (delta_row) or of the factors (param_row)"}
    )
    apply_to: Literal["grad", "update"] = field(
        default="grad", metadata={"help": "scale gradients (grad) or the optimiser's step (update)"}
    )

    def validate(self) -> None:
        super().validate()
        if not (self.eta > 0 and math.isfinite(self.eta)):
            raise UsageError(f"eta={self.eta} must be above 0: it is the amplification where the norm is zero")
        if self.norm not in ("delta_row", "param_row"):
            raise UsageError(f"norm={self.norm!r}: use delta_row or param_row")
        if self.apply_to not in ("grad", "update"):
            raise UsageError(f"apply_to={self.apply_to!r}: use grad or update")


def amplification(norm: Tensor, eta: float) -> Tensor:
    """c = 1 / √(norm + 1/η²), exactly η at 0.

    >>> amplification(torch.tensor([0.0, 0.25, 4.0]), 2.0)
    tensor([2.0000, 1.4142, 0.4851])
    """
    return eta / torch.sqrt(1 + eta**2 * norm)


def product_row_norms(b: Tensor, a: Tensor) -> Tensor:
    """‖(B·A)_i‖₂ of every row (out,), with r²·(in + out) multiplications."""
    return ((b @ (a @ a.mT)) * b).sum(1).clamp(min=0).sqrt()


class ScaledUp(torch.autograd.Function):
    """h·Bᵀ (+ onto); its backward pass multiplies the gradient's columns by c (out,), within thin products."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, b: Tensor, c: Tensor, onto: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, b, c)
        ctx.adds = onto is not None
        return Linear().up(h, b, onto)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        h, b, c = ctx.saved_tensors
        rows = c[:, None]
        gh = g @ (rows * b).to(g.dtype)
        gb = rows * (g.reshape(-1, g.shape[-1]).mT @ h.reshape(-1, h.shape[-1]))
        return gh, gb.to(b.dtype), None, g if ctx.adds else None


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by c (broadcastable)."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (c,) = ctx.saved_tensors
        return g * c.to(g.dtype), None


class AlloraDelta(LowRankDelta):
    """ΔW = B·A."""

    c_A: Tensor
    c_B: Tensor

    def __init__(self, config: AlloraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r = site.check_rank(config.r)
        self.eta, self.norm = config.eta, config.norm
        self.scales_gradients = config.apply_to == "grad"
        self.A = torch.nn.Parameter(site.empty(self.r, site.in_))
        self.B = torch.nn.Parameter(torch.zeros_like(site.empty(site.out, self.r)))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.register_buffer("c_A", torch.ones_like(site.empty(self.r)), persistent=False)
        self.register_buffer("c_B", torch.full_like(site.empty(site.out), self.eta), persistent=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """c of the weights as they are; on a model without weights there is nothing to read."""
        if self.A.is_meta:
            return
        if self.norm == "delta_row":
            self.c_B.copy_(amplification(product_row_norms(self.B, self.A), self.eta))
        else:
            self.c_A.copy_(amplification(self.A.norm(dim=1), self.eta))
            self.c_B.copy_(amplification(self.B.norm(dim=1), self.eta))

    def _bends(self, norm: str) -> bool:
        return self.scales_gradients and self.norm == norm and torch.is_grad_enabled()

    def factors(self) -> tuple[Tensor, Tensor]:
        if self._bends("param_row"):
            return ScaledGradient.apply(self.B, self.c_B[:, None]), ScaledGradient.apply(self.A, self.c_A[:, None])
        return self.B, self.A

    def delta(self) -> Tensor:
        b, a = self.factors()
        return ScaledUp.apply(a.mT, b, self.c_B, None).mT if self._bends("delta_row") else b @ a

    def up(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        if not self._bends("delta_row"):
            return self.kind.up(h, b, onto)
        if isinstance(self.kind, Conv):
            channels = self.c_B.view(-1, *[1] * len(self.kind.kernel))
            y = ScaledGradient.apply(self.kind.up(h, b), channels)
            return y if onto is None else onto + y
        return ScaledUp.apply(h, b.to(h.dtype), self.c_B, onto)

    def count(self) -> int:
        return self.r * (self.in_ + self.out)

    def controller_class(self) -> type[Controller]:
        return AlloraController


class AlloraController(Controller):
    """Recomputes c once per optimiser step."""

    events = True

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        self._met: dict[str, int] = {}  # parameter versions that c was computed from

    def begin(self) -> None:
        if self.config.apply_to == "grad":
            for d in self.deltas:
                self._refresh(d)

    def _refresh(self, delta: AlloraDelta) -> None:
        delta.refresh()
        self._met[delta.name] = _version(delta)

    def watch(self, delta: Delta) -> None:
        first = delta.name not in self._versions
        super().watch(delta)
        if first and self._met.get(delta.name) != _version(delta):  # changed since, by other means than a step
            self.forget(delta)

    def forget(self, delta: Any) -> None:
        super().forget(delta)
        if self.config.apply_to == "grad":
            self._refresh(delta)

    def update_scales(self) -> dict[Tensor, Tensor]:
        if self.config.apply_to == "grad":
            return {}
        scales = {}
        for d in self.deltas:
            d.refresh()
            scales[d.B] = d.c_B[:, None]
            if d.norm == "param_row":
                scales[d.A] = d.c_A[:, None]
        return scales


def _version(delta: Delta) -> int:
    return sum(p._version for p in delta.parameters())
