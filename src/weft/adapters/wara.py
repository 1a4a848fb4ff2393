"""WaRA: a low-rank update of wavelet coefficients, one half-size pair of factors a band.

Moein Heidari, Yasamin Medghalchi, Mahdi Khoursha, Reza Rezaeian and Ilker Hacihaliloglu, "WaRA: Wavelet Low Rank
Adaptation", 2025, arXiv 2506.24092 (version 1).

    S_n: n × n, orthonormal: row i of S_n·v is coefficient i of v, the low band first, then the high
    ΔW = s·S_outᵀ·diag(B·A, B·A)·S_in,  s = α / r            A: r × in/2,  B: out/2 × r

The paper transforms features and tokens, applies B·A to each of the four bands, and transforms back. With a pair that
the bands share and an orthonormal transform, what is done along the tokens cancels exactly, and the above is left: it
merges, serves single tokens, and is a plain LoRA of rank 2r with half of LoRA's parameters at equal r. One B·A over all
coefficients at once would cancel too, and be LoRA: the bands are the method.

Only the factors are transformed, never x: S_outᵀ·diag(B, B) and diag(A, A)·S_in are made once a forward, for a few
operations a number. A token then costs what it costs in LoRA of rank 2r, 2r·(in + out) multiplications; two half-width
products between transforms of x and y would be half of that and two passes over x and y, which take longer.

A is Kaiming-uniform within its band and B zero, so ΔW = 0 at the start. Odd sides are padded with a zero that is
dropped again: a band has ⌈n/2⌉ coefficients.

A shared pair moves coarse and fine coefficients alike. Of an update that does not, ½·‖coarse − fine‖² is out of reach
at any rank: where nothing speaks for that symmetry, take a pair a band. This one comes nearer than LoRA of as many
parameters where the coarse and the fine part of an update have a low rank each; where the update is one global product
of low rank, LoRA comes nearer.

bands: what a pair of factors serves
    shared             both the low and the high band (the paper's): r·(in + out)/2 parameters, rank 2r
    per_feature_band   one of them: r·(in + out) parameters, rank 2r
    weight             a band of outputs from a band of inputs, after the abstract's wording, which decomposes ΔW
                       itself: 2r·(in + out) parameters, rank 4r
levels: the low band is split again that often (along features alone), so that bands are n/2^J, n/2^J, n/2^(J−1), …, n/2
    wide. "shared" has a pair for each width. ΔW has the rank (J + 1)·r, with "weight" (J + 1)²·r; sides are padded to
    a multiple of 2^J.
wavelet: any orthogonal one of PyWavelets, extended periodically. Others would not cancel along the tokens.

Not here: version 2's spatial mode, which transforms tokens on their image grid; between linear maps it cancels to
LoRA. Nor its Tiny-WaRA, a trained core between singular vectors of W in the wavelet domain: those are the transforms of
W's own singular vectors, so that the wavelets cancel and a core between singular vectors of W is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import LowRankDelta, Site
from weft.algebra.transforms import dwt
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title="WaRA: Wavelet Low Rank Adaptation",
    arxiv="2506.24092",
    year=2025,
    summary="low-rank factors of half the size, one product for the coarse and one for the fine wavelet coefficients",
    recipe={"learning_rate": 1e-3, "weight_decay": 0.01, "lr_scheduler_type": "linear"},
    limitations=(
        "Neighbouring features must have something in common for wavelets to mean anything. A token costs what it does "
        "in LoRA of rank 2r."
    ),
)


@dataclass
class WaraConfig(AdapterConfig):
    """Options of WaRA."""

    r: int = field(default=8, metadata={"help": "rank of each pair of factors"})
    lora_alpha: float = field(default=8.0, metadata={"help": "α; ΔW is scaled by α / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    bands: Literal["shared", "per_feature_band", "weight"] = field(
        default="shared", metadata={"help": "pairs of factors: shared, per_feature_band or weight (each band to each)"}
    )
    wavelet: str = field(default="haar", metadata={"help": "an orthogonal wavelet of PyWavelets: haar, db2, sym4, …"})
    levels: int = field(default=1, metadata={"help": "J, how often the low band is split"})

    def validate(self) -> None:
        super().validate()
        if self.bands not in ("shared", "per_feature_band", "weight"):
            raise UsageError(f"bands={self.bands!r}: use shared, per_feature_band or weight")
        if self.levels < 1:
            raise UsageError(f"levels={self.levels!r} must be at least 1")
        try:
            dwt(2, self.wavelet)
        except ValueError as error:
            raise UsageError(f"wavelet={self.wavelet!r}: {error}; haar, db2 or sym4 would work") from None


class Side:
    """One side of a weight, n features: its bands, and how rows of coefficients become rows of features."""

    def __init__(self, n: int, config: WaraConfig) -> None:
        levels = config.levels
        self.n, self.padded = n, -(-n // (1 << levels)) << levels
        self.widths = [self.padded >> levels, *(self.padded >> level for level in range(levels, 0, -1))]
        self.transform = dwt(self.padded, config.wavelet, levels)

    def apart(self, packed: Tensor) -> Tensor:
        """Rows whose bands stand side by side (k × padded) with each band in rows of its own: (bands·k × padded)."""
        return torch.block_diag(*packed.split(self.widths, dim=1))

    def features(self, coefficients: Tensor) -> Tensor:
        """coefficients·S without what was padded: k × n."""
        return self.transform.inverse(coefficients)[:, : self.n]


class WaraDelta(LowRankDelta):
    """ΔW = s·S_outᵀ·(blocks B·A)·S_in. A and Bᵀ are kept with their bands side by side, as rows of coefficients."""

    def __init__(self, config: WaraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r, self.bands = site.check_rank(config.r), config.bands
        self.scale = config.lora_alpha / self.r
        if 1 << config.levels > min(site.out, site.in_):
            raise UsageError(
                f"levels={config.levels} would split {site.name} into bands of less than one feature: its weight is "
                f"{site.out} × {site.in_}; use levels ≤ {int(math.log2(min(site.out, site.in_)))}"
            )
        self.outputs, self.inputs = Side(site.out, config), Side(site.in_, config)
        self.A = nn.Parameter(site.empty(*self._shape(self.inputs)))
        self.B = nn.Parameter(torch.zeros_like(site.empty(*self._shape(self.outputs)).mT.contiguous()))
        with torch.no_grad():
            for band in self.A.split(self._own(self.inputs), dim=-1):
                band.uniform_(-1, 1).div_(math.sqrt(band.shape[-1]))  # Kaiming-uniform with a = √5

    def _own(self, side: Side) -> list[int]:
        """Widths of the bands that have factors of their own; where they are shared, the coarsest has none."""
        return side.widths[1:] if self.bands == "shared" else side.widths

    def _shape(self, side: Side) -> tuple[int, ...]:
        k = (len(side.widths),) if self.bands == "weight" else ()
        return *k, self.r, sum(self._own(side))

    def factors(self) -> tuple[Tensor, Tensor]:
        a: Tensor = self.A
        b: Tensor = self.B.mT
        if self.bands == "weight":
            # block (i, j) of ΔW is made of A[i], band j, and of B[j], band i; rows in the order (i, j, component)
            rows_a = torch.cat([self.inputs.apart(one) for one in a])
            columns = torch.stack([self.outputs.apart(one) for one in b])  # j × (i, component) × padded
            rows_b = columns.unflatten(1, (-1, self.r)).transpose(0, 1).flatten(0, 2)
        else:
            if self.bands == "shared":
                a, b = (torch.cat([t[:, : s.widths[0]], t], dim=1) for t, s in ((a, self.inputs), (b, self.outputs)))
            rows_a, rows_b = self.inputs.apart(a), self.outputs.apart(b)
        return self.scale * self.outputs.features(rows_b).mT, self.inputs.features(rows_a)

    def count(self) -> int:
        k = self.config.levels + 1 if self.bands == "weight" else 1  # type: ignore[attr-defined]
        return k * self.r * (sum(self._own(self.inputs)) + sum(self._own(self.outputs)))
