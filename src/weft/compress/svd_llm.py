"""SVD-LLM: the factors that change a layer's output on the calibration data least.

Xin Wang, Yu Zheng, Zhongwei Wan, Mi Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression", arXiv 2403.07378.

    S = E[x·xᵀ] (in × in),    S = R·Rᵀ,    W·R = U·Σ·Vᵀ    →    y = B(Ax) + b,    BA = U_r·Σ_r·V_rᵀ·R⁻¹

E‖Wx − BAx‖² is the least of any BA of rank r: the sum of the squared singular values of W·R that are dropped. BA is
also U_r·U_rᵀ·W: the layer's output, projected onto the directions in which it varies most about zero. LoRD takes the
directions in which it varies most about its mean, and keeps the mean in a bias.

S is moved by `shrink` towards a multiple of the identity, for which the method is plain SVD; 0 is the paper's. Without,
the factors fit the calibration text and give part of that back on any other (benchmarks/compression.py).

The paper goes on with the blocks before compressed: that is `sequential=True`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.compress._calibration import Statistics
from weft.compress._config import CalibratedConfig, LowRankConfig
from weft.compress._factoriser import LowRankFactoriser, Weight, moment
from weft.compress._layers import Layer
from weft.registry import Card

CARD = Card(
    title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    arxiv="2403.07378",
    year=2024,
    summary="the low-rank factors that change each layer's output on calibration data least",
    knob="keep",
    needs=("data",),
)


@dataclass
class SvdLlmConfig(CalibratedConfig, LowRankConfig):
    """Options of SVD-LLM."""

    shrink: float | Literal["auto"] = field(
        default=0.3,
        metadata={"help": "how far second moments move towards a multiple of the identity, 0 to 1, or auto"},
    )


class SvdLlmFactoriser(LowRankFactoriser[SvdLlmConfig]):
    """E‖(W − BA)·x‖²."""

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("input",)

    def weights(self, layer: Layer, statistics: Statistics) -> tuple[Weight, Weight]:
        return None, moment(statistics.input, self.config.shrink)
