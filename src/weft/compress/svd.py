"""SVD: the nearest matrix of a given rank, whatever the data.

Carl Eckart and Gale Young, "The approximation of one matrix by another of lower rank", Psychometrika 1(3), 1936.

    W = U·Σ·Vᵀ    →    y = B(Ax) + b,    B = U_r·Σ_r^½ (out × r),    A = Σ_r^½·V_rᵀ (r × in)

‖W − BA‖_F is the least of any matrix of rank r: the root of the sum of the squared singular values that are dropped. It
needs no data, and is what every other method must beat.
"""

from __future__ import annotations

from dataclasses import dataclass

from weft.compress._config import LowRankConfig
from weft.compress._factoriser import LowRankFactoriser
from weft.registry import Card

CARD = Card(
    title="The approximation of one matrix by another of lower rank",
    arxiv="",
    year=1936,
    summary="cuts each weight to its largest singular values: no data, and the method to beat",
    knob="keep",
)


@dataclass
class SvdConfig(LowRankConfig):
    """Options of the plain singular value decomposition."""


class SvdFactoriser(LowRankFactoriser[SvdConfig]):
    """‖W − BA‖_F, unweighted."""
