"""SVFit: only the largest singular values of W are trained.

Chengwei Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", 2024,
arXiv 2409.05926.

    W = U·diag(S)·Vᵀ,   B = U_r: out × r,  A = V_rᵀ: r × in        frozen
    y = x·Wᵀ + ((x·Aᵀ) ∘ (σ − S_r))·Bᵀ                            σ: r, trained from S_r on

This is the paper's (W − B·diag(S_r)·A) + B·diag(σ)·A with W left as it is: the start is exactly W in any dtype, and
adapters can be switched off. σ is unconstrained (it may change sign or order) and has no scale. Weight decay would pull
W itself to zero, so σ has a parameter group without it.

`r=None` takes for every weight the smallest r whose singular values hold `energy` of Σ S². Query, key and value of a
fused projection are decomposed each for itself. `svd="sketch"` finds the factors by a randomised range finder: ΔW is
zero at the start all the same, but the directions are only nearly those of W.

A step multiplies 2·n·r·(in + out) for n input vectors beside the layer's own, a LoRA of rank ρ 3·n·ρ·(in + out). Where
r is large W + ΔW is multiplied once instead, for 2·out·in·r + n·out·in: at width 1024 and 4096 tokens with all values,
a step costs 1.4 times one of LoRA of rank 8, layer included (benchmarks/adapters.py).

B, A and S are saved, because another machine or number of threads may find other vectors (those of equal singular
values are not even unique). `store_factors=False` saves σ alone and factorises again when loading: it accepts only the
very weights that were trained on, and outputs may differ in the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import Group, Site
from weft.adapters._derived import DerivedDelta
from weft.algebra.random import generator
from weft.algebra.svd import svd_sketch, svd_top
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    arxiv="2409.05926",
    year=2024,
    summary="trains only the largest singular values of each weight; singular vectors stay as they are",
    recipe={"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    limitations=(
        "The frozen factors take r·(in + out) numbers a weight in memory, and in the file unless store_factors=False. "
        "On a model without weights the energy rule counts every singular value."
    ),
    reasons={
        "file": "A, B and S: another machine or number of threads may find other singular vectors of the same weight"
    },
)


@dataclass
class SvfitConfig(AdapterConfig):
    """Options of SVFit."""

    r: int | None = field(default=None, metadata={"help": "singular values to train; by `energy` if not given"})
    energy: float = field(
        default=0.99, metadata={"help": "share of Σ S² that the trained values hold, where r is not given"}
    )
    svd: str = field(default="exact", metadata={"help": "exact, or sketch (randomised; faster where r is small)"})
    store_factors: bool = field(
        default=True, metadata={"help": "save the singular vectors; without, they are found again when loading"}
    )
    split_qkv: bool = field(
        default=True, metadata={"help": "decompose query, key and value of a fused projection each for itself"}
    )

    def validate(self) -> None:
        super().validate()
        if not 0 < self.energy <= 1:
            raise UsageError(f"energy={self.energy!r}: a share above 0, at most 1")
        if self.svd not in ("exact", "sketch"):
            raise UsageError(f"svd={self.svd!r}: use exact or sketch")
        if self.svd == "sketch" and self.r is None:
            raise UsageError("svd='sketch' finds a given number of singular values: set r")


class SvfitDelta(DerivedDelta):
    """ΔW = B·diag(σ − S)·A."""

    config: SvfitConfig
    S: Tensor

    def __init__(self, config: SvfitConfig, site: Site) -> None:
        super().__init__(config, site)
        b, s, a = self._factorise(config, site)
        self.r = len(s)
        self.freeze_factors(b, a, saved=config.store_factors)
        self.register_buffer("S", s.float(), persistent=config.store_factors)
        self.sigma = nn.Parameter(self.S.clone())

    def _factorise(self, config: SvfitConfig, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        r = site.rank if site.rank is not None else config.r
        if r is not None:
            site.check_rank(r)
        w = self.weight_to_factorise(config, site)
        if w is None:
            r = r or min(site.out, site.in_)
            return site.empty(site.out, r), site.empty(r), site.empty(r, site.in_)
        if config.svd == "sketch" and r is not None:
            return svd_sketch(w, r, oversample=8, power=2, generator=generator("svfit", site.name))
        return svd_top(w, r, energy=config.energy)

    def core(self) -> Tensor:
        return self.sigma - self.S

    def count(self) -> int:
        return self.r

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        return {"sigma": Group(weight_decay=0.0)}
