"""Randomness as a pure function of names: the same everywhere, whatever the global generators did."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key, e.g. (seed, step, module name). Never touches the global stream."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def checksum(tensor: torch.Tensor) -> str:
    """16 hex digits that identify the tensor's bytes."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()
