"""RandLoRA: a full-rank update, a sum of random low-rank matrices whose scales are trained.

Paul Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", ICLR 2025, arXiv 2502.00987.

    d = min(out, in),  D = max(out, in),  n = ⌈d / r⌉ bases
    A_j = diag(λ_·j)·A·diag(γ_j)            A: r × d and B_j: D × r frozen;  λ: r × n and γ: n × d trained
    M = Σ_j B_j·A_j: D × d                  ΔW = s·M where in is the smaller side, else s·Mᵀ;  s = α / r

λ = 0 and γ = 1 / max(n, d) at the start, so ΔW = 0. A smaller r means more trained numbers, n·(r + d). A and B are made
once for the largest weight (d and D of the largest out and in), shared by all layers, which slice them, and drawn as
PEFT draws them from the same seed; they are not saved, only recognised by a checksum.

`pairing="peft"` multiplies row k·n + j of the stacked A_j with column j·r + k of the stacked B_j, as PEFT and the
authors' code do, so that λ and γ of a PEFT checkpoint mean the same here; `pairing="paper"` is the sum above.
`scale="authors"` divides by √n as well. `entries="sparse"` draws −1, 0, +1 with probabilities 1/6, 2/3, 1/6;
"very_sparse" draws ±1 with probability 1 / √d.

M has rank d, so two thin products of inner width n·r would cost twice a dense layer each way. The layer multiplies
once by W + ΔW where counted multiplications say that this is cheaper, or by ΔW alone where it may not fold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._bases import SharedBasis, shared_basis, verify
from weft.adapters._config import AdapterConfig
from weft.adapters._core import on_meta
from weft.adapters._delta import Delta, LowRankDelta, Site
from weft.adapters._kinds import Embedding
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    arxiv="2502.00987",
    year=2025,
    summary="a full-rank update from frozen random low-rank matrices, shared by all layers, with trained scales",
    recipe={"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    limitations=(
        "A smaller r trains more numbers. ΔW has full rank, so an exact LoRA export is as large as the weights: merge, "
        "or export with a smaller rank and see the error."
    ),
)


@dataclass
class RandloraConfig(AdapterConfig):
    """Options of RandLoRA."""

    r: int = field(default=32, metadata={"help": "rank of each random matrix; smaller means more parameters"})
    lora_alpha: float | None = field(default=None, metadata={"help": "α; ΔW is scaled by α / r; 20·r if not given"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    scale: str = field(default="peft", metadata={"help": "peft (α / r) or authors (α / (r·√n))"})
    pairing: str = field(default="peft", metadata={"help": "peft (reads PEFT's checkpoints) or paper"})
    entries: str = field(default="dense", metadata={"help": "random numbers: dense, sparse or very_sparse"})
    seed: int = field(default=0, metadata={"help": "seed of the random matrices"})

    def validate(self) -> None:
        super().validate()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r}: use {' or '.join(known)}")


_CHOICES = {"scale": ("peft", "authors"), "pairing": ("peft", "paper"), "entries": ("dense", "sparse", "very_sparse")}


class RandloraDelta(LowRankDelta):
    """ΔW = s·M or s·Mᵀ; its inner width n·r is at least d."""

    config: RandloraConfig
    basis_a: SharedBasis  # r × d of the largest weight
    basis_b: SharedBasis  # D × (n·r) of the largest weight

    def __init__(self, config: RandloraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r = site.check_rank(config.r)
        self.small, self.large = min(site.out, site.in_), max(site.out, site.in_)
        self.n = -(-self.small // self.r)
        alpha = 20 * self.r if config.lora_alpha is None else config.lora_alpha
        self.scale = alpha / self.r / (math.sqrt(self.n) if config.scale == "authors" else 1)
        self.lam = nn.Parameter(torch.zeros_like(site.empty(self.r, self.n)))
        self.gamma = nn.Parameter(torch.full_like(site.empty(self.n, self.small), 1 / max(self.n, self.small)))
        self.skeleton = on_meta(site)

    @classmethod
    def finish(cls, config: RandloraConfig, deltas: list[Any]) -> None:
        sides = max(d.out for d in deltas), max(d.in_ for d in deltas)
        a, b = (
            shared_basis(draw, side, config.seed, config.r, min(sides), max(sides), config.entries) for side in "AB"
        )
        for d in deltas:
            d.basis_a, d.basis_b = a, b
        if config.is_stored and not deltas[0].skeleton:
            verify("the bases", deltas[0].checksums()["the bases"], config)

    def train(self, mode: bool = True) -> RandloraDelta:
        """Also draw the bases, which attaching puts off, so that torch.compile does not meet the drawing."""
        if not self.lam.is_meta and hasattr(self, "basis_a"):
            for basis in (self.basis_a, self.basis_b):
                basis.tensor(self.lam.device)
        return super().train(mode)

    def checksums(self) -> dict[str, str]:
        return {"the bases": f"{self.basis_a.fingerprint()} {self.basis_b.fingerprint()}"}

    def factors(self) -> tuple[Tensor, Tensor]:
        lam, gamma = self.scale * self.lam, self.gamma
        a = self.basis_a.tensor(lam.device)[:, : self.small].to(lam.dtype)
        b = self.basis_b.tensor(lam.device)[: self.large, : self.n * self.r].to(lam.dtype)
        scaled: Tensor = ScaledA.apply(a, lam, gamma, self.config.pairing == "paper").flatten(0, 1)
        return (b, scaled) if self.small == self.in_ else (scaled.mT, b.mT)

    def forward(self, x: Tensor) -> Tensor:
        return Delta.forward(self, x) if self._dense_is_cheaper(x, products=3) else super().forward(x)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        return Delta.add(self, y, x) if self._dense_is_cheaper(x, products=3) else super().add(y, x)

    def folds(self, x: Tensor) -> bool:
        return not (self.dropout and self.training) and self._dense_is_cheaper(x, products=1)

    def _dense_is_cheaper(self, x: Tensor, products: int) -> bool:
        """Whether to make ΔW, by multiplications of a forward and a backward pass.

        `products` with it cost n·out·in each: its gradient alone where it joins W, three where it stays apart.
        """
        if isinstance(self.kind, Embedding):
            return False  # rows are looked up
        n, width, size = self.kind.tokens(x), self.n * self.r, self.out * self.in_
        return 2 * size * width + products * n * size < n * width * (2 * self.large + 3 * self.small)

    def count(self) -> int:
        return self.n * (self.r + self.small)


class ScaledA(torch.autograd.Function):
    """λ_kj·A_ki·γ_ji as r × n × d, or n × r × d for the paper's pairing; keeps only what it was given."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, lam: Tensor, gamma: Tensor, paper: bool) -> Tensor:
        ctx.save_for_backward(a, lam, gamma)
        ctx.paper = paper
        if paper:
            return lam.mT[:, :, None] * a * gamma[:, None]
        return lam[:, :, None] * a[:, None] * gamma

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        a, lam, gamma = ctx.saved_tensors
        g = grads[0] * (a if ctx.paper else a[:, None])
        order = "jki" if ctx.paper else "kji"
        d_lam = torch.einsum(f"{order},ji->kj", g, gamma)
        return None, d_lam, torch.einsum(f"{order},kj->ji", g, lam), None


def draw(side: str, seed: int, r: int, small: int, large: int, entries: str) -> Tensor:
    """A (r × small) or B (large × n·r), each of standard deviation 1, to the bit as PEFT's RandLoRA draws them."""
    generator = torch.Generator().manual_seed(seed)
    n = -(-small // r)
    shapes = [(r, 1, small)] if side == "A" else [(r, 1, small), (large, n, r)]  # A first, in one stream
    if entries == "dense":
        shapes = shapes[:1] + [(large, 1, r)] * n * (side == "B")
        drawn = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        for t in drawn:
            nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)
        found = drawn[0] if side == "A" else torch.cat(drawn[1:], dim=1)
    else:
        s = 3 if entries == "sparse" else math.sqrt(small)
        u = [torch.rand(shape, generator=generator) for shape in shapes][-1]
        found = (u > 1 - 1 / (2 * s)).float() - (u < 1 / (2 * s)).float()
    found = (found / found.std()).float()
    return found.flatten(0, 1) if side == "A" else found.flatten(1)
