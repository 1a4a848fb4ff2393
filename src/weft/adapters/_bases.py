"""Seeded bases that all layers of a model share: drawn once on the CPU, never saved, recognised by a checksum."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from weft.algebra.random import checksum
from weft.errors import UsageError

_known: weakref.WeakValueDictionary[Hashable, SharedBasis] = weakref.WeakValueDictionary()


class SharedBasis:
    """A frozen tensor that is a pure function of `key`. One copy a device, whoever asks; deltas hold the reference.

    It is no buffer on purpose: PEFT would cast it, `state_dict` would save it and `module.to` would copy it per layer.
    With `stored=False` nothing is kept and every call draws the tensor again, bit-equal.
    """

    def __init__(self, key: Hashable, draw: Callable[[], Tensor], stored: bool = True) -> None:
        self.key, self.draw, self.stored = key, draw, stored
        self._copies: dict[torch.device, Tensor] = {}

    def tensor(self, device: torch.device) -> Tensor:
        """The basis on a device; drawn on the CPU, so equal everywhere."""
        if device.type == "meta":
            return self.draw().to(device)
        if not self.stored:
            return self.draw().to(device)
        if device not in self._copies:
            cpu = torch.device("cpu")
            source = self._copies.get(cpu)
            self._copies[device] = (self.draw() if source is None else source).to(device)
        return self._copies[device]

    def checksum(self) -> str:
        """16 hex digits of the drawn bytes: another torch that draws other numbers is found out when loading."""
        return checksum(self.tensor(torch.device("cpu")))

    def stored_bytes(self) -> int:
        """Bytes held on all devices."""
        return sum(t.numel() * t.element_size() for t in self._copies.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBasis:
        return self  # frozen: copies of a model share it


def shared_basis(key: Hashable, draw: Callable[[], Tensor], stored: bool = True) -> SharedBasis:
    """The basis of that key, made on first use and freed with the last delta that holds it."""
    basis = _known.get((key, stored))
    if basis is None:
        basis = _known[(key, stored)] = SharedBasis(key, draw, stored)
    return basis


def check(name: str, basis: SharedBasis, saved: str | None) -> None:
    """Raise UsageError where a saved adapter met another basis than this machine draws."""
    if saved is not None and basis.checksum() != saved:
        raise UsageError(
            f"the seeded basis of {name} differs from the one the adapter was trained with (another torch or seed?); "
            "load it where it was made and export it with weft export --to lora or merged"
        )
