"""DyLoRA: one LoRA trained for every smaller rank.

Mojtaba Valipour et al., "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", EACL 2023, arXiv 2210.07558.

    y = x·Wᵀ + (α / b)·(x·A_bᵀ)·B_bᵀ        A: r × in,  B: out × r;  A_b its first b rows, B_b its first b columns

A is Kaiming-uniform, B zero, so ΔW = 0 at every rank. One b is drawn per optimiser step, a function of (seed, step), so
that layers, micro-batches, recomputed forwards and the processes of a distributed run agree. The first components take
part in every draw, which orders them by importance. In evaluation nothing is drawn: the rank is `eval_rank`, which
`set_rank(model, b)` changes; merging, saving and exporting mean that rank too, and a plain LoRA of rank b is exact.

frozen (the authors' default): components below b take part in the forward pass and x's gradient passes through all b of
    them, but only row b of A and column b of B receive a gradient. The others have a gradient of zero and not none, so
    AdamW decays them and moves them by stale momentum, as in the authors' code; `strict` holds them wholly still.
rank_distribution: "uniform" over r_min..r, or "geometric": p(b) ∝ (1 − geometric_p)^(b − r_min).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Site, leaves
from weft.adapters._gated import GatedDelta
from weft.algebra.random import generator
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
    arxiv="2210.07558",
    year=2023,
    summary="one LoRA trained for every smaller rank: cut it to any rank afterwards, with no further training",
    recipe={"learning_rate": 4e-4, "weight_decay": 0.1, "warmup_ratio": 0.06, "lr_scheduler_type": "linear"},
    warm_steps=38,
    limitations=(
        "At the full rank it is a little worse than a LoRA of that rank, and each component is trained in one step of "
        "r: allow more steps than for LoRA."
    ),
    reasons={
        "warm_steps": "A component learns only in steps that draw its rank, and its row of A only once its column of B "
        "has moved: every rank must be drawn twice, which for r = 8 and seed 0 has happened after 38 steps."
    },
)


@dataclass
class DyloraConfig(AdapterConfig):
    """Options of DyLoRA."""

    r: int = field(default=8, metadata={"help": "the largest rank"})
    lora_alpha: float = field(default=16.0, metadata={"help": "α; ΔW is scaled by α / b, with b the rank in force"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    r_min: int = field(default=1, metadata={"help": "the smallest rank that is drawn"})
    rank_distribution: Literal["uniform", "geometric"] = field(
        default="uniform", metadata={"help": "law of the drawn rank: uniform or geometric (small ranks more often)"}
    )
    geometric_p: float = field(default=0.15, metadata={"help": "p(b) is proportional to (1 − geometric_p)^b"})
    frozen: bool = field(default=True, metadata={"help": "train only the last of the components in force"})
    strict: bool = field(
        default=False, metadata={"help": "hold components without gradient still: no decay, no momentum"}
    )
    seed: int = field(default=0, metadata={"help": "draws the ranks, with the number of the step"})
    eval_rank: int | None = field(
        default=None, metadata={"help": "rank for evaluation, merging and export; r if not given"}
    )

    def validate(self) -> None:
        super().validate()
        if not 1 <= self.r_min <= self.r:
            raise UsageError(f"r_min={self.r_min} is not within 1..{self.r}, the ranks of r={self.r}")
        if self.eval_rank is not None and not 1 <= self.eval_rank <= self.r:
            raise UsageError(f"eval_rank={self.eval_rank} is not within 1..{self.r}, the ranks of r={self.r}")
        if self.rank_distribution not in ("uniform", "geometric"):
            raise UsageError(f"rank_distribution={self.rank_distribution!r}: use uniform or geometric")
        if not 0 < self.geometric_p < 1:
            raise UsageError(f"geometric_p={self.geometric_p} is not a probability between 0 and 1")


def draw(config: DyloraConfig, step: int) -> int:
    """b, the rank in force during an optimiser step.

    >>> [draw(DyloraConfig(r=4), step) for step in range(6)]
    [3, 1, 2, 2, 4, 3]
    """
    keep = 1.0 if config.rank_distribution == "uniform" else 1 - config.geometric_p
    weights = keep ** torch.arange(config.r - config.r_min + 1, dtype=torch.float64)  # of r_min, r_min + 1, …, r
    source = generator(config.seed, "dylora", step)
    return config.r_min + int(torch.multinomial(weights, 1, generator=source))


class DyloraDelta(GatedDelta):
    """ΔW = (α / b)·B_b·A_b; b is a tensor, so that a compiled forward is one graph for all ranks."""

    b: Tensor
    index: Tensor

    def __init__(self, config: DyloraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.alpha, self.frozen = config.lora_alpha, config.frozen
        self.eval_rank = config.eval_rank or self.r
        self.register_buffer("b", torch.tensor(self.r, device=site.device), persistent=False)
        self.register_buffer("index", torch.arange(self.r, device=site.device), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.truncated(self.eval_rank)
        a: Tensor = self.A
        b: Tensor = self.B
        if self.frozen:
            last = self.index == self.b - 1  # (r,)
            a, b = torch.where(last[:, None], a, a.detach()), torch.where(last, b, b.detach())
        return b * self.gate(), a

    def gate(self) -> Tensor:
        scale = self.alpha / self.b.to(self.B.dtype)
        return torch.where(self.index < self.b, scale, torch.zeros_like(scale))

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """B and A of the LoRA of rank `rank` that is inside this one."""
        rank = min(rank, self.r)
        return self.B[:, :rank] * (self.alpha / rank), self.A[:rank]

    def count(self) -> int:
        return self.r * (self.in_ + self.out)

    def controller_class(self) -> type[Controller]:
        return DyloraController


class DyloraController(Controller):
    """Draws b at the start of every step, for all layers."""

    events = True

    def begin(self) -> None:
        b = draw(self.config, self.step)
        for d in self.deltas:
            d.b.fill_(b)

    def update_scales(self) -> dict[Tensor, Tensor]:
        if not self.config.strict:
            return {}
        scales = {}
        for d in self.deltas:
            trained = (d.index == d.b - 1 if d.frozen else d.index < d.b).to(d.A.dtype)
            scales[d.A], scales[d.B] = trained[:, None], trained
        return scales


def set_rank(model: nn.Module, rank: int, adapter_name: str = "default") -> None:
    """Evaluate, merge, save and export the adapter at this rank from now on. Training draws ranks as before.

    Raises UsageError where the rank is outside 1..r, or the adapter is merged: the old rank would stay in the weights.
    """
    tuned: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layers = [m for m in tuned if adapter_name in getattr(m, "deltas", ())]
    deltas: list[Any] = [d for m in layers for d in leaves(m.deltas[adapter_name]) if isinstance(d, DyloraDelta)]
    if not deltas:
        raise UsageError(f"the model has no DyLoRA adapter called {adapter_name!r}")
    if not 1 <= rank <= deltas[0].r:
        raise UsageError(f"rank {rank} is not within 1..{deltas[0].r}, the ranks of this adapter")
    if any(adapter_name in m.merged_adapters for m in layers):
        raise UsageError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before changing its rank")
    for d in deltas:
        d.eval_rank = d.config.eval_rank = rank
