"""SALT: the largest singular values of W are scaled and shifted, the rest gets a low-rank update.

Abdelrahman Elsayed et al., "SALT: Singular Value Adaptation with Low-Rank Transformation", BMVC 2025,
arXiv 2503.16055.

    W = U·diag(S)·Vᵀ                                U: out × k,  Vᵀ: k × in frozen;  k = min(out, in)
    ΔW = U_r·diag(max(a·S_r + b, 0) − S_r)·V_rᵀ     a, b: r         the r largest singular values
       + U_rest·X·Y·V_restᵀ                         X: (k − r) × l,  Y: l × (k − r)

a = 1, b = 0, X is Kaiming-uniform, Y is zero: the start is W to the last bit. `r`, by default a tenth of k, is how many
values are scaled and shifted; `r_lora` is l, the rank of the update on the rest, and smaller where k − r leaves no more
room. Convolutions are decomposed as out × (in·kernel). The recipe trains layer norms as well: name them in
modules_to_save. Weight decay would pull W itself to zero through a, which has a parameter group without it; b, X and Y
decay towards W.

`relu` says what is cut at zero. The authors cut every entry of
    M = diag(a·S_r + b) ⊕ (diag(S_rest) + X·Y)      in W + ΔW = U·M·Vᵀ,
which is `relu="all"`. Off its diagonal M is zero at the start, where a ReLU has no gradient: only the diagonal of X·Y
learns at first, negative entries off it never do, and the result depends on the signs of the singular vectors. The
default `relu="diag"` cuts singular values alone; one that is cut has no gradient, so it stays so. `relu="none"` cuts
nothing, and values may change sign. Both are an exact LoRA of rank r + l; with "all" ΔW has rank k, and an exact export
is as large as the weights.

The objective carries reg_multiplier · Σ over layers of (‖a·S_r + b − S_r‖ + ‖X·Y‖_F), two norms that are not squared.
The authors' code multiplies by zero.

The authors rebuild U·M·Vᵀ in every forward. Here W stays as it is: for n input vectors, forward and backward multiply
n·(in + out)·(2r + 3l) + 2·l·(k − r)·(in + out) numbers beside the layer's own, where a LoRA of rank ρ takes
3·n·ρ·(in + out). At width 1024 and 4096 tokens the default costs 1.2 times a LoRA step of rank 8, layer included. Where
r + l is large, W + ΔW is multiplied once instead. "all" must build its dense core and ΔW in every step, for
(k − r)²·(2·out + 3·l) + 2·out·in·k and one more dense product: 1.9 times a LoRA step at that size, more with fewer
tokens.

U, S and Vᵀ are saved, because another machine or number of threads may find other vectors: k·(in + out + 1) numbers, up
to twice the weight. `store_factors=False` saves a, b, X, Y and decomposes again when loading: it accepts only the very
weights that were trained on, and outputs may differ in the last bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import Delta, Group, Site
from weft.adapters._derived import DerivedDelta
from weft.adapters._kinds import Conv, Embedding
from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="SALT: Singular Value Adaptation with Low-Rank Transformation",
    arxiv="2503.16055",
    year=2025,
    summary="scales and shifts the largest singular values of each weight; a low-rank update in the space of the rest",
    knob="r_lora",
    recipe={"learning_rate": 1e-4, "weight_decay": 0.01, "lr_scheduler_type": "cosine"},
    limitations=(
        "The frozen factors take k·(in + out) numbers a weight, k = min(out, in), in memory, and in the file unless "
        "store_factors=False. With relu='all' an exact LoRA export is as large as the weights: merge instead."
    ),
    reasons={
        "file": "A, B, A_rest, B_rest and S: another machine or number of threads may find other singular vectors of "
        "the same weight"
    },
)


@dataclass
class SaltConfig(AdapterConfig):
    """Options of SALT."""

    r: int | None = field(
        default=None, metadata={"help": "largest singular values to scale and shift; by `ratio` if not given"}
    )
    ratio: float = field(default=0.1, metadata={"help": "share of the singular values, where r is not given"})
    r_lora: int = field(default=8, metadata={"help": "l, rank of the update in the space of the other values"})
    relu: str = field(default="diag", metadata={"help": "cut at zero: diag (the r values), all (as the authors), none"})
    reg_multiplier: float = field(
        default=0.0, metadata={"help": "coefficient of the regulariser in the objective", "short": 0.01}
    )
    store_factors: bool = field(
        default=True, metadata={"help": "save the singular vectors; without, they are found again when loading"}
    )

    def validate(self) -> None:
        super().validate()
        if not 0 < self.ratio <= 1:
            raise UsageError(f"ratio={self.ratio!r}: a share above 0, at most 1")
        if self.r_lora < 1:
            raise UsageError(f"r_lora={self.r_lora!r}: the rank is a whole number of at least 1")
        if self.relu not in ("diag", "all", "none"):
            raise UsageError(f"relu={self.relu!r}: use diag, all or none")
        if self.reg_multiplier < 0:
            raise UsageError(f"reg_multiplier={self.reg_multiplier!r} must not be below 0")


class SaltDelta(DerivedDelta):
    """ΔW = B·diag(c)·A + B_rest·C·A_rest, with B = U_r, A = V_rᵀ, B_rest = U_rest and A_rest = V_restᵀ."""

    config: SaltConfig
    S: Tensor
    A_rest: Tensor
    B_rest: Tensor

    def __init__(self, config: SaltConfig, site: Site) -> None:
        super().__init__(config, site)
        k = min(site.out, site.in_)
        r = self.r = site.check_rank(site.rank or config.r or max(1, int(config.ratio * k)))
        self.rest = k - r
        self.rank = min(config.r_lora, self.rest)
        w = self.weight_to_factorise(config, site)
        u, s, vh = svd_top(w) if w is not None else (site.empty(site.out, k), site.empty(k), site.empty(k, site.in_))
        saved = config.store_factors
        self.freeze_factors(u[:, :r], vh[:r], saved)
        self.register_buffer("B_rest", u[:, r:].float().contiguous(), saved)
        self.register_buffer("A_rest", vh[r:].float().contiguous(), saved)
        self.register_buffer("S", s.float(), saved)
        self.a = nn.Parameter(torch.ones_like(site.empty(r)))
        self.b = nn.Parameter(torch.zeros_like(site.empty(r)))
        self.X = nn.Parameter(site.empty(self.rest, self.rank))
        self.Y = nn.Parameter(torch.zeros_like(site.empty(self.rank, self.rest)))
        if self.rest:
            nn.init.kaiming_uniform_(self.X, a=math.sqrt(20))

    def core(self) -> Tensor:
        moved = self.a * self.S[: self.r] + self.b
        if self.config.relu != "none":
            moved = moved.clamp(min=0)  # unlike relu, lets a value that is zero from the start learn
        return moved - self.S[: self.r]

    def rest_factors(self) -> tuple[Tensor, Tensor]:
        """The update on the rest: out × l and l × in, or with relu="all" out × (k − r) and (k − r) × in."""
        if self.config.relu != "all":
            return self.B_rest @ self.X, self.Y @ self.A_rest
        s = torch.diag(self.S[self.r :])
        return self.B_rest @ (torch.relu(torch.addmm(s, self.X, self.Y)) - s), self.A_rest

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = self.rest_factors()
        return torch.cat([self.B * self.core(), b], dim=1), torch.cat([self.A, a])

    def delta(self) -> Tensor:
        b, a = self.rest_factors()
        return torch.addmm((self.B * self.core()) @ self.A, b, a)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_dense():
            return Delta.forward(self, x)
        return self._add_rest(super().forward(x), x)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        if self._is_dense():
            return Delta.add(self, y, x)
        return self._add_rest(super().add(y, x), x)

    def _is_dense(self) -> bool:
        # of rank k, two products cost more than ΔW itself; but an embedding looks up rows
        return self.config.relu == "all" and not isinstance(self.kind, Embedding)

    def _add_rest(self, y: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.kind, Conv) or not self.rest:
            return y  # convolutions multiply by `factors`, which hold the rest already
        b, a = self.rest_factors()
        dtype = self._compute_dtype(x, a)
        h, b = self.kind.down(x, a.to(dtype)), b.to(dtype)
        return self.kind.up(h, b, onto=y) if h.dtype == y.dtype else y + self.kind.up(h, b).to(y.dtype)

    def folds(self, x: Tensor) -> bool:
        if isinstance(self.kind, Embedding):
            return False
        n, size = self.kind.tokens(x), self.out * self.in_
        apart = n * (self.in_ + self.out) * (2 * self.r + 3 * self.rank)
        return self._is_dense() or size * (2 * self.r + 3 * self.rank) + n * size < apart

    def penalty(self) -> Tensor | None:
        if not self.config.reg_multiplier:
            return None
        moved = self.a * self.S[: self.r] + self.b - self.S[: self.r]
        return self.config.reg_multiplier * (torch.linalg.vector_norm(moved) + product_norm(self.X, self.Y))

    def count(self) -> int:
        return 2 * self.r + 2 * self.rank * self.rest

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        return {"a": Group(weight_decay=0.0)}


def product_norm(x: Tensor, y: Tensor) -> Tensor:
    """‖X·Y‖_F from the Gram matrices of X (m × l) and Y (l × m), without the m × m product; gradient 0 where it is 0.

    >>> product_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]])).item()
    10.0
    """
    x, y = x.double(), y.double()  # a product far smaller than its factors is a difference of large numbers
    square = ((x.mT @ x) * (y @ y.mT)).sum()
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
