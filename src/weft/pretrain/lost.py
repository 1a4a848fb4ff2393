"""LOST: a bottleneck from a weight's largest singular values, and the channels that the others matter most to.

Jiaxi Li et al., "LOST: Low-rank and Sparse Pre-training for Large Language Models", 2025, arXiv 2508.02668.

    y = γ·B·σ(A·x) + (1 − γ)·W_s·x[I] + b       A: r × in,  B: out × r,  W_s: out × k

    at the start, of the dense W = Σ s_i·u_i·v_iᵀ that stood there
        A = √S_r·V_rᵀ,  B = U_r·√S_r
        W_comp = Σ_{i>r} s_i·u_i·v_iᵀ
        I = the k = round(density·in) input channels whose columns of W_comp are largest, in l2 norm or l1
        W_s = the columns I of W itself (sparse_source="weight"), or of W_comp ("residual")

then everything but I is trained, and W is gone. It begins at whatever W the model has, random or trained. The first
outputs are not W·x: the parts are weighed by γ and 1 − γ, and the chosen columns are in both. There is no α/r.

The structure is the paper's. What is not confirmed is an option: SiLU as σ, γ = 0.7 and a density of 0.03 (SLTrain's,
for as many numbers); r is about a quarter of the width. Public experiments of the first author's, which are not the
paper's code, have SiLU as an option, put the roots of S in both factors, score by l2 and take W's own columns; their
defaults are γ = 0.5 and a density of 0.05, and they score 256 singular values after r at most. Here all of W_comp is
scored, as the paper's abstract has it. The sign of a pair (u_i, v_i) is free for W and not for σ, so it is fixed: the
largest entry of each v_i is positive.

A part whose weight is 0 is not stored: γ = 1 leaves the bottleneck alone, with no channels, and γ = 0 the channels,
with rank 0. Trained: r·(in + out) + k·out numbers a layer, and as many multiplications a token. With activation="none"
it is a linear map, which `weft export --to dense` writes as the stock model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weft.algebra.svd import svd_top
from weft.errors import UsageError
from weft.linear._structured import check_rank
from weft.linear.low_rank_plus_channels import ACTIVATIONS, LowRankPlusChannels, heaviest
from weft.pretrain._config import PretrainConfig
from weft.registry import Card

CARD = Card(
    title="LOST: Low-rank and Sparse Pre-training for Large Language Models",
    arxiv="2508.02668",
    year=2025,
    summary="a bottleneck with an activation, plus the input channels that it serves worst, both from an SVD",
    knob="rank",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="With its activation a layer is no linear map: no stock model can hold it, and nothing merges into it. "
    "The paper's learning rate, γ and density are not known here; the recipe is that of plain low rank.",
)


@dataclass
class LostConfig(PretrainConfig):
    """Options of LOST."""

    rank: int = field(default=128, metadata={"help": "r of the bottleneck (unconfirmed: about a quarter of the width)"})
    gamma: float = field(default=0.7, metadata={"help": "γ, the bottleneck's weight, beside 1 − γ (unconfirmed)"})
    density: float = field(default=0.03, metadata={"help": "share of the input channels kept dense (unconfirmed)"})
    activation: Literal["silu", "gelu", "relu", "none"] = field(
        default="silu", metadata={"help": "σ in the bottleneck (silu is unconfirmed); none can be merged"}
    )
    sparse_source: Literal["weight", "residual"] = field(
        default="weight", metadata={"help": "columns of the weight itself, or of what the low rank leaves of it"}
    )
    score: Literal["l2", "l1"] = field(default="l2", metadata={"help": "norm by which channels are chosen"})

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"gamma={self.gamma!r} must be a share, 0 to 1")
        if not 0 <= self.density <= 1:
            raise UsageError(f"density={self.density!r} must be a share, 0 to 1")
        for name, known in (
            ("activation", tuple(ACTIVATIONS)),
            ("sparse_source", ("weight", "residual")),
            ("score", ("l2", "l1")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")


def spec(config: LostConfig, out: int, in_: int) -> dict[str, Any]:
    """What config.json says of a layer of this size."""
    rank, channels = check_rank(config.rank, out, in_), round(config.density * in_)
    if config.gamma == 0 and channels == 0:
        raise UsageError(f"gamma=0 and density={config.density!r} leave nothing of a matrix of {out} × {in_}")
    return {
        "kind": LowRankPlusChannels.kind,
        "rank": rank if config.gamma > 0 else 0,
        "channels": channels if config.gamma < 1 else 0,
        "gamma": config.gamma,
        "activation": config.activation,
    }


def start(config: LostConfig, layer: LowRankPlusChannels, weight: Tensor, source: torch.Generator) -> None:
    """Give the layer its channels, and its first values from the weight's singular values."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vh = svd_top(wide, config.rank)
    root = s.sqrt()
    up, down = u * root, root[:, None] * vh
    rest = wide - up @ down
    index = heaviest(rest, layer.channels, norm=2 if config.score == "l2" else 1)
    columns = (wide if config.sparse_source == "weight" else rest)[:, index]
    layer.set_parts(up[:, : layer.rank], down[: layer.rank], index, columns)
