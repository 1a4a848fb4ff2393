"""CoSpaDi: each output takes a few atoms of a dictionary that all outputs share, and so has a subspace of its own.

Dmitriy Shopkhoev, Denis Makhov, Magauiya Zhussip, Ammar Ali, Stamatios Lefkimmiatis, "COSPADI: Compressing LLMs via
Calibration-Guided Sparse Dictionary Learning", arXiv 2509.22075.

    E[x·xᵀ] = LᵀL (in × in),    Y = L·Wᵀ ≈ D_L·S    →    y = (x·D)·S + b,    D = L⁻¹·D_L

D is in × k; each column of S (k × out) has s values. E‖Wx − (DS)ᵀx‖² is ‖Y − D_L·S‖², which K-SVD makes small: rounds
of orthogonal matching pursuit, which gives every column its s atoms, and of a sweep that improves one atom after the
other. With s = k all outputs share one subspace, and the best there is is SVD-LLM's.

A layer's size is k, with s = k/ρ for the given `rho`. Counted is all that is stored: k·in + s·out numbers, and k bits
for each output that say where its values are (or their places as whole numbers, once ρ is so large that those are
shorter). The budget in public code of the authors counts the numbers only.

`start` is where D_L begins: the first singular vectors of Y, and columns of it where there are not enough; k columns of
Y; or random directions. The paper's choice is not known here. Of two trained layers, singular vectors leave a query
projection much nearer than columns do, and a down projection about as near (benchmarks/sparse_coding.py, which compares
the other choices too). D_L has columns of length one; those of D are as long as L⁻¹ makes them, in float64.

A column of Y keeps the atoms it had where a new pursuit finds worse ones, so that the error never rises. It ends after
`iterations` rounds, or when one takes off less than `tolerance` of the error. A sweep takes two power iterations an
atom, from where the atom is; more come out at the same error.

The paper's groups, layers of one shape that share a dictionary (L from the sum of their second moments, their columns
side by side), are not here: layers are taken apart one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from weft.algebra.gram import over_root, root, times_root
from weft.algebra.random import generator
from weft.algebra.sparse_coding import ksvd
from weft.compress._calibration import Statistics
from weft.compress._config import CalibratedConfig
from weft.compress._factoriser import Factoriser, Tensors, moment
from weft.compress._layers import Layer
from weft.errors import UsageError
from weft.linear._codes import smallest_int, support_bits
from weft.linear._structured import Structured
from weft.linear.dictionary import Dictionary
from weft.registry import Card

CARD = Card(
    title="COSPADI: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning",
    arxiv="2509.22075",
    year=2025,
    summary="a dictionary learned on calibration data, of which every output takes its own few atoms",
    knob="keep",
    needs=("data",),
    limitations="saves memory, not time; on a CPU, layers of thousands of inputs take hours; layers do not share a "
    "dictionary as the paper's groups do",
    reasons={"non_monotone": "each size is learned anew, and alternating steps end in different local optima"},
)


@dataclass
class CospadiConfig(CalibratedConfig):
    """Options of CoSpaDi."""

    allocate: Literal["uniform", "threshold", "block_influence"] = field(  # type: ignore[assignment]
        default="uniform",
        metadata={
            "help": "who gets how much: the same share everywhere, one threshold on singular values, or by each "
            "block's influence"
        },
    )
    rho: float = field(default=2.0, metadata={"help": "atoms in the dictionary for each one that an output takes, k/s"})
    iterations: int = field(default=60, metadata={"help": "rounds of pursuit and K-SVD, at most", "short": 3})
    tolerance: float = field(
        default=0.01, metadata={"help": "it stops when a round takes off less than this share of the error"}
    )
    start: Literal["svd", "data", "random"] = field(
        default="svd", metadata={"help": "first atoms: singular vectors of Y, columns of Y, or random directions"}
    )
    seed: int = field(default=0, metadata={"help": "draws columns and random directions"})

    def validate(self) -> None:
        super().validate()
        if self.allocate not in ("uniform", "threshold", "block_influence"):
            raise UsageError(
                f"allocate={self.allocate!r} needs the error of every size, and CoSpaDi learns each size anew: use "
                "uniform, threshold or block_influence"
            )
        if not (isinstance(self.rho, int | float) and 1 <= self.rho < math.inf):
            raise UsageError(f"rho={self.rho!r}: a number of at least 1, atoms for each one that an output takes")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise UsageError(f"iterations={self.iterations!r} must be a whole number, 0 or more")
        if not (isinstance(self.tolerance, int | float) and 0 <= self.tolerance < 1):
            raise UsageError(f"tolerance={self.tolerance!r}: a share of the error, at least 0 and below 1")
        if self.start not in ("svd", "data", "random"):
            raise UsageError(f"start={self.start!r}: svd, data or random")


class CospadiFactoriser(Factoriser[CospadiConfig]):
    """E‖Wx − (DS)ᵀx‖²."""

    kind = "dictionary"
    nested = False

    def needs(self, layer: Layer) -> tuple[str, ...]:
        return ("input",)

    def nonzeros(self, k: int) -> int:
        """s."""
        return max(int(k / self.config.rho + 1e-9), 1)

    def sizes(self, layer: Layer) -> Sequence[int]:
        # as many values as W has rank reproduce it, whatever they cost
        whole = math.ceil(self.config.rho * min(layer.out, layer.in_))
        if not self.config.guard:
            return range(1, whole + 1)
        below = (layer.out * layer.in_ - 1) / (layer.in_ + layer.out / self.config.rho)  # of which none saves bits
        return range(1, min(whole, int(below) + 1) + 1)

    def bits(self, layer: Layer, size: int) -> int:
        s = self.nonzeros(size)
        numbers = size * layer.in_ + s * layer.out
        return numbers * layer.weight.element_size() * 8 + layer.out * support_bits(size, s)

    def decompose(self, layer: Layer, statistics: Statistics, size: int | None) -> Tensors:
        assert size is not None
        w, config, s = layer.wide, self.config, self.nonzeros(size)
        exact = s >= min(layer.out, layer.in_)  # whatever the weights
        c = None if exact else root(moment(statistics.input, config.shrink))  # Lᵀ
        y = times_root(w.double().mT, c).mT.to(w.dtype)  # columns of Y as rows
        found = ksvd(
            y,
            size,
            s,
            generator=generator("cospadi", config.seed, layer.name),
            start=config.start,
            rounds=config.iterations,
            tolerance=config.tolerance,
        )
        left = (y - found.product()).double().square().sum()
        return {
            "atoms": over_root(found.atoms.double().mT, c).mT.to(w.dtype),
            "places": found.index.to(smallest_int(size)),
            "values": found.values,
            "errors": left / y.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny),
        }

    def build(self, layer: Layer, tensors: Tensors, size: int) -> Structured:
        return Dictionary.from_codes(
            tensors["atoms"], tensors["places"].long(), tensors["values"], layer.bias, layer.weight.dtype
        )
