"""WeLore: one threshold on normalised singular values gives every weight its own rank; only the low-rank ones train.

Ajay Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
arXiv 2407.11239.

    z_i = (σ_i − σ_d)/(σ_1 − σ_d),  d = min(out, in),  k = #{i : z_i ≥ T}    →    y = B(Ax) + b,  BA = U_k·Σ_k·V_kᵀ

T is one number for the whole model, so weights with a heavy tail lose most. A weight of which more than `min_ratio` of
the rank is cut is a low-rank component and becomes two factors; any other stays dense. It needs no data.

T is found for `keep`, the stored bits, as in every method here, or for `err`, the paper's effective rank reduction
Σ cut / Σ d over all weights: T is then the quantile of all z, exact to one singular value. ERR counts ranks, and also
those of weights that stay dense, so the stored bits fall by less. Comparisons are strict as in the paper: cut where
z < T, low-rank where more than min_ratio is cut. (The paper's compress-only script has min_ratio 0, with which a matrix
that lost a tenth of its rank is stored larger than before; here the guard keeps such matrices dense.)

`train_low_rank(model)` leaves trainable what the paper fine-tunes: the factors, and the gains of norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from weft.compress._allocate import Menus, Sizes, normalised
from weft.compress._config import LowRankConfig
from weft.compress._factoriser import LowRankFactoriser
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear.low_rank import LowRank
from weft.registry import Card

CARD = Card(
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    arxiv="2407.11239",
    year=2024,
    summary="one threshold on normalised singular values sets every weight's rank; flat spectra stay dense",
    knob="keep",
)


@dataclass
class WeloreConfig(LowRankConfig):
    """Options of WeLore."""

    allocate: Literal["uniform", "energy", "water", "threshold", "block_influence", "sweep"] = field(
        default="threshold", metadata={"help": "who gets how much; the threshold is the paper's"}
    )
    min_ratio: float = field(
        default=0.4999, metadata={"help": "a weight becomes two factors where more than this share of its rank is cut"}
    )
    err: float | None = field(
        default=None, metadata={"help": "share of all ranks to cut, the paper's ERR, in place of keep"}
    )

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.min_ratio < 1:
            raise UsageError(f"min_ratio={self.min_ratio!r}: a share of the rank, at least 0 and below 1")
        if self.err is not None and not (0 < self.err < 1 and self.allocate == "threshold"):
            raise UsageError(f"err={self.err!r}: a share between 0 and 1, which allocate='threshold' reaches")


class WeloreFactoriser(LowRankFactoriser[WeloreConfig]):
    """‖W − BA‖_F at the rank that the threshold leaves."""

    def sizes(self, layer: Layer) -> Sequence[int]:
        d = min(layer.out, layer.in_)
        low = [k for k in super().sizes(layer) if (d - k) / d > self.config.min_ratio]
        return low if self.config.guard else super().sizes(layer)

    def allocate(self, menus: Menus) -> Sizes:
        if self.config.err is None:
            return super().allocate(menus)
        z = {name: normalised(menu.values) for name, menu in menus.items() if menu.values is not None}
        every = torch.cat(list(z.values())).sort().values
        cut = every[int(self.config.err * len(every))]
        kept = {name: max(int((own >= cut).sum()), 1) for name, own in z.items()}
        return {
            name: menu.sizes.index(kept[name]) if kept[name] in menu.sizes else None for name, menu in menus.items()
        }


def train_low_rank(model: nn.Module) -> nn.Module:
    """Freeze all but the low-rank components and the gains of norms; returns the model."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LowRank) or "norm" in type(module).__name__.lower():
            module.requires_grad_(True)
    return model
