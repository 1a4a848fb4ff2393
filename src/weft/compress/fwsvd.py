"""FWSVD: truncated SVD in which each input counts as much as the task's loss depends on it.

Yen-Chang Hsu et al., "Language model compression with weighted low-rank factorization", arXiv 2207.00112.

    f_j = Σ_i E[(∂L/∂W_ij)²],    D = diag(√f) (in × in),    W·D = U·Σ·Vᵀ    →    BA = U_r·Σ_r·V_rᵀ·D⁻¹

The empirical Fisher information of a weight is the mean square of its gradient, a sample at a time: the square of a
batch's mean gradient is another number. Σ_i makes one importance an input feature of it ("row" in the paper, whose W
is in × out; `axis="out"` sums the other way; `axis="both"` weighs entry ij by f_out·f_in, the Fisher information as if
it were of rank one). Only these sums are kept: the gradient of one layer and one sample is in memory at a time.

f is divided by its largest entry and `eps` added, so that eps means the same for a converged model, whose gradients
are tiny, as for any other; an absolute eps, as in public re-implementations, turns the method into plain SVD unseen.

It is made for a model that was fine-tuned on the task, and batches with labels; a language model without labels
predicts its text. The paper fine-tunes again after compressing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from weft.compress._calibration import Statistics
from weft.compress._config import LowRankConfig
from weft.compress._factoriser import LowRankFactoriser, Weight
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="Language model compression with weighted low-rank factorization",
    arxiv="2207.00112",
    year=2022,
    summary="truncated SVD weighted by how much the task's loss depends on each input feature (Fisher information)",
    knob="keep",
    needs=("data",),
)


@dataclass
class FwsvdConfig(LowRankConfig):
    """Options of FWSVD."""

    axis: Literal["in", "out", "both"] = field(
        default="in", metadata={"help": "what has an importance: input features (the paper), outputs, or both"}
    )
    eps: float = field(default=1e-5, metadata={"help": "added to importances whose largest is 1: guards dead inputs"})

    def validate(self) -> None:
        super().validate()
        if not self.eps >= 0:
            raise UsageError(f"eps={self.eps!r} must not be below 0")


class FwsvdFactoriser(LowRankFactoriser[FwsvdConfig]):
    """‖(W − BA)·D‖_F, D² the Fisher information of each input."""

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("fisher",)

    def weights(self, layer: Layer, statistics: Statistics) -> tuple[Weight, Weight]:
        assert statistics.fisher is not None
        f_in, f_out = (f / f.max().clamp(min=torch.finfo(f.dtype).tiny) + self.config.eps for f in statistics.fisher)
        axis = self.config.axis
        return None if axis == "in" else f_out, None if axis == "out" else f_in
