"""ReLoRA: a low-rank update is trained, added to the weight and started anew, again and again.

Vladislav Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695.

    y = x·Wᵀ + (α/r)·(x·Aᵀ)·Bᵀ          W: out × in, at rest;  A: r × in,  B: out × r, trained
    after every `relora_steps` optimiser steps:     W ← W + (α/r)·B·A,  B ← 0,  A drawn anew

So each cycle adds what may have rank r, and n cycles n·r. A is uniform in ±1/√in, drawn for each layer by (seed, step,
its name), and so the same in all processes. Nothing else of the model is replaced, and all of it is trained throughout.

At a merge `reset_share` of the entries of the factors' moments become zero, the smallest ones; 1 forgets them all, the
authors' other choice. The authors take the smallest of each moment by itself. An entry could then keep Adam's first
moment and lose the second, and would be divided by ε alone, since A has no gradient while B is 0: here an entry keeps
all of its moments or none, and a few more than that share are reset. Adam's count of steps goes on, so that under
constant gradients its steps after a reset are up to 6.6 times too long (β of 0.9 and 0.999), which the warm-up is for.
An optimiser whose moments are not of the factor's shape is refused.

The jagged schedule of the paper is the run's own, times min(1, k / restart_warmup) on the k-th step of A and B after a
merge (weight decay included). The other parameters, whose moments are not reset, follow the run's schedule alone; in
the authors' code all of them warm up anew, from 0.

The authors train without factors for the first 5,000 of 20,000 steps: to start warm as they do, give a model so
trained. Trained: r·(in + out) numbers a layer, with Adam's two moments of those alone; W is stored besides. A linear
map: `weft export --to dense` writes the stock model. One that was saved and loaded trains A and B and merges no more:
make it dense and reparametrise it again.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.algebra.random import generator
from weft.errors import UsageError
from weft.linear.dense_plus_low_rank import DensePlusLowRank
from weft.pretrain._config import PretrainConfig
from weft.pretrain._moments import moments_of
from weft.registry import Card
from weft.steps import Controller

LOGGER = logging.getLogger(__name__)

CARD = Card(
    title="ReLoRA: High-Rank Training Through Low-Rank Updates",
    arxiv="2307.05695",
    year=2024,
    summary="low-rank updates that are added to the weights and started anew, so that their sum has a high rank",
    knob="rank",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.025, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="It wants a model that full training has warmed up; the authors give a quarter of the run to that.",
)


@dataclass
class ReloraConfig(PretrainConfig):
    """Options of ReLoRA."""

    rank: int = field(default=128, metadata={"help": "r of each update"})
    lora_alpha: float = field(default=32, metadata={"help": "α: the update is multiplied by α/r"})
    relora_steps: int = field(default=5000, metadata={"help": "optimiser steps from one merge to the next"})
    restart_warmup: int = field(default=100, metadata={"help": "steps in which A and B warm up again after a merge"})
    reset_share: float = field(default=0.99, metadata={"help": "share of the factors' moments that a merge sets to 0"})

    def validate(self) -> None:
        super().validate()
        if not 0 < self.lora_alpha < math.inf:
            raise UsageError(f"lora_alpha={self.lora_alpha!r} must be above 0")
        if self.relora_steps < 1:
            raise UsageError(f"relora_steps={self.relora_steps!r} must be at least 1")
        if not 0 <= self.restart_warmup <= self.relora_steps:
            raise UsageError(
                f"restart_warmup={self.restart_warmup!r} must lie in 0 to relora_steps={self.relora_steps}, "
                "so that it ends before the next merge"
            )
        if not 0 <= self.reset_share <= 1:
            raise UsageError(f"reset_share={self.reset_share!r} must be a share, 0 to 1")


def spec(config: ReloraConfig, out: int, in_: int) -> dict[str, Any]:
    """What config.json says of a layer of this size."""
    return {"kind": DensePlusLowRank.kind, "rank": config.rank, "scale": config.lora_alpha / config.rank}


def start(config: ReloraConfig, layer: DensePlusLowRank, weight: Tensor, source: torch.Generator) -> None:
    """Begin at the weight itself."""
    layer.base.copy_(weight)
    layer.up.weight.zero_()
    draw(layer, source)


def draw(layer: DensePlusLowRank, source: torch.Generator) -> None:
    """Give the layer another A."""
    bound = 1 / math.sqrt(layer.in_features)
    down = layer.down.weight
    down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=source))


class ReloraController(Controller):
    """Merges every `relora_steps` steps, and holds the steps back that follow."""

    events = True

    def check(self, optimizer: Optimizer) -> None:
        if self.total_steps is not None and self.total_steps <= self.config.relora_steps:
            LOGGER.warning(
                "relora_steps=%d in a run of %d steps: the update is never started anew, and its rank stays %d",
                self.config.relora_steps, self.total_steps, self.config.rank,
            )  # fmt: skip

    def merging(self) -> bool:
        """Whether the step under way is the last of its cycle."""
        return (self.step + 1) % self.config.relora_steps == 0

    def factors(self) -> list[Tensor]:
        """A and B of all layers."""
        return [p for layer in self.parts for p in (layer.down.weight, layer.up.weight)]

    def update_scales(self) -> dict[Tensor, Tensor]:
        cycle, before = divmod(self.step, self.config.relora_steps)
        if cycle == 0 or before + 1 >= self.config.restart_warmup:
            return {}
        return {p: p.new_tensor((before + 1) / self.config.restart_warmup) for p in self.factors()}

    def after_step(self) -> None:
        if self.merging():
            for layer in self.parts:
                layer.absorb()
                draw(layer, generator(self.config.seed, self.step + 1, layer.name))

    def finished(self, optimizer: Optimizer | None) -> None:
        merging, share = self.merging(), self.config.reset_share
        super().finished(optimizer)
        if share and (merging or self.step == 1):  # what cannot be reset is told in the first step
            for p in self.factors():
                moments = moments_of(optimizer, p, "relora", ", or set reset_share=0")
                if merging:
                    prune(moments, share)


@torch.no_grad()
def prune(moments: list[Tensor], share: float) -> None:
    """Set moments of one shape to 0 at the places where any of them is among its smallest `share`, in place."""
    if not moments:
        return
    kept = torch.ones_like(moments[0], dtype=torch.bool)
    for moment in moments:
        size = moment.abs()
        smallest = round(share * size.numel())
        if smallest:
            kept &= size > size.flatten().sort().values[smallest - 1]
    for moment in moments:
        moment.masked_fill_(~kept, 0)
