"""SoRA: LoRA whose components carry a gate that a proximal step drives to exact zeros.

Ning Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696.

    y = x·Wᵀ + s·((x·Aᵀ) ∘ g)·Bᵀ,   s = α / r        A: r × in,  B: out × r,  g: r
    after every optimiser step:      g ← sign(g)·max(|g| − t, 0)

A is Kaiming-uniform, B zero, g standard normal, so ΔW = 0 at the start. The objective carries λ₁·mean|g| over all gates
of the model. The gate is stepped by Adam (eps 1e-6, no weight decay) in a parameter group of its own. Components with
a zero gate get no gradient through A and B but may revive through g; they are dropped when the adapter is saved, with
s kept.

The threshold t is not multiplied by the learning rate: over N steps a gate shrinks by N·t, so tune t to the run's
length. With `threshold_levels` above 1 the run has that many stages of `stage_steps` steps: the first uses
`sparse_lambda_2`, the last `max_lambda`, and the learning-rate schedule starts anew in each (in the authors' code it
stays exhausted at zero).
`prox="reference"` is the authors' operator: entries between t and 2t become zero too, and |g| = t is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._controller import Controller
from weft.adapters._delta import Group, Site
from weft.adapters._gated import PrunedDelta
from weft.algebra.prox import levels
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="Sparse Low-rank Adaptation of Pre-trained Language Models",
    arxiv="2311.11696",
    year=2023,
    summary="LoRA with a gate per component that a proximal step drives to exact zeros: the rank is learned per layer",
    recipe={
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "warmup_ratio": 0.06,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "linear",
    },
    limitations="The threshold is per step and not scaled by the learning rate: tune it to the number of steps.",
)


@dataclass
class SoraConfig(AdapterConfig):
    """Options of SoRA."""

    r: int = field(default=8, metadata={"help": "r_max, the components a layer starts with"})
    lora_alpha: float = field(default=16.0, metadata={"help": "α; ΔW is scaled by α / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    sparse_lambda: float = field(default=1e-3, metadata={"help": "λ₁, coefficient of the mean |g| in the objective"})
    sparse_lambda_2: float = field(
        default=3e-4, metadata={"help": "threshold t of the proximal step (first stage)", "short": 0.03}
    )
    sparse_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the gates; the run's if not given"}
    )
    threshold_levels: int = field(
        default=1, metadata={"help": "stages with thresholds from sparse_lambda_2 to max_lambda", "short": 2}
    )
    max_lambda: float = field(default=7e-4, metadata={"help": "threshold of the last stage", "short": 0.05})
    level_spacing: str = field(default="linear", metadata={"help": "linear, log_linear or exp_linear"})
    stage_steps: int | None = field(
        default=None, metadata={"help": "optimiser steps a stage; needed for several stages", "short": 6}
    )
    prox: str = field(default="soft", metadata={"help": "soft (the paper's operator) or reference (the authors' code)"})

    def validate(self) -> None:
        super().validate()
        if self.prox not in ("soft", "reference"):
            raise UsageError(f"prox={self.prox!r}: use soft or reference")
        if self.threshold_levels < 1 or (self.threshold_levels > 1 and not self.stage_steps):
            raise UsageError("threshold_levels above 1 needs stage_steps, the optimiser steps of each stage")
        try:
            self.thresholds()
        except ValueError as error:
            raise UsageError(str(error)) from None

    def thresholds(self) -> list[float]:
        """t of every stage."""
        if self.threshold_levels == 1:
            return [self.sparse_lambda_2]
        return levels(self.sparse_lambda_2, self.max_lambda, self.threshold_levels, self.level_spacing)


class SoraDelta(PrunedDelta):
    """ΔW = s·B·diag(g)·A."""

    def __init__(self, config: SoraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.scale = config.lora_alpha / config.r
        self.g = nn.Parameter(torch.randn_like(site.empty(self.r)))

    def controller_class(self) -> type[Controller]:
        return SoraController

    @classmethod
    def groups(cls, config: Any) -> dict[str, Group]:
        return {"g": Group(lr=config.sparse_lr, weight_decay=0.0, eps=1e-6)}

    @classmethod
    def stage_steps(cls, config: Any) -> int | None:
        return config.stage_steps if config.threshold_levels > 1 else None


class SoraController(Controller):
    """Applies the prox after every step and adds λ₁·mean|g|."""

    events = True

    def penalty(self) -> Tensor:
        gates = torch.cat([d.g for d in self.deltas])
        return self.config.sparse_lambda * gates.abs().mean()

    def threshold(self) -> float:
        """t in force."""
        stages = self.config.thresholds()
        return (
            stages[min(self.step // (self.config.stage_steps or 1), len(stages) - 1)] if len(stages) > 1 else stages[0]
        )

    def after_step(self) -> None:
        t = self.threshold()
        for d in self.deltas:
            d.shrink(t, self.config.prox)
