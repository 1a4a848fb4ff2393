"""LoRD: keeps the directions in which a layer's output varies, and its mean.

Ayush Kaushal, Tejas Vaidhya, Irina Rish, "LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot
Compression", arXiv 2309.14021.

    y = Wx + b,    μ = E[y],    C = E[(y − μ)(y − μ)ᵀ] = V·Λ·Vᵀ (out × out)
    y' = V_r·V_rᵀ·(y − μ) + μ = V_r·(V_rᵀ·W·x) + b',    b' = b + (I − V_r·V_rᵀ)·E[Wx]

down = V_rᵀ·W (r × in), up = V_r (out × r). The mean square error on the calibration data is the sum of the dropped
eigenvalues, the least of any affine map of rank r. The up layer always has a bias, counted among the stored bits where
the layer had none; `center=False` leaves the mean out (E[yyᵀ] in place of C), for models that can take no bias.

C is W·Cov[x]·Wᵀ, so the smaller of the two covariances is collected: of the input where in ≤ out (query, key and value,
or gate and up, then share one), of the output elsewhere. A fused query-key-value layer has one common subspace.

The paper's plain SVD is `svd`; its choice of ranks by energy is `allocate="energy"`, its sweep over types of layers
`allocate="sweep"`. How many per cent of the ranks are cut is not how many parameters: a square layer of 60 % of its
rank has 120 % of its parameters, and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from weft.algebra.svd import weighted_svd
from weft.compress._calibration import Statistics
from weft.compress._config import CalibratedConfig, LowRankConfig
from weft.compress._factoriser import LowRankFactoriser, Tensors, left_over, moment
from weft.compress._layers import Layer
from weft.linear._structured import Structured
from weft.linear.low_rank import LowRank
from weft.registry import Card

CARD = Card(
    title="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
    arxiv="2309.14021",
    year=2023,
    summary="keeps the principal components of each layer's output, and its mean in a bias",
    knob="keep",
    needs=("data",),
)


@dataclass
class LordConfig(CalibratedConfig, LowRankConfig):
    """Options of LoRD."""

    center: bool = field(default=True, metadata={"help": "keep the output's mean, in a bias of the up layer"})


class LordFactoriser(LowRankFactoriser[LordConfig]):
    """E‖y − y'‖²."""

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("input",) if layer.in_ <= layer.out else ("output",)

    def adds_bias(self, layer: Layer) -> bool:
        return self.config.center and layer.bias is None

    def bits(self, layer: Layer, size: int) -> int:
        bias = layer.out if self.adds_bias(layer) else 0
        return super().bits(layer, size) + bias * layer.weight.element_size() * 8

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None = None) -> Tensors:
        w, ranks = layer.wide, self.sizes(layer)
        seen = statistics.input or statistics.output
        c = moment(seen, self.config.shrink, centred=self.config.center)
        assert seen is not None
        if statistics.input is not None:
            found = weighted_svd(w, right=c, rank=ranks[-1])
            spectrum, rest, v = found.spectrum, found.rest, found.factors(ranks[-1], split="right")[0]
            mean = w.double() @ seen.mean
        else:
            values, vectors = torch.linalg.eigh(c)
            spectrum, rest, v = values.flip(0).clamp(min=0).sqrt(), 0.0, vectors.flip(1)[:, : ranks[-1]]
            mean = seen.mean if layer.bias is None else seen.mean - layer.bias.double()
        return {"up": v.to(w.dtype), "mean": mean.to(w.dtype), "errors": left_over(spectrum, ranks, rest)}

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        v, bias = tensors["up"][:, :size], layer.bias
        if self.config.center:
            mean = tensors["mean"]
            rest = mean - v @ (v.mT @ mean)
            bias = rest if bias is None else bias + rest
        return LowRank.from_factors(v, v.mT @ layer.wide, bias, layer.weight.dtype)
