"""Atomic feature mimicking: what a layer gives, in fewer dimensions; for linear layers, convolutions, embedding tables.

Hao Yu, Minghao Fu, Jiandong Ding, Yusheng Zhou, Jianxin Wu, "Unified Low-rank Compression Framework for Click-Through
Rate Prediction", arXiv 2405.18146.

    y = Wx + b,    μ = E[y],    C = E[(y − μ)(y − μ)ᵀ] = U·Λ·Uᵀ (out × out)
    linear       y' = U_r·(U_rᵀ·W·x) + b',    b' = b + (I − U_r·U_rᵀ)·E[Wx]         U_r: out × r
    convolution  the same of W: out × (in·kh·kw), E over positions: one of r channels, then one of 1 × 1
    embedding    z' = D[id]·U_hᵀ + μ,    D = (E − 1·μᵀ)·U_h                          E: n × d,  D: n × h,  U_h: d × h

The mean square error over the data is the sum of the dropped eigenvalues, the least of any affine map of that rank, and
the mean output is kept. A table's moments are those of the rows that were looked up, so a row counts as often as it is
used; each row counts another 10⁻⁹ of that, so that directions in which nothing was looked up are ordered too. Every
row is stored, that of padding as well. Tables of one number a row, a wide part's, have no smaller form and stay.

`basis="weights"` cuts the singular values of W or E instead, whatever the data: the paper's SVD, within the same
framework. On linear layers "features" is LoRD. The paper's models may have the layer's activation between the factors
too: such a layer is another model from the start, has no matrix, and what activation is the layer's own a module does
not say; it is left out.

Where a linear layer follows an embedding with nothing in between, `fold` moves U_h and μ into it. What else stands
between them (a product of fields, a cross, attention) keeps U_h in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from weft.algebra.statistics import Moments
from weft.algebra.svd import weighted_svd
from weft.compress._calibration import Statistics
from weft.compress._factoriser import Tensors, left_over
from weft.compress._features import FeatureConfig, FeatureFactoriser
from weft.compress._layers import LINEAR, Layer, targets
from weft.errors import UsageError
from weft.linear._structured import Structured, bare_linear
from weft.linear.factored_embedding import FactoredEmbedding
from weft.linear.low_rank_conv import LowRankConv
from weft.registry import Card

CARD = Card(
    title="Unified Low-rank Compression Framework for Click-Through Rate Prediction",
    arxiv="2405.18146",
    year=2024,
    summary="keeps the principal components of what linear layers, convolutions and embeddings give, and its mean",
    knob="keep",
    needs=("data",),
)

UNSEEN = 1e-9  # of a look-up, what a row counts for being there


@dataclass
class AtomicFeatureMimickingConfig(FeatureConfig):
    """Options of atomic feature mimicking."""

    basis: Literal["features", "weights"] = field(
        default="features",
        metadata={"help": "what is kept: components of the output on the data, or the weight's singular values"},
    )

    def validate(self) -> None:
        super().validate()
        if self.basis not in ("features", "weights"):
            raise UsageError(f"basis={self.basis!r} is neither 'features' nor 'weights'")


class AtomicFeatureMimickingFactoriser(FeatureFactoriser[AtomicFeatureMimickingConfig]):
    """E‖y − y'‖², or ‖W − W'‖_F."""

    kinds = ("low_rank", "low_rank_conv", "factored_embedding")

    @property
    def centred(self) -> bool:
        return self.config.basis == "features"

    def units(self, model: nn.Module) -> Sequence[Layer]:
        return targets(model, self.config.include, self.config.exclude, (*LINEAR, nn.Conv2d, nn.Embedding))

    def needs(self, layer: Layer) -> tuple[str, ...]:
        if self.config.basis == "weights":
            return ()
        return super().needs(layer) if isinstance(layer.module, LINEAR) else ("output",)

    def kind_of(self, layer: Layer) -> str:
        low_rank, conv, embedding = self.kinds
        return {nn.Conv2d: conv, nn.Embedding: embedding}.get(type(layer.module), low_rank)

    def adds_bias(self, layer: Layer) -> bool:
        # a table written out has its mean in it
        return super().adds_bias(layer) and not isinstance(layer.module, nn.Embedding)

    def spread(self, layer: Layer, seen: Moments) -> Tensor:
        c = super().spread(layer, seen)
        if not isinstance(layer.module, nn.Embedding):
            return c
        rows = layer.wide.mT.double() - seen.mean
        return c + UNSEEN / len(rows) * (rows.mT @ rows)

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None = None) -> Tensors:
        if self.config.basis == "features":
            return super().decompose(layer, statistics, size)
        ranks = self.sizes(layer)
        found = weighted_svd(layer.wide, rank=ranks[-1])
        up = found.factors(ranks[-1], split="right")[0]
        return {"up": up, "errors": left_over(found.spectrum, ranks, found.rest)}

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        dtype = layer.weight.dtype
        if isinstance(layer.module, nn.Embedding):
            up, mean, rows = tensors["up"][:, :size], tensors.get("mean"), layer.wide.mT
            table = (rows if mean is None else rows - mean) @ up
            return FactoredEmbedding.from_factors(table, up, mean, padding_idx=layer.module.padding_idx, dtype=dtype)
        if isinstance(layer.module, nn.Conv2d):
            return LowRankConv.from_factors(*self.factors(layer, tensors, size), dtype, like=layer.module)
        return super().build(layer, tensors, size)


@torch.no_grad()
def fold(embeddings: Sequence[nn.Embedding], linear: nn.Linear) -> tuple[list[nn.Embedding], nn.Linear]:
    """Tables of h numbers a row and the layer that reads them side by side, computing what wider ones computed.

    Args:
        embeddings: factored or dense ones; a dense one stays what it is.
        linear: reads what they give, and nothing else, in this order: out × Σd. It is left as it is.

    Raises UsageError where the layer is not of that form.
    """
    widths = [embedding.embedding_dim for embedding in embeddings]
    if type(linear) is not nn.Linear or linear.in_features != sum(widths):
        raise UsageError(f"embeddings of {sum(widths)} numbers are folded into an nn.Linear of as many, not {linear}")
    w, dtype = linear.weight, linear.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    bias = w.new_zeros(len(w), dtype=wide) if linear.bias is None else linear.bias.to(wide)
    tables, parts = [], []
    for embedding, part in zip(embeddings, w.to(wide).split(widths, dim=1)):
        if isinstance(embedding, FactoredEmbedding):
            bias = bias if embedding.mean is None else bias + part @ embedding.mean.to(wide)
            part, embedding = part @ embedding.up.to(wide), embedding.table
        tables.append(embedding)
        parts.append(part)
    joined = torch.cat(parts, dim=1)
    folded = bare_linear(joined.shape[1], len(w), True, w.device, dtype)
    folded.weight.copy_(joined)
    folded.bias.copy_(bias)
    return tables, folded
