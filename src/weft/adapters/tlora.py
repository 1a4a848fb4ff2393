"""TLoRA: a full-rank transform of W, close to the identity, and beside it a small residual.

Zerui Tao et al., "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image
Models", ICCV 2025, arXiv 2501.08727.

    y = x·(W·T + Δ)ᵀ        T: in × in,  Δ: out × in        ΔW = W·(T − I) + Δ
    T[i, j] = trace(A^1[i_1, j_1]·…·A^D[i_D, j_D])                       A^d: I_d × I_d × R × R,  A^d = I / R + E^d
    Δ = B·A (addition_part="lora"; B: out × r,  A: r × in), or a tensor ring ("tr"):
    Δ[o, i] = trace(B^1[o_1]·…·B^D[o_D]·C^1[i_1]·…·C^D[i_D])             B^d: O_d × r × r,  C^d: I_d × r × r

T acts on the input side: W sees T·x. A long index is several short ones, the first the fastest: i = i_1 + i_2·I_1 + …;
for R = 1 and D = 2, T = A^2 ⊗ A^1. The short sizes are balanced, the largest at most twice the smallest. A side without
such factors (a prime, say) is padded to the next number that has them, and T is the corner that meets real inputs.

What is trained, decayed and saved is E^d, not A^d: decay then pulls T to the identity and not W to zero, and bfloat16
does not round small deviations away beside 1 / R. For R = 1, E^d = 0 and T = I exactly. For R > 1 that start, the
paper's, is a trap: all R² slices of a core get equal gradients for ever, so that the ring stays of rank 1 and costs R²
times the parameters. Here the slices of all cores but the last then start apart: normal draws of deviation
spread·√R / (I_d·R), less their mean over the last ring index, which leaves T = I to rounding; spread=0 is the paper's.
A is Kaiming-uniform and B zero; in "tr" B^1 is zero and all other cores are normal with deviation √r / (size·r), where
size is the core's own (the paper's formula names I_d alone). The first step moves E and B (or B^1) only.

The objective may carry, with weights that the paper does not state and that are 0 here,
    identity_weight · Σ_d Σ_rs ‖E^d[:, :, r, s]‖_F,  orthogonal_weight · Σ_d Σ_rs ‖C^d[:, :, r, s] − I / R²‖_F
where C^d[i, j] = Σ_l A^d[i, l] ⊗ A^d[j, l] are the cores of T·Tᵀ (norms, not squares).

T·x takes in·(I_1·R² + (I_2 + … + I_{D−1})·R³ + I_D·R²) multiplications a vector (in·64 for R = 1 and D = 2 at in =
1024), thrice with the backward pass: for R = 1 a step costs 1.1 times LoRA's, for R = 2 1.4 times. Where W + ΔW costs
less by counted multiplications (a large R, a convolution), it is made and multiplied once: 1.5 times. Beside another
adapter W·((T − I)·x) is a product of its own: twice. The backward pass keeps an input-sized tensor a core, for R > 1 R²
of them. On a quantised base T·x goes through the layer itself. In a fused projection query, key and value share T,
unless split_qkv gives them one each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from weft.adapters._config import AdapterConfig
from weft.adapters._delta import Delta, Site
from weft.adapters._kinds import Conv, Embedding, QuantisedLinear
from weft.adapters._quantised import times
from weft.algebra import tensor_ring
from weft.errors import UsageError
from weft.registry import Card

CARD = Card(
    title=("Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models"),
    arxiv="2501.08727",
    year=2025,
    summary="multiplies W by a full-rank tensor-ring transform that starts as the identity, and adds a small residual",
    recipe={"learning_rate": 1e-4},
    exports="bounded",
    limitations=(
        "ΔW has full rank: merge for inference. It depends on W, which is needed wherever ΔW is, and W counts as a "
        "constant in it. On an embedding T mixes all tokens, and ΔW is made whole in every forward."
    ),
    reasons={
        "exports": (
            "ΔW = W·(T − I) + Δ has full rank and no thin factors: an SVD of full rank is exact to rounding and as "
            "large as the weights; a smaller rank is the best approximation, its error printed"
        )
    },
)


@dataclass
class TloraConfig(AdapterConfig):
    """Options of TLoRA."""

    r: int = field(default=1, metadata={"help": "rank of the residual"})
    transform_rank: int = field(default=1, metadata={"help": "R, ring rank of the transform"})
    addition_part: Literal["lora", "tr"] = field(
        default="lora", metadata={"help": "the residual: lora (B·A), or tr (a tensor ring of rank at most r²)"}
    )
    modes: int = field(default=2, metadata={"help": "D, short indices that a side is divided into"})
    spread: float = field(
        default=1.0, metadata={"help": "how far slices of a ring start apart; 0 keeps them equal for ever"}
    )
    identity_weight: float = field(
        default=0.0, metadata={"help": "coefficient of the distance of T's cores from the identity", "short": 0.01}
    )
    orthogonal_weight: float = field(
        default=0.0, metadata={"help": "coefficient of the distance of T·Tᵀ's cores from the identity", "short": 0.01}
    )

    def validate(self) -> None:
        super().validate()
        if self.transform_rank < 1:
            raise UsageError(f"transform_rank={self.transform_rank!r} must be at least 1")
        if not 1 <= self.modes <= 8:
            raise UsageError(f"modes={self.modes!r} is not within 1..8")
        if self.addition_part not in ("lora", "tr"):
            raise UsageError(f"addition_part={self.addition_part!r}: use lora or tr")
        for name in ("spread", "identity_weight", "orthogonal_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a number of at least 0")


class TloraDelta(Delta):
    """ΔW = W·(T − I) + Δ."""

    config: TloraConfig

    def __init__(self, config: TloraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.unmerged = site.unmerged  # the original W, whatever has been merged into it
        self.r, self.ring = config.r, config.transform_rank
        self.sizes = tensor_ring.balanced(site.in_, config.modes)
        self.out_sizes = tensor_ring.balanced(site.out, config.modes)
        self.folds_narrow = not isinstance(site.kind, Conv | Embedding)  # W stays apart from what is learnt
        self.wraps = isinstance(site.kind, QuantisedLinear)
        for d, size in enumerate(self.sizes, start=1):
            start = torch.zeros_like(site.empty(size, size, self.ring, self.ring))
            if self.ring > 1 and d < config.modes:
                nn.init.normal_(start, std=config.spread * _std(size, self.ring))
                start -= start.mean(-1, keepdim=True)
            self.register_parameter(f"E{d}", nn.Parameter(start))
        if config.addition_part == "lora":
            site.check_rank(config.r)
            self.A = nn.Parameter(site.empty(self.r, site.in_))
            self.B = nn.Parameter(torch.zeros_like(site.empty(site.out, self.r)))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            for side, sizes in (("B", self.out_sizes), ("C", self.sizes)):
                for d, size in enumerate(sizes, start=1):
                    core = site.empty(size, self.r, self.r)
                    nn.init.normal_(core, std=0.0 if (side, d) == ("B", 1) else _std(size, self.r))
                    self.register_parameter(f"{side}{d}", nn.Parameter(core))

    def cores(self, name: str) -> list[Tensor]:
        """E, B or C, one a mode."""
        return [getattr(self, f"{name}{d}") for d in range(1, self.config.modes + 1)]

    def residual(self) -> tuple[Tensor, Tensor]:
        """B (out × k) and A (k × in) with Δ = B·A; k is r, for a ring r²."""
        if self.config.addition_part == "lora":
            return self.B, self.A
        b, c = tensor_ring.chain(self.cores("B")), tensor_ring.chain(self.cores("C"))
        return b[: self.out].flatten(1), c[: self.in_].mT.flatten(1).mT

    def _transform(self, x: Tensor, whole: bool, transpose: bool = False) -> Tensor:
        """T·x, or (T − I)·x where not `whole`, for the vectors of x (… × in); or with Tᵀ."""
        cores = [e.to(x.dtype) for e in self.cores("E")]
        if transpose:
            cores = [e.transpose(0, 1) for e in cores]
        x = pad(x, (0, math.prod(self.sizes) - self.in_))
        return (tensor_ring.turned(x, cores) if whole else tensor_ring.deviation(x, cores))[..., : self.in_]

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return self.unmerged().to(dtype)

    def delta(self) -> Tensor:
        b, a = self.residual()
        return self._transform(self._weight(b.dtype), whole=False, transpose=True) + b @ a

    def forward(self, x: Tensor) -> Tensor:
        if self._dense_is_cheaper(x, dense=3, turned=2):
            return super().forward(x)
        change = self._transform(x, whole=False)
        if self.wraps:
            return self._with_residual(times(change, self.unmerged), x)
        return self._with_residual(self.kind.dense(change, self._weight(x.dtype)), x)

    def folds(self, x: Tensor) -> bool:
        return not isinstance(self.kind, Embedding)

    def fold(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        wide = w.element_size() >= 4 and not torch.is_autocast_enabled(w.device.type)
        if self._dense_is_cheaper(x, dense=1 if wide else 3, turned=0):
            return super().fold(x, w, bias) if wide else self.add(self.kind.dense(x, w, bias), x)
        return self.wrap(x, lambda turned: self.kind.dense(turned, w, bias))

    def wrap(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        return self._with_residual(layer(self._transform(x, whole=True)), x)

    def _with_residual(self, y: Tensor, x: Tensor) -> Tensor:
        b, a = self.residual()
        h = self.kind.down(x, a.to(x.dtype))
        return self.kind.up(h, b.to(h.dtype), onto=y.to(h.dtype))

    def _dense_is_cheaper(self, x: Tensor, dense: int, turned: int) -> bool:
        """Whether to make ΔW rather than turn x, by multiplications of a forward and a backward pass.

        `dense` and `turned` products of n·out·in come with either, beside those of the wrapped module.
        """
        if self.wraps:
            return False  # for the gradient of T, a dense W would be kept
        if not self.folds_narrow:
            return True  # what a convolution or an embedding receives are not the vectors that T acts on
        n, size = self.kind.tokens(x), self.out * self.in_
        k = self.r if self.config.addition_part == "lora" else self.r**2
        cost = tensor_ring.products(self.sizes, self.ring)
        made = 3 * self.out * cost + 2 * size * k + dense * n * size
        return made < 3 * n * cost + 3 * n * k * (self.in_ + self.out) + turned * n * size

    def penalty(self) -> Tensor | None:
        c = self.config
        if not (c.identity_weight or c.orthogonal_weight):
            return None
        terms = []
        for e in self.cores("E"):
            eye = torch.eye(len(e), dtype=e.dtype, device=e.device)[:, :, None, None]
            gap = tensor_ring.gram(e + eye / self.ring) - eye / self.ring**2
            for weight, distance in ((c.identity_weight, e), (c.orthogonal_weight, gap)):
                terms.append(weight * torch.linalg.vector_norm(distance, dim=(0, 1)).sum())
        return torch.stack(terms).sum()

    def count(self) -> int:
        transform = self.ring**2 * sum(size**2 for size in self.sizes)
        if self.config.addition_part == "lora":
            return transform + self.r * (self.in_ + self.out)
        return transform + self.r**2 * (sum(self.sizes) + sum(self.out_sizes))


def _std(size: int, rank: int) -> float:
    return math.sqrt(rank) / (size * rank)
