"""PELA: a low-rank model learns again what each block of the whole one passes on, no weight far from where it was.

Yangyang Guo, Guangzhi Wang, Mohan Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
CVPR 2024, arXiv 2310.10700.

    start: W → B·A,  A = Σ_r^½·V_rᵀ (r × in),  B = U_r·Σ_r^½ (out × r),  r = ⌊keep·in·out/(in + out)⌋
    loss = task + α·L_feat + β·L_logit + γ·L_pert
    L_feat  = mean over blocks l, tokens and width of (f_S^l − f_T^l)²
    L_logit = mean over tokens and classes of (z_S − z_T)²
    L_pert  = mean over layers of (max_ij |B·A − W|_ij − eps)²

The authors' compression ratio c is 1/keep. The maximum is over single elements, so its gradient is in one row of B and
one column of A a layer. S is all trained, T is the whole model, frozen.

The authors' scripts differ: DeiT's has γ = 0 and eps = 1e-3, Swin's γ = 1 and eps = 0, ALBEF's α = 0.1, γ = 1 and
eps = 1e-3. The defaults here are α = 1, γ = 1, eps = 1e-3, with which the paper's last term takes part. They distil on
the tokens of images; here those that predict a label count, or all that are no padding where labels are of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from weft.compress._config import LowRankConfig
from weft.compress._distil import Objective, Seen
from weft.compress._factoriser import LowRankFactoriser
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear.low_rank import LowRank
from weft.registry import Card

CARD = Card(
    title="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
    arxiv="2310.10700",
    year=2024,
    summary="low rank, then training that keeps each block's output and each weight near the whole model's",
    knob="keep",
    recipe={"learning_rate": 1e-4, "weight_decay": 0.02, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    limitations="It trains the whole model, beside a frozen copy of it. Without training it is svd.",
)


@dataclass
class PelaConfig(LowRankConfig):
    """Options of PELA."""

    alpha: float = field(default=1.0, metadata={"help": "α, the weight of what blocks pass on"})
    beta: float = field(default=0.0, metadata={"help": "β, the weight of logits"})
    gamma: float = field(default=1.0, metadata={"help": "γ, the weight of the largest change of a weight"})
    eps: float = field(default=1e-3, metadata={"help": "how far a weight may move for nothing"})

    def validate(self) -> None:
        super().validate()
        for name in ("alpha", "beta", "gamma", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a number of at least 0")


class PelaFactoriser(LowRankFactoriser[PelaConfig]):
    """‖W − BA‖_F, unweighted."""


class PelaObjective(Objective[PelaConfig]):
    """L_feat, L_logit and L_pert."""

    def __init__(self, config: PelaConfig, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        self.reads_blocks = config.alpha > 0
        self.reads_teacher = config.alpha > 0 or config.beta > 0
        self.layers = [
            (layer, Layer(name, teacher.get_submodule(name), "").wide)
            for name, layer in student.named_modules()
            if isinstance(layer, LowRank)
        ]

    def terms(self, student: Seen, teacher: Seen) -> list[Tensor]:
        found = []
        if self.config.alpha:
            each = [distance(a, b) for a, b in zip(student.blocks, teacher.blocks, strict=True)]
            found.append(self.config.alpha * torch.stack(each).mean(0))
        if self.config.beta:
            found.append(self.config.beta * distance(student.logits, teacher.logits))
        return found

    def penalty(self) -> Tensor | None:
        if not (self.config.gamma and self.layers):
            return None
        each = [(largest_change(layer, w) - self.config.eps).square() for layer, w in self.layers]
        return self.config.gamma * torch.stack(each).mean()


def distance(own: Tensor, other: Tensor) -> Tensor:
    """The mean squared difference over the last dimension, in float32 at least."""
    wide = torch.promote_types(own.dtype, torch.float32)
    return (own.to(wide) - other.to(wide)).square().mean(-1)


def largest_change(layer: LowRank, w: Tensor) -> Tensor:
    """max_ij |B·A − W|_ij, a function of the one row of B and column of A in which it is."""
    up, down = layer.up.weight, layer.down.weight
    with torch.no_grad():
        i, j = divmod(int((up.to(w) @ down.to(w) - w).abs().argmax()), w.shape[1])
    return (up[i].to(w) @ down[:, j].to(w) - w[i, j]).abs()
