"""A layer's output, projected onto the directions in which it varies most about its mean.

    y = Wx + b,    μ = E[y],    C = E[(y − μ)(y − μ)ᵀ] = V·Λ·Vᵀ (out × out)
    y' = V_r·V_rᵀ·(y − μ) + μ = V_r·(V_rᵀ·W·x) + b',    b' = b + (I − V_r·V_rᵀ)·E[Wx]

The mean square error on the calibration data is the sum of the dropped eigenvalues, the least of any affine map of rank
r. C is W·Cov[x]·Wᵀ, so the smaller of the two covariances is collected: of the input where in ≤ out, of the output
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from weft.algebra.statistics import Moments
from weft.algebra.svd import weighted_svd
from weft.compress._calibration import Statistics
from weft.compress._config import CalibratedConfig, LowRankConfig
from weft.compress._factoriser import LowRankFactoriser, Tensors, left_over, moment
from weft.compress._layers import Layer
from weft.linear._structured import Structured
from weft.linear.low_rank import LowRank


@dataclass
class FeatureConfig(CalibratedConfig, LowRankConfig):
    """Options of methods that keep what a layer gives."""


F = TypeVar("F", bound=FeatureConfig)


class FeatureFactoriser(LowRankFactoriser[F]):
    """E‖y − y'‖²."""

    @property
    def centred(self) -> bool:
        """Whether the mean is kept; else y varies about zero, and b' = b."""
        return True

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("input",) if layer.in_ <= layer.out else ("output",)

    def adds_bias(self, layer: Layer) -> bool:
        return self.centred and layer.bias is None

    def bits(self, layer: Layer, size: int) -> int:
        mean = layer.out if self.centred and layer.bias is None else 0
        return super().bits(layer, size) + mean * layer.weight.element_size() * 8

    def operations(self, layer: Layer) -> tuple[float, float] | None:
        ranks = self.sizes(layer)
        if "output" not in self.needs(layer) or not len(ranks):
            return super().operations(layer)
        return 2.0 * layer.out * layer.in_ * ranks[-1], 9.0 * layer.out**3

    def spread(self, layer: Layer, seen: Moments) -> Tensor:
        """The covariance of `seen`, of what the layer receives or of what it gives."""
        return moment(seen, self.config.shrink, centred=self.centred)

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None = None) -> Tensors:
        w, ranks = layer.wide, self.sizes(layer)
        seen = statistics.input or statistics.output
        assert seen is not None
        c = self.spread(layer, seen)
        if statistics.input is not None:
            found = weighted_svd(w, right=c, rank=ranks[-1])
            spectrum, rest, v = found.spectrum, found.rest, found.factors(ranks[-1], split="right")[0]
            mean = w.double() @ seen.mean
        else:
            values, vectors = torch.linalg.eigh(c)
            spectrum, rest, v = values.flip(0).clamp(min=0).sqrt(), 0.0, vectors.flip(1)[:, : ranks[-1]]
            mean = seen.mean if layer.bias is None else seen.mean - layer.bias.double()
        kept = {"mean": mean.to(w.dtype)} if self.centred else {}
        return {"up": v.to(w.dtype), **kept, "errors": left_over(spectrum, ranks, rest)}

    def factors(self, layer: Layer, tensors: Tensors, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """V_r (out × r), V_rᵀ·W (r × in) and b' (out) in the precision that they were found in."""
        v, bias = tensors["up"][:, :size], layer.bias
        if "mean" in tensors:
            mean = tensors["mean"]
            rest = mean - v @ (v.mT @ mean)
            bias = rest if bias is None else bias + rest
        return v, v.mT @ layer.wide, bias

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        return LowRank.from_factors(*self.factors(layer, tensors, size), layer.weight.dtype)
