"""A stock module whose linear layers are narrower inside than its config says, and fit each other.

Its layers are plain nn.Linear under the stock names, so that adapters, quantisation and a second compression find them.
It is of the stock module's class as well: hooks by class, checkpointing and what the stock forward needs stay. Without
weft a checkpoint does not load: the stock layers have other shapes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from weft.errors import UsageError
from weft.linear._structured import Structured, bare_linear


class Narrow(Structured):
    """What narrow modules share; a kind defines `stocks`, `of`, `options` and `restored`."""

    opaque = False
    word: ClassVar[str] = "Narrow"  # what stands before a stock class's name in that of its form
    stocks: ClassVar[dict[str, Any]]  # by name of a stock class, what its form must know
    stock: ClassVar[type[nn.Module]]  # the class in whose place it stands
    of: ClassVar[Callable[..., Any]]  # a module's form of other sizes, whose layers have no values

    @classmethod
    def form(cls, module: nn.Module) -> Any | None:
        """What `stocks` says of a stock module's class; None of what cannot be narrow."""
        stock = type(module)
        return cls.stocks.get(stock.__name__) if stock.__module__.startswith("transformers.models.") else None

    @classmethod
    def check(cls, module: nn.Module) -> type[nn.Module]:
        """The stock class of a module that can be narrow. Raises UsageError, by name, for any other."""
        if cls.form(module) is None:
            raise UsageError(f"{type(module).__name__} has no {cls.kind} form: there are {', '.join(cls.stocks)}")
        return type(module)

    @classmethod
    def for_place(cls, stock: nn.Module) -> Callable[..., Structured]:
        return functools.partial(cls.of, stock)

    @classmethod
    def like(cls, module: nn.Module) -> Self:
        """A narrow module of the full size with a module's layers, its hooks and its attributes."""
        narrow = module if isinstance(module, cls) else _as(_class(cls, cls.check(module)), module)  # type: ignore[arg-type]
        return copied(narrow)  # type: ignore[return-value]

    def check_dense(self, place: nn.Module) -> None:
        for name, stock in place.named_children():
            layer = getattr(self, name)
            if isinstance(stock, nn.Linear) and not (type(layer) is nn.Linear or isinstance(layer, Structured)):
                raise UsageError(f"{name} inside is a {type(layer).__module__}.{type(layer).__name__}")

    def as_stock(self) -> nn.Module:
        """The stock module with this one's layers."""
        return _as(type(self).stock, self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


@functools.cache
def _class(kind: type[Narrow], stock: type[nn.Module]) -> type[Narrow]:
    """The form of one stock class."""
    return type(f"{kind.word}{stock.__name__}", (kind, stock), {"__module__": kind.__module__, "stock": stock})


def _as(wanted: type[nn.Module], module: nn.Module) -> Any:
    made = copied(module)
    made.__class__ = wanted
    return made


def copied(module: nn.Module) -> nn.Module:
    """A module that shares all of another's parts, any of which can be replaced without the other's knowing."""
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(made, name, dict(getattr(module, name)))
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return made


def resized(layer: nn.Linear, *, out: int | None = None, in_: int | None = None, bias: bool | None = None) -> nn.Linear:
    """An empty layer as another one, of other sizes."""
    made = bare_linear(
        layer.in_features if in_ is None else in_,
        layer.out_features if out is None else out,
        layer.bias is not None if bias is None else bias,
        layer.weight.device,
        layer.weight.dtype,
    )
    return made.train(layer.training)


def filled(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """The layer with these values, rounded to its dtype."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)  # type: ignore[arg-type]
    return layer
