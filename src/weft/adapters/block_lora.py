"""Block-LoRA: LoRA cut into blocks that share one down-projection, so that their up-projections add up to one.

C. Zhou, Q. Shen, Z. Yu, J. Bu and H. Wang, "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based
Few-Shot Learning", 2025, arXiv 2501.16720.

    B·A = Σ_k B_k·A_k  with A_1 = … = A_n = A_s         n = n_blocks,  q = r / n
    y = x·Wᵀ + s·(x·A_sᵀ)·(B_1 + … + B_n)ᵀ,  s = α / r        A_s: q × in (the head),  B_k: out × q (the arms)

A_s is Kaiming-uniform and every arm zero, so ΔW = 0 at the start. The arms are added once per forward (r·out additions)
and multiplied as one matrix: a token costs what LoRA of rank q costs, and q·in + r·out numbers are trained instead of
r·(in + out). Dropout acts on x, one mask for all arms.

The rank of ΔW is q = r / n and not r: the arms only re-parameterise their sum. They receive the same gradient whatever
their values, so that under any optimiser that works by element they stay bit for bit alike, and their sum moves as B of
a LoRA of rank q does at n times the learning rate (and 1/n of the weight decay): compare with that LoRA before praising
the layout. For the same reason arms that start apart, adding up to zero, would change nothing, and are no option. The
scale is α over the nominal rank r: a LoRA of rank q has the same scale with α = lora_alpha / n.

The arms are blocks of columns of one tensor B (out × r), as in LoRA: column i meets row i mod q of A_s. Where n does
not divide r, q is rounded up and the last arm is narrower; there are never more than r arms.

`partition="input"` is the other reading of the abstract, which leaves the layout open (there is no public code): A is
cut along its inputs into n pieces of r × in/n that are one, so A·x is A_s applied to the sum of n slices of x, and the
rank stays r. Where n does not divide in, x counts as followed by zeros. It is multiplied as the r × in matrix that it
equals: adding the slices first would save r·in·(1 − 1/n) multiplications a token, and take a pass over x. A_s starts as
the columns of LoRA's A do, uniform in ±1/√in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import LowRankDelta, Site
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
    arxiv="2501.16720",
    year=2025,
    summary="LoRA in blocks that share one down-projection: fewer parameters, and one product for all blocks",
    recipe={"learning_rate": 2e-4, "lr_scheduler_type": "cosine"},
    limitations=(
        "The rank of ΔW is r / n_blocks. Compare with LoRA of that rank, its B learning n_blocks times as fast, which "
        "moves alike."
    ),
)


@dataclass
class BlockLoraConfig(AdapterConfig):
    """Options of Block-LoRA."""

    r: int = field(default=8, metadata={"help": "nominal rank, of all blocks together"})
    n_blocks: int = field(default=2, metadata={"help": "n, blocks that share a down-projection"})
    lora_alpha: float = field(default=16.0, metadata={"help": "α; ΔW is scaled by α / r, with r the nominal rank"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    partition: Literal["rank", "input"] = field(
        default="rank", metadata={"help": "cut A by its rank (ΔW has rank r / n) or by its input (ΔW has rank r)"}
    )

    def validate(self) -> None:
        super().validate()
        if self.n_blocks < 1:
            raise UsageError(f"n_blocks={self.n_blocks!r} must be at least 1")
        if self.partition not in ("rank", "input"):
            raise UsageError(f"partition={self.partition!r}: use rank or input")


class BlockLoraDelta(LowRankDelta):
    """ΔW = s·(Σ_k B_k)·A_s, or s·B·[A_s … A_s] where the input is partitioned."""

    def __init__(self, config: BlockLoraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r, self.n = site.check_rank(config.r), config.n_blocks
        self.scale = config.lora_alpha / self.r
        self.cuts_rank = config.partition == "rank"
        shape = (-(-self.r // self.n), site.in_) if self.cuts_rank else (self.r, -(-site.in_ // self.n))
        self.A = nn.Parameter(site.empty(*shape))
        self.B = nn.Parameter(torch.zeros_like(site.empty(site.out, self.r)))
        bound = 1 / math.sqrt(site.in_)  # Kaiming-uniform with a = √5
        nn.init.uniform_(self.A, -bound, bound)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.cuts_rank:
            return self.scale * add_arms(self.B, len(self.A)), self.A
        return self.scale * self.B, self.A.repeat(1, self.n)[:, : self.in_]

    def count(self) -> int:
        if self.cuts_rank:
            return -(-self.r // self.n) * self.in_ + self.r * self.out
        return self.r * (-(-self.in_ // self.n) + self.out)


def add_arms(b: Tensor, q: int) -> Tensor:
    """The sum of the blocks of q columns of B (out × r), out × q; the last block may be narrower.

    >>> add_arms(torch.tensor([[1.0, 2.0, 10.0, 20.0, 100.0]]), 2)
    tensor([[111.,  22.]])
    """
    missing = -b.shape[1] % q
    return nn.functional.pad(b, (0, missing)).unflatten(1, (-1, q)).sum(1)
