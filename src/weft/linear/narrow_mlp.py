"""Narrow MLP: the stock MLP with fewer units in between.

    y = Wd·(act(Wg·x) ∘ (Wu·x))          Wg, Wu: k × d, Wd: d × k          OPT: y = Wd·act(Wu·x + b) + b'

Llama's, Qwen2's and Qwen3's MLPs, and OPT's decoder layers, which hold their fc1 and fc2 themselves. Units of zeros
make a stock MLP of it again, with the same outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

from torch import nn
from torch.nn.functional import pad

from weft.errors import UsageError
from weft.linear._narrow import Narrow, filled, resized
from weft.linear._structured import Structured

# by stock class: the layers that give the units, and the one that takes them
PARTS = {
    "LlamaMLP": (("gate_proj", "up_proj"), "down_proj"),
    "Qwen2MLP": (("gate_proj", "up_proj"), "down_proj"),
    "Qwen3MLP": (("gate_proj", "up_proj"), "down_proj"),
    "OPTDecoderLayer": (("fc1",), "fc2"),
}


def parts_of(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of the layers into and out of the units of a stock MLP; None where it is none that can be narrow."""
    stock = type(module)
    return PARTS.get(stock.__name__) if stock.__module__.startswith("transformers.models.") else None


class NarrowMlp(Narrow):
    """A stock MLP of `size` units."""

    size: int
    whole: int  # units of the stock MLP

    @classmethod
    def check(cls, module: nn.Module) -> type[nn.Module]:
        if parts_of(module) is None:
            raise UsageError(f"{type(module).__name__} has no {cls.kind} form: there are {', '.join(PARTS)}")
        return type(module)

    @classmethod
    def of(cls, module: Any, *, size: int) -> Self:
        """A stock MLP's form of so many units, whose layers have no values."""
        made = cls.like(module)
        into, out = PARTS[made.stock.__name__]
        whole = getattr(module, out).in_features
        if not 1 <= size <= whole:
            raise UsageError(f"size={size}: an MLP of {whole} units has 1 to {whole}")
        made.size, made.whole = size, whole
        for name in into:
            setattr(made, name, resized(getattr(module, name), out=size))
        setattr(made, out, resized(getattr(module, out), in_=size))
        return made

    @classmethod
    def for_place(cls, stock: nn.Module) -> Callable[..., Structured]:
        return functools.partial(cls.of, stock)

    def options(self) -> dict[str, Any]:
        return {"size": self.size}

    def restored(self, place: nn.Module) -> nn.Module:
        made = self.as_stock()
        into, out = PARTS[self.stock.__name__]
        more = self.whole - self.size
        for name in into:
            old = getattr(self, name)
            bias = None if old.bias is None else pad(old.bias, (0, more))
            setattr(made, name, filled(resized(old, out=self.whole), pad(old.weight, (0, 0, 0, more)), bias))
        old = getattr(self, out)
        setattr(made, out, filled(resized(old, in_=self.whole), pad(old.weight, (0, more)), old.bias))
        del made.size, made.whole
        return made
