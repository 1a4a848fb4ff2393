"""Frozen factors that are computed from W: saved, or found again on the very weight that they came from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.adapters._core import CoreDelta, on_meta
from weft.adapters._delta import Site
from weft.algebra.random import checksum
from weft.errors import UsageError


class DerivedDelta(CoreDelta):
    """A core between factors of W. The config has `store_factors`: whether a file brings them or W is factorised anew,
    and `r`: None where W decides, so that a file must say what `self.r` was.

    Another machine or number of threads may find other factors of one weight, so they are stored unless told otherwise.
    """

    config: Any
    r: int
    weight_checksum = ""

    def weight_to_factorise(self, config: Any, site: Site) -> Tensor | None:
        """W (out × in), or None where only shapes are asked or a file brings the factors.

        Raises UsageError where the file has no factors and W is not the weight that they were taken from.
        """
        if on_meta(site) or (site.stored and config.store_factors):
            return None
        w = site.weight()
        self.weight_checksum = "" if config.store_factors else checksum(w.float())
        if site.stored and config.checksums.get(site.name) != self.weight_checksum:
            raise UsageError(
                f"the adapter was saved with store_factors=False, and {site.name} is not the weight it was trained on: "
                "load it on the same base model in the same dtype"
            )
        return w

    def checksums(self) -> dict[str, str]:
        return {self.name: self.weight_checksum} if self.weight_checksum else {}

    def compact(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
        return tensors, self.r if self.config.r is None else None
