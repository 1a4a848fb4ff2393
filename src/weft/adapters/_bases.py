"""Seeded bases that all layers of a model share: drawn once on the CPU, never saved, recognised by a checksum."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from weft.adapters._config import AdapterConfig
from weft.algebra.random import checksum
from weft.errors import UsageError

_known: weakref.WeakValueDictionary[Hashable, SharedBasis] = weakref.WeakValueDictionary()


class SharedBasis:
    """The frozen tensor `draw(*key)`: one copy a device, whoever asks for it; deltas hold the reference.

    It is no buffer on purpose: PEFT would cast it, `state_dict` would save it and `module.to` would copy it per layer.
    """

    def __init__(self, draw: Callable[..., Tensor], key: tuple[Hashable, ...]) -> None:
        self.draw, self.key = draw, key
        self._copies: dict[torch.device, Tensor] = {}
        self._fingerprint: str | None = None

    def tensor(self, device: torch.device) -> Tensor:
        """The basis on a device; drawn on the CPU, so equal everywhere."""
        found = self._copies.get(device)
        if found is None:
            cpu = self._copies.get(torch.device("cpu"))
            found = self._copies[device] = (self.draw(*self.key) if cpu is None else cpu).to(device)
        return found

    def fingerprint(self) -> str:
        """16 hex digits of the drawn numbers."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.tensor(torch.device("cpu")))
        return self._fingerprint

    def stored_bytes(self) -> int:
        """Bytes held on all devices."""
        return sum(t.numel() * t.element_size() for t in self._copies.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBasis:
        return self  # frozen: copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_basis, (self.draw, *self.key)


def shared_basis(draw: Callable[..., Tensor], *key: Hashable) -> SharedBasis:
    """The basis `draw(*key)`, made on first use and freed with the last delta that holds it.

    `draw` is a module's function of plain values, so that a model that holds the basis can be pickled.
    """
    basis = _known.get((draw, key))
    if basis is None:
        basis = _known[(draw, key)] = SharedBasis(draw, key)
    return basis


def fingerprint(*tensors: Tensor) -> str:
    """16 hex digits that tell whether another machine, or another torch, drew the same numbers."""
    return checksum(torch.cat([t.detach().float().flatten().cpu() for t in tensors]))


def verify(name: str, found: str, config: AdapterConfig) -> None:
    """Raise UsageError where a saved adapter was trained with other seeded numbers than are drawn here."""
    if config.checksums.get(name) != found:
        raise UsageError(
            f"the seeded numbers drawn for {name} are not those that the adapter was trained with: load it with the "
            "version of torch that saved it, or export it there with weft export --to lora or merged"
        )
