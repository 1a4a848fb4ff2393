"""Narrow MLP: the stock MLP with fewer units in between.

    y = Wd·(act(Wg·x) ∘ (Wu·x))          Wg, Wu: k × d, Wd: d × k          OPT: y = Wd·act(Wu·x + b) + b'

Llama's, Qwen2's and Qwen3's MLPs, and OPT's decoder layers, which hold their fc1 and fc2 themselves. Units of zeros
make a stock MLP of it again, with the same outputs.
"""

from __future__ import annotations

from typing import Any, Self

from torch import nn
from torch.nn.functional import pad

from weft.errors import UsageError
from weft.linear._narrow import Narrow, filled, resized


class NarrowMlp(Narrow):
    """A stock MLP of `size` units."""

    # the layers that give the units, and the one that takes them
    stocks = {
        "LlamaMLP": (("gate_proj", "up_proj"), "down_proj"),
        "Qwen2MLP": (("gate_proj", "up_proj"), "down_proj"),
        "Qwen3MLP": (("gate_proj", "up_proj"), "down_proj"),
        "OPTDecoderLayer": (("fc1",), "fc2"),
    }
    size: int
    whole: int  # units of the stock MLP

    @classmethod
    def of(cls, module: Any, *, size: int) -> Self:
        """A stock MLP's form of so many units, whose layers have no values."""
        made = cls.like(module)
        into, out = cls.stocks[made.stock.__name__]
        whole = getattr(module, out).in_features
        if not 1 <= size <= whole:
            raise UsageError(f"size={size}: an MLP of {whole} units has 1 to {whole}")
        made.size, made.whole = size, whole
        for name in into:
            setattr(made, name, resized(getattr(module, name), out=size))
        setattr(made, out, resized(getattr(module, out), in_=size))
        return made

    def options(self) -> dict[str, Any]:
        return {"size": self.size}

    def restored(self, place: nn.Module) -> nn.Module:
        made = self.as_stock()
        into, out = self.stocks[self.stock.__name__]
        more = self.whole - self.size
        for name in into:
            old = getattr(self, name)
            bias = None if old.bias is None else pad(old.bias, (0, more))
            setattr(made, name, filled(resized(old, out=self.whole), pad(old.weight, (0, 0, 0, more)), bias))
        old = getattr(self, out)
        setattr(made, out, filled(resized(old, in_=self.whole), pad(old.weight, (0, more)), old.bias))
        del made.size, made.whole
        return made
