"""Truth values as bits: eight in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Rows of truth values (n × k) as bits, eight a byte, the first the lowest: uint8 (n × ⌈k/8⌉)."""
    n, k = mask.shape
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -k % 8)).view(n, -(-k // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)


def unpack(packed: Tensor, k: int) -> Tensor:
    """Truth values (n × k) from `pack`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :k].bool()
