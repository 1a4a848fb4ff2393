"""SLTrain: each weight is a low-rank matrix plus a few entries at random places, trained so from the first step.

Andi Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
NeurIPS 2024, arXiv 2406.02214.

    W = (α/r)·B·A + S       A: r × in,  B: out × r,  S: out × in with ⌊δ·out·in⌋ values v at places that never change

A and v start uniform in ±1/√in, B at 0, so that at first W = S; places are drawn for each layer by (seed, its name),
and so are the same in all processes. δ is `sp_ratio`, α `lora_alpha`; the authors' α/r falls with size, 1/4 for 60M,
1/16 for 130M and 350M, 1/64 for 1B, and LoRA's 2 is far too much. `trainable_scaling` has tanh of a number that starts
at 1 in place of α/r.

start="weights" begins at a trained model instead: (α/r)·B·A is the nearest to W of rank r, and v what is left at S's
places. Neither W nor its gradient is kept between the passes: see `weft.linear.low_rank_plus_scattered`.

Trained: r·(in + out) + ⌊δ·out·in⌋ numbers a layer, and Adam's two moments of those alone. A linear map: `weft export
--to dense` writes the stock model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.linear.low_rank_plus_scattered import LowRankPlusScattered
from weft.pretrain._config import PretrainConfig
from weft.registry import Card

CARD = Card(
    title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    arxiv="2406.02214",
    year=2024,
    summary="weights of low rank plus entries at random places, from the first step of pretraining",
    knob="rank",
    recipe={"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="Writing W out costs 2·r·in·out operations a pass: with few tokens a step it is slower than dense.",
)


@dataclass
class SltrainConfig(PretrainConfig):
    """Options of SLTrain."""

    rank: int = field(default=128, metadata={"help": "r of the low-rank part"})
    sp_ratio: float = field(default=0.03, metadata={"help": "δ, share of a weight's entries in the sparse part"})
    lora_alpha: float = field(default=32, metadata={"help": "α: the low-rank part is multiplied by α/r"})
    trainable_scaling: bool = field(default=False, metadata={"help": "learn that factor, as the tanh of a number"})
    start: Literal["random", "weights"] = field(
        default="random", metadata={"help": "begin at random, or near the weights that the model has"}
    )

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.sp_ratio <= 1:
            raise UsageError(f"sp_ratio={self.sp_ratio!r} must be a share, 0 to 1")
        if not 0 < self.lora_alpha < math.inf:
            raise UsageError(f"lora_alpha={self.lora_alpha!r} must be above 0")
        if self.start not in ("random", "weights"):
            raise UsageError(f"start={self.start!r} must be random or weights")


def spec(config: SltrainConfig, out: int, in_: int) -> dict[str, Any]:
    """What config.json says of a layer of this size."""
    return {
        "kind": LowRankPlusScattered.kind,
        "rank": config.rank,
        "nonzeros": math.floor(config.sp_ratio * out * in_),
        "scale": None if config.trainable_scaling else config.lora_alpha / config.rank,
    }


def start(config: SltrainConfig, layer: LowRankPlusScattered, weight: Tensor, source: torch.Generator) -> None:
    """Give the layer its places and its first values."""
    layer.draw_places(source)
    if config.start == "weights":
        layer.fit(weight)
        return
    bound = 1 / math.sqrt(layer.in_features)
    for p in (layer.down.weight, layer.values):
        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=source))
    layer.up.weight.zero_()
    if layer.gate is not None:
        layer.gate.fill_(1)
