"""LoLDU: only the diagonal of W's LDU factorisation is trained.

Yiming Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
2024, arXiv 2410.13618.

    W = P·L·diag(D)·U           partial pivoting;  L: out × k unit lower,  U: k × in unit upper,  k = min(out, in)
    B = (P·L)_{:, :r}: out × r,  A = U_{:r}: r × in                 frozen; P is folded into B
    y = x·Wᵀ + s·((x·Aᵀ) ∘ (z − D_r))·Bᵀ,   s = α / r               z: r, trained from D_r on

This is the paper's (W − s·B·diag(D_r)·A) + s·B·diag(z)·A with W left as it is: the start is exactly W in any dtype. The
authors' code offers other starts for z (constants, uniform and normal draws) but subtracts D_r all the same, so that
each perturbs the model by s·B·diag(z − D_r)·A before the first step; only "lu" is offered here. z is unconstrained.
Weight decay would pull W itself to zero, so z has a parameter group without it.

`r=None` takes all k pivots, as the paper's 768 does on base models. A smaller r takes the first r, and the order of
pivots is not one of size. L and U are not orthogonal, whatever the abstract says: with α = 1 and all pivots, z_i + 1
moves W by ‖B_i‖·‖A_i‖ / k, where the norms' product is between 1 and 200 in a Gaussian 1024 × 1024 matrix and far above
in one that is nearly singular, so clip gradients. Adam's steps do not see s, which is what keeps them small: 10⁻² on
every z moves such a W of deviation 0.03 by 8·10⁻⁴ of its size with s = 1 / k and by 80 % with s = 1. With another α or
a smaller r, scale the learning rate by 1 / s.

A pivot below a millionth of the largest entry of diag(D)·U counts as zero: its row of U becomes a unit vector and its
entry of D zero, from where z can learn; W is not touched.

The r first columns of W are eliminated, and the rest of U follows by substitution: out·r² + r²·(in − r) multiplications
(in float64), once. A step multiplies 2·n·r·(in + out) for n input vectors beside the layer's own, a LoRA of rank ρ
3·n·ρ·(in + out). Where r is large W + ΔW is multiplied once instead, for 2·out·in·r + n·out·in: at width 1024 and 4096
tokens with all pivots, a step costs 1.4 times one of LoRA of rank 8, layer included (benchmarks/adapters.py).

B, A and D are saved, because another library or number of threads may pivot otherwise where candidates are tied or
nearly so: r·(in + out + 1) numbers, for all pivots up to twice the weight. `store_factors=False` saves z alone and
factorises again when loading: it accepts only the very weights that were trained on, and outputs may differ in the last
bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import Group, Site
from weft.adapters._derived import DerivedDelta
from weft.registry import Card

CARD = Card(
    title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    arxiv="2410.13618",
    year=2024,
    summary="trains the pivots of each weight's LU decomposition: one number a component, all else frozen",
    recipe={"learning_rate": 1e-2, "weight_decay": 0.0},
    limitations=(
        "The frozen factors take r·(in + out) numbers a weight in memory, and in the file unless store_factors=False. "
        "With all pivots an exact LoRA export is as large as the weights: merge instead."
    ),
    reasons={"file": "A, B and D: another library or number of threads may pivot the same weight otherwise"},
)

FLOOR = 1e-6  # of the largest entry of diag(D)·U; a smaller pivot is noise, and dividing by it would be too


@dataclass
class LolduConfig(AdapterConfig):
    """Options of LoLDU."""

    r: int | None = field(default=None, metadata={"help": "pivots to train, from the first on; all if not given"})
    lora_alpha: float = field(default=1.0, metadata={"help": "α; ΔW is scaled by α / r"})
    store_factors: bool = field(
        default=True, metadata={"help": "save the triangular factors; without, they are found again when loading"}
    )


class LolduDelta(DerivedDelta):
    """ΔW = s·B·diag(z − D)·A."""

    config: LolduConfig
    D: Tensor

    def __init__(self, config: LolduConfig, site: Site) -> None:
        super().__init__(config, site)
        r = self.r = site.check_rank(site.rank or config.r or min(site.out, site.in_))
        self.scale = config.lora_alpha / r
        w = self.weight_to_factorise(config, site)
        b, d, a = ldu(w, r) if w is not None else (site.empty(site.out, r), site.empty(r), site.empty(r, site.in_))
        self.freeze_factors(b, a, saved=config.store_factors)
        self.register_buffer("D", d.float(), persistent=config.store_factors)
        self.z = nn.Parameter(self.D.clone())

    def core(self) -> Tensor:
        return self.scale * (self.z - self.D)

    def count(self) -> int:
        return self.r

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        return {"z": Group(weight_decay=0.0)}


def ldu(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first r components of w = P·L·diag(D)·U by partial pivoting: (P·L): out × r, D: (r,), U: r × in; float64.

    Pivots that are zero up to rounding become zeros of D, with a unit vector as row of U.

    >>> b, d, a = ldu(torch.tensor([[1.0, 2.0], [4.0, 4.0]]), 2)
    >>> b, d, a
    (tensor([[0.2500, 1.0000],
            [1.0000, 0.0000]], dtype=torch.float64), tensor([4., 1.], dtype=torch.float64), tensor([[1., 1.],
            [0., 1.]], dtype=torch.float64))
    """
    w = w.double()
    packed, pivots, _ = torch.linalg.lu_factor_ex(w[:, :r])  # later columns do not decide on the first r pivots
    order = list(range(len(w)))
    for i, j in enumerate((pivots - 1).tolist()):  # LAPACK's swaps, one after another
        order[i], order[j] = order[j], order[i]
    lower = packed.tril(-1)
    lower.diagonal().fill_(1)
    top = lower[:r]
    rest = torch.linalg.solve_triangular(top, w[order[:r], r:], upper=False, unitriangular=True)
    upper = torch.cat([packed[:r].triu(), rest], dim=1)  # diag(D)·U
    d = upper.diagonal().clone()
    zero = d.abs() <= FLOOR * upper.abs().max()
    u = torch.where(zero[:, None], torch.eye(*upper.shape).to(upper), upper / torch.where(zero, 1.0, d)[:, None])
    b = torch.empty_like(lower)
    b[order] = lower
    return b, d.masked_fill(zero, 0), u
