"""GaLore: every weight is trained, and Adam's moments live in the gradient's leading subspace.

Jiawei Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024,
arXiv 2403.03507.

    every T = update_proj_gap steps     G = U·Σ·Vᵀ,   P = V[:, :r]ᵀ (r × in)   or, where out < in,   P = U[:, :r]
    R = G·Pᵀ   (out × r)                m ← β₁m + (1 − β₁)R,   v ← β₂v + (1 − β₂)R²,   N = m / (√v + eps)
    W ← (1 − lr·λ)·(W − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · scale · N·P)

The basis is that of the shorter side, so that moments are r × max(out, in). `proj_type` is "std", as above, "left" or
"right" for a fixed side, "reverse_std" for the longer one, "full" for both at once: R = UᵀGV is r × r. Moments are
kept across refreshes as they are, neither turned nor reset; signs of P are canonical, so a direction that stays keeps
its momentum. `scale` multiplies the update and nothing else. eps is not divided by v's correction.

svd="exact" decomposes G whole. svd="warm", the default, takes block power steps from the basis in force until one
holds less than a fifth more: two or three at first, later one as a rule. That is a few matrix products for 98 % or
more of the energy of a text's gradients. With full rank nothing is lost, but it is not AdamW: the rule acts on rotated
coordinates.

State of one matrix: r·min(out, in) for P, in the gradient's dtype, and 2·r·max(out, in) for the moments, float32 at
least. `inner` says what the moments are: adamw, adamw8bit (one byte each), adafactor (row and column means; HF's with
the learning rate that is given and no first moment) or sgd. The authors' per-layer update is
`weft.optim.update_in_backward`. (In their code its hook fires twice, which doubles T and the schedule.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weft.optim._basis import Basis, BasisConfig, basis, check_basis
from weft.optim._groups import param_groups
from weft.optim._optimizer import Group
from weft.optim._projected import Projected
from weft.registry import Card

CARD = Card(
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    arxiv="2403.03507",
    year=2024,
    summary="full-parameter training with Adam's moments in the leading subspace of each gradient",
    knob="rank",
    recipe={"learning_rate": 0.01, "weight_decay": 0.0, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    pretraining=True,
    limitations="Moments keep their coordinates when the subspace is chosen anew; frequent refreshes blur them.",
)


@dataclass
class GaloreConfig(BasisConfig):
    """Options of GaLore."""

    scale: float = field(default=0.25, metadata={"help": "multiplies the lifted update (the authors' fine-tuning: 4)"})
    stagger: bool = field(default=False, metadata={"help": "refresh the matrices in turn, not all in one step"})


class Galore(Projected):
    """GaLore's AdamW, 8-bit AdamW, Adafactor or SGD; groups without `rank` take the same rule unprojected."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        svd: str = "warm",
        inner: str = "adamw",
        stagger: bool = False,
        compile: bool = False,
    ) -> None:
        """
        Args:
            params: groups as in `{"params": ..., "rank": 128, "update_proj_gap": 200, "scale": 0.25}`, beside groups
                without a rank; `weft.optim.param_groups` makes both.
            inner, stagger, compile: see `Projected`.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        defaults |= {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "svd": svd}
        super().__init__(params, defaults, inner=inner, stagger=stagger, compile=compile)

    def check(self, group: Group) -> None:
        super().check(group)
        check_basis("Galore", group)

    def projector(self, group: Group, p: Tensor) -> Basis:
        return basis(group["proj_type"], group["rank"], group["svd"], p.shape)


def arguments(config: GaloreConfig, model: nn.Module, weight_decay: float) -> dict[str, Any]:
    """What `Galore` takes for this model."""
    chosen = {name: getattr(config, name) for name in ("rank", "update_proj_gap", "scale", "proj_type", "svd")}
    groups = param_groups(model, target_modules=config.target_modules, weight_decay=weight_decay, **chosen)
    rest = {name: getattr(config, name) for name in ("betas", "eps", "inner", "stagger")}
    return {"params": groups, "weight_decay": weight_decay, **rest}
