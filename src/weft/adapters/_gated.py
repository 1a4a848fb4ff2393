"""The gated LoRA core: ΔW = B·diag(g)·A with a gate per component; what has a zero gate is left out of the file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters._delta import LowRankDelta, Site


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
