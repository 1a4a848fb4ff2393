"""The gated LoRA core: ΔW = B·diag(g)·A with a gate per component; what has a zero gate is left out of the file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._delta import LowRankDelta, Site
from weft.algebra.prox import reference_prox, soft_threshold


class GatedDelta(LowRankDelta):
    """A (r × in) Kaiming-uniform, B (out × r) zero; a method defines `gate`, into which its scale is folded."""

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        self.r = site.check_rank(config.r) if site.rank is None else site.rank
        self.A = nn.Parameter(site.empty(self.r, site.in_))
        self.B = nn.Parameter(torch.zeros_like(site.empty(site.out, self.r)))
        if self.r:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def gate(self) -> Tensor:
        """(r,): gate times scale, of every component."""
        raise NotImplementedError(f"{type(self).__name__} must define gate()")

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B * self.gate(), self.A


class PrunedDelta(GatedDelta):
    """ΔW = scale·B·diag(g)·A, where g (r,) is trained and reaches exact zeros; a method makes g and applies a prox.

    Evaluation computes as the saved adapter does, with the components that survive. A closed one is dropped when the
    adapter is saved; `scale` stays what it was.
    """

    g: nn.Parameter
    scale = 1.0

    def gate(self) -> Tensor:
        return self.scale * self.g

    def shrink(self, t: float, prox: str) -> None:
        """One proximal step of the gate: "soft", or "reference", the authors' own."""
        self.g.copy_(soft_threshold(self.g, t) if prox == "soft" else reference_prox(self.g, t))

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.training or torch.compiler.is_compiling():
            return super().factors()
        kept = self.g.detach() != 0
        return (self.B * self.gate())[:, kept], self.A[kept]

    def compact(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
        kept = tensors["g"] != 0
        own = {"A": tensors["A"][kept], "B": tensors["B"][:, kept], "g": tensors["g"][kept]}
        return {**tensors, **own}, int(kept.sum())

    def expand(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        here = self.state_dict()
        full = {name: torch.zeros_like(here[name]) for name in ("A", "B", "g")}
        k = len(tensors["g"])
        full["A"][:k], full["B"][:, :k], full["g"][:k] = tensors["A"], tensors["B"], tensors["g"]
        return {**tensors, **full}

    def count(self) -> int:
        return self.r * (self.in_ + self.out + 1)
