"""LoCA: a few coefficients of ΔW's cosine spectrum, whose places in the spectrum are learned as well.

Zhekai Du et al., "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", ICLR 2025, arXiv
2502.06820.

    ΔW = α·C_outᵀ·F·C_in        F: out × in, zero but for F[rᵢ, cᵢ] += aᵢ, i = 1 … k

C_n is the orthonormal DCT-II of size n (never formed). Trained are a (k,) and continuous places l (2 × k) in [0, 1]:
rᵢ = round(min(l₀ᵢ, 0.999)·(out − 1)), cᵢ likewise; what falls on one place adds up. a = 0, so ΔW = 0 at the start; l
is uniform.

With K = α·C_out·(∂L/∂ΔW)·C_inᵀ the gradient of aᵢ is K[rᵢ, cᵢ], and that of a place is what moving by one cell would
change: ∂L/∂rᵢ = aᵢ·(K[rᵢ + 1, cᵢ] − K[rᵢ − 1, cᵢ]) / 2, with the edge for cells beyond it, columns likewise. As in the
paper it is clamped to ±1, but for the whole step at once, since a sum over micro-batches and processes does not commute
with a clamp; rounding passes it on unchanged. A place that has left [0, 0.999] has no gradient any more.

One quantity is trained at a time, in optimiser steps: `coefficient_steps` steps a, then `location_steps` steps l, in
turn until step `learn_location_iter` (a tenth of the run where its length is known, else 1000); from there on a alone.
What rests has no gradient, momentum or decay.

A linear layer multiplies once by W + ΔW, which two fast transforms make. The k entries of K that are needed come from
transformed inputs and output gradients, 2.5·n·(in·log₂ in + out·log₂ out) operations for n inputs, instead of a product
of 2·n·out·in: cheaper, although such an operation takes about sixteen times as long. 3·k numbers are trained while
places move, k after that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Delta, Group, Site
from weft.adapters._kinds import Linear, TransposedLinear
from weft.algebra.transforms import Transform, dct
from weft.errors import UsageError
from weft.linear._structured import computed_in
from weft.registry import Card

CARD = Card(
    title="LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning",
    arxiv="2502.06820",
    year=2025,
    summary="a few cosine coefficients of ΔW, at places in the spectrum that are learned too",
    knob="n_frequency",
    recipe={"learning_rate": 5e-3, "weight_decay": 0.0, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    exports="bounded",
    warm_steps=12,
    limitations="ΔW has up to n_frequency ranks: merge it, or export a LoRA of a smaller rank and see the error.",
    reasons={
        "exports": "ΔW's rank is as large as n_frequency or a side of the weight",
        "warm_steps": "places are trained from step coefficient_steps on, when coefficients have left zero",
    },
)

TOP = 0.999
_SLOWER = 16  # how much longer an operation of a transform takes than one of a dense product, on a CPU


@dataclass
class LocaConfig(AdapterConfig):
    """Options of LoCA."""

    n_frequency: int = field(default=1000, metadata={"help": "k, coefficients a weight", "short": 20})
    alpha: float = field(default=1.0, metadata={"help": "α, the factor on ΔW"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    location_lr: float = field(default=1e-4, metadata={"help": "learning rate of the places"})
    coefficient_steps: int = field(
        default=10, metadata={"help": "optimiser steps for coefficients before places have their turn", "short": 2}
    )
    location_steps: int = field(default=20, metadata={"help": "optimiser steps for places in each turn", "short": 3})
    learn_location_iter: int | None = field(
        default=None, metadata={"help": "step from which places stay; a tenth of the run if not given", "short": 12}
    )

    def validate(self) -> None:
        super().validate()
        for name in ("n_frequency", "coefficient_steps", "location_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if self.learn_location_iter is not None and self.learn_location_iter < 0:
            raise UsageError(f"learn_location_iter={self.learn_location_iter} must not be below 0")


class LocaDelta(Delta):
    """ΔW = α·C_outᵀ·F·C_in."""

    config: LocaConfig

    def __init__(self, config: LocaConfig, site: Site) -> None:
        super().__init__(config, site)
        if config.n_frequency > site.out * site.in_:
            raise UsageError(
                f"n_frequency={config.n_frequency} is more than {site.name} has numbers: its weight is "
                f"{site.out} × {site.in_}; use n_frequency ≤ {site.out * site.in_} or leave it out with exclude_modules"
            )
        self.a = nn.Parameter(torch.zeros_like(site.empty(config.n_frequency)))
        self.l = nn.Parameter(torch.rand_like(site.empty(2, config.n_frequency)))
        self.locating = False  # whose turn it is
        self.spectra = dct(site.out), dct(site.in_)

    def cells(self) -> Tensor:
        """2 × k: rᵢ and cᵢ."""
        return self._place().detach().nan_to_num(0.0).round().long()

    def _last(self) -> Tensor:
        """2 × 1: the last row and column."""
        return torch.tensor([[self.out - 1], [self.in_ - 1]], dtype=self.l.dtype, device=self.l.device)

    def _spectrum(self) -> Spectrum:
        return Spectrum(self.cells(), self.spectra, self.config.alpha, self.locating)

    def _place(self) -> Tensor:
        """l with a gradient per cell, which the step's clamp wants; nothing passes where it is out of range."""
        return self.l.clamp(0, TOP) * self._last()

    def delta(self) -> Tensor:
        known = torch.where(self.l.detach().isnan().any(0), torch.nan, self.a)  # a place that is no number tells
        return Synthesis.apply(known, self._place(), self._spectrum())

    def forward(self, x: Tensor) -> Tensor:
        if not self._samples(x):
            return super().forward(x)
        x = self._drop(x)
        return Product.apply(x.to(computed_in(x)), None, self.a, self._place(), self._spectrum())

    def folds(self, x: Tensor) -> bool:
        return not (self.dropout and self.training)

    def fold(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if w.requires_grad or not self._samples(x):
            return super().fold(x, w, bias)
        y = Product.apply(x, w, self.a, self._place(), self._spectrum())
        return y if bias is None else y + bias

    def _samples(self, x: Tensor) -> bool:
        """Whether K's entries cost less from transformed inputs than from the dense ∂L/∂ΔW."""
        if type(self.kind) not in (Linear, TransposedLinear) or x.device.type != "cpu":
            return False
        n = self.kind.tokens(x)
        transforms = 2.5 * (self.out * math.log2(self.out) + self.in_ * math.log2(self.in_) + 1)
        return n * _SLOWER * transforms < 2 * n * self.out * self.in_

    def count(self) -> int:
        return 3 * self.config.n_frequency

    def controller_class(self) -> type[Controller]:
        return LocaController

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        # a coefficient that the loss does not see (row 0 below a softmax) is rounding noise, and so is its slope
        return {"l": Group(lr=config.location_lr, weight_decay=0.0, eps=1e-6)}


class LocaController(Controller):
    """Gives coefficients and places their turns, and clamps the slope of a place."""

    events = True

    def locating(self) -> bool:
        """Whether this step moves places."""
        c = self.config
        end = c.learn_location_iter
        if end is None:
            end = 1000 if self.total_steps is None else self.total_steps // 10
        return self.step < end and self.step % (c.coefficient_steps + c.location_steps) >= c.coefficient_steps

    def begin(self) -> None:
        for d in self.deltas:
            d.locating = self.locating()

    def started(self, optimizer: Any) -> None:
        if self.step == 0:
            self.begin()  # the length of the run is known now
        super().started(optimizer)

    def before_step(self) -> None:
        for d in self.deltas:
            if d.l.grad is not None:
                last = d._last()
                d.l.grad.copy_((d.l.grad / last.clamp(min=1)).clamp(-1, 1) * last)

    def update_scales(self) -> dict[Tensor, Tensor]:
        rests = [d.a if self.locating() else d.l for d in self.deltas]
        return {p: torch.zeros((), device=p.device) for p in rests}


class Spectrum:
    """What a, l and the transforms say together, for the two products below.

    Attributes:
        cells: 2 × k, rows and columns of F.
        transforms: of the outputs and the inputs.
        alpha: the factor on ΔW.
        locating: whether the places are differentiated, or the coefficients.
    """

    def __init__(self, cells: Tensor, transforms: tuple[Transform, Transform], alpha: float, locating: bool) -> None:
        self.cells, self.transforms, self.alpha, self.locating = cells, transforms, alpha, locating

    def dense(self, a: Tensor) -> Tensor:
        """ΔW, out × in."""
        out, in_ = self.transforms
        rows, columns = self.cells
        f = torch.zeros(out.n * in_.n, dtype=a.dtype, device=a.device)
        f.index_add_(0, rows * in_.n + columns, a * self.alpha)
        return out.inverse(in_.inverse(f.view(out.n, in_.n)).mT).mT

    def gradients(self, a: Tensor, entries: Any) -> tuple[Tensor, Tensor]:
        """∂L/∂a and ∂L/∂cells from `entries(rows, columns)`, which gives K / α there; zero for what rests."""
        rows, columns = self.cells
        if not self.locating:
            return entries(rows, columns) * self.alpha, torch.zeros_like(self.cells, dtype=a.dtype)
        last = [t.n - 1 for t in self.transforms]
        down = entries((rows + 1).clamp(max=last[0]), columns) - entries((rows - 1).clamp(min=0), columns)
        right = entries(rows, (columns + 1).clamp(max=last[1])) - entries(rows, (columns - 1).clamp(min=0))
        return torch.zeros_like(a), torch.stack([down, right]) * (0.5 * self.alpha * a)


class Synthesis(torch.autograd.Function):
    """ΔW from its coefficients; the gradient is the spectrum of ∂L/∂ΔW."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, place: Tensor, spectrum: Spectrum) -> Tensor:
        ctx.save_for_backward(a)
        ctx.spectrum = spectrum
        return spectrum.dense(a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        out, in_ = ctx.spectrum.transforms
        k = out.forward(in_.forward(grads[0]).mT).mT
        return *ctx.spectrum.gradients(ctx.saved_tensors[0], lambda r, c: k[r, c]), None


class Product(torch.autograd.Function):
    """x·(W + ΔW)ᵀ, or x·ΔWᵀ without W; the entries of K come from transformed inputs, block by block."""

    ROWS = 256  # of inputs a block: what it makes stays in a processor's cache

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, a: Tensor, place: Tensor, spectrum: Spectrum) -> Tensor:
        m = spectrum.dense(a).to(x.dtype)
        m = m if w is None else m.add_(w)
        ctx.save_for_backward(x, m, a)
        ctx.spectrum = spectrum
        return torch.nn.functional.linear(x, m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, m, a = ctx.saved_tensors
        (g,) = grads
        d_x = g @ m if ctx.needs_input_grad[0] else None
        out, in_ = ctx.spectrum.transforms
        total: Any = None
        for gs, xs in zip(g.reshape(-1, out.n).split(Product.ROWS), x.reshape(-1, in_.n).split(Product.ROWS)):
            gs, xs = out.forward(gs.to(a.dtype)), in_.forward(xs.to(a.dtype))
            found = ctx.spectrum.gradients(
                a, lambda r, c, g=gs, x=xs: (g.index_select(1, r) * x.index_select(1, c)).sum(0)
            )
            total = found if total is None else [t.add_(part) for t, part in zip(total, found)]
        return d_x, None, *total, None
