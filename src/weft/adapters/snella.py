"""SNELLA: a sparse update of high rank from two thin factors, whose entries compete within a layer and across layers.

Shufan Shen et al., "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025,
arXiv 2510.24037 (its predecessor: SNELL, arXiv 2411.01800).

    D[o, i] = Σ_h s_h·‖Q_h[o] − P_h[i]‖₂       P: 2 × in × c,  Q: 2 × out × c,  c = q_dim / 2,  s = (0.1, −0.1)
    K = D + a·softmax(D / g) + b               the softmax runs over the outputs;  a, g, b: one number each
    ΔW = K ∘ |K| ∘ [|K| > τ]                   no gradient flows through the factor |K|, nor through τ

P and Q are Kaiming-uniform (taken as 2 × side × c, as the authors' code does: bound 1 / √(side·c)), a = g = 1, b = 0.
So ΔW is not zero at the start: D is near zero, K near 1 / out, ΔW near 1 / out². Zeros would give zero distances, from
which nothing learns. The distances make K a matrix of full rank, which P·Qᵀ is not.

sparsify="weighted" is the authors' code, above. The papers describe plain thresholds: "hard" is K ∘ [|K| > τ], "soft"
is sign(K)·max(|K| − τ, 0). In a layer the n largest |K| are kept: τ lies midway between the last that is dropped and
the first that is kept, so that other rounding on another machine hardly moves an entry over it. (The authors' quantile
drops the smallest even where all are wanted.) τ is found once an optimiser step, from the weights after it, and saved.

Layers share a budget V of kept entries. It falls from V₀ = Σ(1 − init_thres)·in·out to V₁ = Σ(1 − target_ratio)·in·out,
    V(t) = V₁ + (V₀ − V₁)·(1 − (t − w₀) / (T − w₀ − w₁))³      V₀ up to step w₀ = init_warmup, V₁ in the last w₁ steps
and layer l gets n_l in proportion to its score, at most its size; what is left over goes to the others in proportion,
until V is spent to the last entry. After every step, with the new p and the gradient that led to it (as in the authors'
code), for p = P and p = Q,
    I = |p ∘ ∂L/∂p|,  Ī ← β₁·Ī + (1 − β₁)·I,  Ū ← β₂·Ū + (1 − β₂)·|I − Ī|;  score = Σ_p mean(Ī ∘ Ū)
The authors count t in epochs and share anew once an epoch, of a hundred. Here t and intervals count optimiser steps;
mask_interval is a hundredth of the run unless given, and one in the last w₁ steps. The length T of the run comes from
`weft.optimizer_and_scheduler`, or total_steps. A layer whose budget falls to nothing learns no more.

Nothing dense outlives a product: K is made in the forward pass and again in the backward pass, from P and Q alone, and
the optimiser sees thin factors only. (Convolutions, embeddings, experts and autocast keep ΔW once.) The gradient of ΔW
is dense for a moment. Where W + ΔW may be multiplied at once, a step over n input vectors takes 3·n·out·in
multiplications and 5·q_dim·out·in for the kernel, LoRA's 2·n·out·in: 1.5 times at n = 4096. With narrow weights or
beside a second adapter it is 2.5 times.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._core import on_meta
from weft.adapters._delta import Delta, Site
from weft.adapters._kinds import Conv, Embedding
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
    arxiv="2510.24037",
    year=2025,
    summary="a sparse high-rank update made by a kernel from two thin factors; layers compete for its entries",
    knob="q_dim",
    recipe={"learning_rate": 1e-3, "weight_decay": 5e-4},
    exports="bounded",
    init_drift=(1e-7, 0.5),
    limitations=(
        "ΔW is made anew in every forward: merge for inference. target_ratio, the share of entries that is removed, "
        "was tuned for each task in the paper (0.3 to 0.76). Leave out heads of few outputs: ΔW starts near 1 / out²."
    ),
    reasons={
        "exports": (
            "ΔW is sparse and of full rank: an SVD of full rank is exact to rounding and as large as the weights; a "
            "smaller rank is the best approximation, its error printed"
        ),
        "init_drift": (
            "K is near 1 / out at the start, and |ΔW| near √(in / out³): 1e-3 for a weight of side 1000, and more the "
            "fewer outputs there are; zero factors would have no gradient"
        ),
        "file": "tau and kept, two numbers: where the mask lies",
    },
)

SCALE = 0.1  # s_h is ±SCALE
UNKNOWN_LENGTH = 1000  # steps of a run that nobody gave the length of
logger = logging.getLogger("weft")


@dataclass
class SnellaConfig(AdapterConfig):
    """Options of SNELLA."""

    q_dim: int = field(default=32, metadata={"help": "numbers that each input and output has, over both distances"})
    target_ratio: float = field(default=0.5, metadata={"help": "share of entries that is removed at the end"})
    init_thres: float = field(default=0.0, metadata={"help": "share of entries that is removed at the start"})
    sparsify: Literal["weighted", "hard", "soft"] = field(
        default="weighted", metadata={"help": "what is kept of an entry K: K·|K| (weighted), K (hard), or K ∓ τ (soft)"}
    )
    dropout: float = field(default=0.0, metadata={"help": "probability to leave the update out for a whole sample"})
    init_warmup: int = field(default=0, metadata={"help": "steps before the budget falls"})
    final_warmup: int = field(default=0, metadata={"help": "steps at the end with the final budget"})
    mask_interval: int | None = field(
        default=None, metadata={"help": "steps between allocations; a hundredth of the run if not given"}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "steps of the run, where weft's optimiser does not know them", "short": 12}
    )
    beta1: float = field(default=0.85, metadata={"help": "β₁, memory of the average importance"})
    beta2: float = field(default=0.85, metadata={"help": "β₂, memory of the importance's uncertainty"})

    def validate(self) -> None:
        super().validate()
        if self.q_dim < 2 or self.q_dim % 2:
            raise UsageError(f"q_dim={self.q_dim!r} must be even, half of it for each distance")
        if not 0 <= self.target_ratio < 1:
            raise UsageError(f"target_ratio={self.target_ratio!r} is not a share of at least 0 and below 1")
        if not 0 <= self.init_thres <= self.target_ratio:
            raise UsageError(f"init_thres={self.init_thres!r} is not within 0..{self.target_ratio}, the target_ratio")
        if self.sparsify not in ("weighted", "hard", "soft"):
            raise UsageError(f"sparsify={self.sparsify!r}: use weighted, hard or soft")
        for name, least in (("init_warmup", 0), ("final_warmup", 0), ("mask_interval", 1), ("total_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}={value!r} must be at least {least}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r} is not a share of at least 0 and below 1")


# --- the kernel -------------------------------------------------------------------------------------------------------


def kernel(p: Tensor, q: Tensor, a: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, D and the softmax, each out × in, and the distances (2 × out × in)."""
    distances = torch.cdist(q, p)
    d = SCALE * (distances[0] - distances[1])
    soft = torch.softmax(d / g, dim=0)
    return d + a * soft + b, d, soft, distances


def sparsified(k: Tensor, tau: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """ΔW of K, and ∂ΔW/∂K."""
    size = k.abs()
    mask = (size > tau).to(k.dtype)  # multiplied and not selected by, so that NaN stays seen
    if how == "soft":
        return k.sign() * (size - tau).relu(), mask
    return (k * size * mask, size * mask) if how == "weighted" else (k * mask, mask)


def pulled(grad: Tensor, p: Tensor, q: Tensor, a: Tensor, g: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of P, Q, a, g and b, from that of K and from D, the softmax and the distances."""
    d, soft, distances = parts
    ga, gb = (grad * soft).sum(), grad.sum()
    gz = a * soft * (grad - (grad * soft).sum(0))  # of D / g, through the softmax
    gg = -(gz * d).sum() / g**2
    gd = SCALE * (grad + gz / g)
    m = torch.stack([gd, -gd]) / distances.masked_fill(distances == 0, torch.inf)  # nothing through a distance of zero
    gq = q * m.sum(2)[:, :, None] - m @ p
    gp = p * m.sum(1)[:, :, None] - m.mT @ q
    return gp, gq, ga.expand_as(a), gg.expand_as(g), gb.expand_as(a)


class Update(torch.autograd.Function):
    """ΔW (out × in); keeps P, Q and numbers, and makes K again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, a: Tensor, g: Tensor, b: Tensor, tau: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(p, q, a, g, b, tau)
        ctx.how = how
        return sparsified(kernel(p, q, a, g, b)[0], tau, how)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, q, a, g, b, tau = ctx.saved_tensors
        k, *parts = kernel(p, q, a, g, b)
        slope = sparsified(k, tau, ctx.how)[1]
        return *pulled(grads[0] * slope, p, q, a, g, tuple(parts)), None, None


class Product(torch.autograd.Function):
    """x·(W + ΔW)ᵀ + bias, or x·ΔWᵀ without a W; keeps x beside what `Update` keeps, and no ΔW."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, bias: Tensor | None,
        p: Tensor, q: Tensor, a: Tensor, g: Tensor, b: Tensor, tau: Tensor, how: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, w, p, q, a, g, b, tau)
        ctx.how = how
        return linear(x, _onto(w, sparsified(kernel(p, q, a, g, b)[0], tau, how)[0], x), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, p, q, a, g, b, tau = ctx.saved_tensors
        (gy,) = grads
        k, *parts = kernel(p, q, a, g, b)
        update, slope = sparsified(k, tau, ctx.how)
        gx = gy @ _onto(w, update, x) if ctx.needs_input_grad[0] else None
        gm = gy.reshape(-1, gy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        gw = gm if ctx.needs_input_grad[1] else None
        gbias = gy.reshape(-1, gy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return gx, gw, gbias, *pulled(gm.to(k.dtype) * slope, p, q, a, g, tuple(parts)), None, None


def _onto(w: Tensor | None, update: Tensor, x: Tensor) -> Tensor:
    return update.to(x.dtype) if w is None else w + update.to(w.dtype)


def threshold(k: Tensor, kept: int) -> Tensor:
    """τ below the `kept` largest |K|, midway to the next smaller; infinite for none. Equal ones fall together."""
    size = k.abs().flatten()
    if kept >= len(size):
        return torch.zeros_like(size[0])
    low = size.kthvalue(len(size) - kept).values
    high = size.masked_fill(size <= low, torch.inf).min()
    return low + (high - low) / 2


class SnellaDelta(Delta):
    """ΔW = K ∘ |K| ∘ [|K| > τ]."""

    config: SnellaConfig
    tau: Tensor
    kept: Tensor

    def __init__(self, config: SnellaConfig, site: Site) -> None:
        super().__init__(config, site)
        self.P = nn.Parameter(site.empty(2, site.in_, config.q_dim // 2))
        self.Q = nn.Parameter(site.empty(2, site.out, config.q_dim // 2))
        for factor in (self.P, self.Q):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.a = nn.Parameter(torch.ones_like(site.empty(1)))
        self.g = nn.Parameter(torch.ones_like(site.empty(1)))
        self.b = nn.Parameter(torch.zeros_like(site.empty(1)))
        self.register_buffer("tau", torch.zeros_like(site.empty()))
        kept = round((1 - config.init_thres) * self.size())
        self.register_buffer("kept", torch.tensor(kept, device=site.device))
        if not (on_meta(site) or site.stored):
            self.keep(kept)

    def size(self) -> int:
        return self.out * self.in_

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Let the `count` entries of largest |K| be kept, as K is now."""
        self.kept.fill_(count)
        if count >= self.size():
            self.tau.zero_()
        else:
            self.tau.copy_(threshold(kernel(self.P, self.Q, self.a, self.g, self.b)[0], count))

    def _arguments(self) -> tuple[Any, ...]:
        return self.P, self.Q, self.a, self.g, self.b, self.tau, self.config.sparsify

    def delta(self) -> Tensor:
        return Update.apply(*self._arguments())

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.kind, Conv | Embedding) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return Product.apply(self._drop(x), None, None, *self._arguments())

    def folds(self, x: Tensor) -> bool:
        return not (isinstance(self.kind, Embedding) or (self.dropout and self.training))

    def fold(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.kind, Conv):
            return super().fold(x, w, bias)
        return Product.apply(x, w, bias, *self._arguments())

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        samples = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.dropout)
        return x * (samples / (1 - self.dropout))

    def count(self) -> int:
        return self.config.q_dim * (self.in_ + self.out) + 3

    def controller_class(self) -> type[Controller]:
        return SnellaController


# --- the competition --------------------------------------------------------------------------------------------------


def scheduled(t: int, total: int, first: int, last: int, v0: int, v1: int) -> int:
    """V after t of `total` steps, `first` of them at v0 and `last` at v1.

    >>> [scheduled(t, 10, 2, 2, 1000, 200) for t in (0, 2, 5, 8, 10)]
    [1000, 1000, 300, 200, 200]
    """
    if t <= first:
        return v0
    if t >= total - last:
        return v1
    return int(v1 + (v0 - v1) * (1 - (t - first) / (total - last - first)) ** 3)


def allocated(budget: int, scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Entries for every layer: the budget in proportion to scores, none above its size, to the last entry.

    Where scores leave a part of the budget to nobody (they are zero), it is shared equally.

    >>> allocated(10, [1.0, 2.0, 1.0], [100, 4, 100]), allocated(9, [0.0, 0.0], [5, 6])
    ([3, 4, 3], [5, 4])
    """
    counts = list(sizes)
    left, rest = min(budget, sum(sizes)), list(range(len(sizes)))
    shares: dict[int, float] = {}
    while rest:
        weights = {i: scores[i] for i in rest} if any(scores[i] > 0 for i in rest) else dict.fromkeys(rest, 1.0)
        total = math.fsum(weights.values())
        shares = {i: left * weight / total for i, weight in weights.items()}
        full = [i for i in rest if shares[i] >= sizes[i]]
        if not full:
            break
        left -= sum(sizes[i] for i in full)
        rest = [i for i in rest if i not in full]
    for i in rest:
        counts[i] = int(shares[i])
    largest_remainders = sorted(rest, key=lambda i: (counts[i] - shares[i], i))
    for i in largest_remainders[: left - sum(counts[i] for i in rest)]:
        counts[i] += 1
    return counts


class SnellaController(Controller):
    """Smooths the importance of factors in every step, shares the budget, and moves thresholds with the weights."""

    events = True

    def __init__(self, config: Any, deltas: list[Any]) -> None:
        super().__init__(config, deltas)
        factors = [p for d in deltas for p in (d.P, d.Q)]
        self.mean = [torch.zeros_like(p, requires_grad=False) for p in factors]  # Ī of P and Q, layer by layer
        self.spread = [torch.zeros_like(p, requires_grad=False) for p in factors]  # Ū
        self.sizes = [d.size() for d in deltas]

    def plan(self) -> tuple[int, int]:
        """Length of the run, and steps between allocations."""
        total = self.config.total_steps or self.total_steps or UNKNOWN_LENGTH
        return total, self.config.mask_interval or max(1, total // 100)

    def after_step(self) -> None:
        if self.step == 0 and not (self.config.total_steps or self.total_steps):
            logger.warning(
                "snella does not know the length of the run and lets its budget fall over %d steps: set total_steps, "
                "or build the optimiser with weft.optimizer_and_scheduler", UNKNOWN_LENGTH,
            )  # fmt: skip
        self._weigh()
        counts = self._share(self.step + 1)
        for i, d in enumerate(self.deltas):
            d.keep(int(d.kept) if counts is None else counts[i])

    def _weigh(self) -> None:
        b1, b2 = self.config.beta1, self.config.beta2
        for i, p in enumerate(p for d in self.deltas for p in (d.P, d.Q)):
            importance = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            importance.masked_fill_(importance.isnan(), 0)
            self.mean[i] = self.mean[i].to(p).lerp_(importance, 1 - b1)
            self.spread[i] = self.spread[i].to(p).lerp_((importance - self.mean[i]).abs_(), 1 - b2)

    def _share(self, t: int) -> list[int] | None:
        """Every layer's count after t steps, or None where it stays."""
        c = self.config
        total, interval = self.plan()
        if t <= c.init_warmup or (t <= total - c.final_warmup and t % interval):
            return None
        v0, v1 = (int((1 - share) * sum(self.sizes)) for share in (c.init_thres, c.target_ratio))
        return allocated(scheduled(t, total, c.init_warmup, c.final_warmup, v0, v1), self.scores(), self.sizes)

    def scores(self) -> list[float]:
        """Mean Ī ∘ Ū of P plus that of Q, of every layer."""
        home = self.mean[0].device
        means = torch.stack([(m * s).mean().double().to(home) for m, s in zip(self.mean, self.spread, strict=True)])
        return means.unflatten(0, (-1, 2)).sum(1).tolist()

    def state(self) -> dict[str, Tensor]:
        named = {f"mean/{i}": t for i, t in enumerate(self.mean)}
        return named | {f"spread/{i}": t for i, t in enumerate(self.spread)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.mean, self.spread = (
            [state[f"{name}/{i}"].clone() for i in range(2 * len(self.deltas))] for name in ("mean", "spread")
        )
