"""Plain low rank: each weight is the product of two thin matrices, trained so from the first step.

Mikhail Khodak et al., "Initialization and Regularization of Factorized Neural Layers", ICLR 2021, arXiv 2105.01029.

    W = B·A         A: r × in,  B: out × r

It is what other parametrisations are compared with. The start is the paper's spectral one: B·A is the nearest of rank r
to the weight that stood there, trained or as the model drew it, √Σ in each factor. (With B at 0, as in LoRA, a gated
MLP would have no gradient at all.) The paper's Frobenius decay, of B·A instead of its factors, is no part of it.

Trained: r·(in + out) numbers a layer. A linear map: `weft export --to dense` writes the stock model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.linear.low_rank import LowRank
from weft.pretrain._config import PretrainConfig
from weft.registry import Card

CARD = Card(
    title="Initialization and Regularization of Factorized Neural Layers",
    arxiv="2105.01029",
    year=2021,
    summary="weights as products of two thin matrices, started at the nearest to what the model has",
    knob="rank",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="Weights of low rank from the first step to the last learn less than full ones; a yardstick.",
)


@dataclass
class LowrankConfig(PretrainConfig):
    """Options of plain low rank."""

    rank: int = field(default=128, metadata={"help": "r of each weight"})


def spec(config: LowrankConfig, out: int, in_: int) -> dict[str, Any]:
    """What config.json says of a layer of this size."""
    return {"kind": LowRank.kind, "rank": config.rank}


def start(config: LowrankConfig, layer: LowRank, weight: Tensor, source: torch.Generator) -> None:
    """Come as near to the weight as the rank allows."""
    near = LowRank.from_dense(weight, rank=config.rank)
    layer.up.weight.copy_(near.up.weight)
    layer.down.weight.copy_(near.down.weight)
