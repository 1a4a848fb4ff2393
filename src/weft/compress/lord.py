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

from weft.compress._features import FeatureConfig, FeatureFactoriser
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
class LordConfig(FeatureConfig):
    """Options of LoRD."""

    center: bool = field(default=True, metadata={"help": "keep the output's mean, in a bias of the up layer"})


class LordFactoriser(FeatureFactoriser[LordConfig]):
    """E‖y − y'‖²."""

    @property
    def centred(self) -> bool:
        return self.config.center
