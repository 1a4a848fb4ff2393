"""What every way of storing a weight has in common: a layer that stands for a stock one, its description, and its size.

A kind is one file of this folder: `low_rank.py` defines `LowRank`, and `{"kind": "low_rank"}` in a model's config.json
means it. Files are found by walking the folder. A kind defines its constructor, `from_dense`, `options`, `forward` and
`dense`; what is trained are its Parameters, what is stored besides are its persistent buffers. Most kinds stand for a
linear layer, a `StructuredLinear`; any other says in `geometry` what it stands for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import skip_init
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

import weft.linear
from weft.algebra.matmul import times
from weft.errors import UsageError, nearest
from weft.registry import class_name

M = TypeVar("M", bound=nn.Module)


class Structured(nn.Module):
    """A layer whose weight is stored in some other form than that of the stock layer in whose place it stands.

    Where it can be it is of the stock layer's class: PEFT, weft's adapters and stock models meet an nn.Linear or an
    nn.Embedding, all but its weight. `weight` is a stored tensor without elements. It has the dtype and the device that
    are asked of a weight, and no shape that a weight could have, so that whoever takes it for one (a transformers that
    loads the checkpoint without weft, a merge) fails.
    """

    kind: ClassVar[str]  # the file's name
    version: ClassVar[int] = 1  # of the stored form
    linear: bool = True  # whether a stock layer can have its values; of some kinds it depends on their options
    opaque: ClassVar[bool] = True  # whether the layers inside are parts of it, and none of their own
    weight: Tensor
    bias: nn.Parameter | None = None  # b (out), of the kinds that have one, wherever they keep it
    leader: Structured | None = None  # the layer that stores what this one uses of it, and is no part of this one

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kind = cls.__module__.rpartition(".")[2]

    def __init__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def geometry(cls, stock: nn.Module) -> dict[str, Any]:
        """What its constructor takes over from the stock layer in whose place it stands, by keyword.

        Raises UsageError where it cannot stand for such a layer.
        """
        raise NotImplementedError(f"{cls.__name__} must define geometry")

    @classmethod
    def for_place(cls, stock: nn.Module) -> Callable[..., Structured]:
        """What makes an empty one, of the kind's own keywords, for the place of a stock layer.

        Raises UsageError where it cannot stand for such a layer.
        """
        weight: Any = stock.weight
        return functools.partial(cls, **cls.geometry(stock), device=weight.device, dtype=weight.dtype)

    def options(self) -> dict[str, Any]:
        """The kind's own keywords of its constructor, as JSON has them."""
        return {}

    def spec(self) -> dict[str, Any]:
        """What config.json says of the layer; `empty` reads it."""
        return {"kind": self.kind, "version": self.version, **self.options()}

    def dense(self) -> Tensor:
        """The stock layer's weight, rounded once to the layer's dtype.

        Raises UsageError where no weight describes the layer.
        """
        raise UsageError(f"a layer of kind {self.kind} is no linear map, so it has no dense weight")

    def check_dense(self, place: nn.Module) -> None:
        """Raise UsageError, whose sentence begins with a reason, where a stock layer cannot have its values."""
        if not self.linear:
            raise UsageError(f"{self.kind} is no linear map")
        if self.bias is not None and getattr(place, "bias", None) is None:
            raise UsageError("the stock layer has no place for its bias")

    def restored(self, place: Any) -> nn.Module:
        """The stock layer with its values; `place` is one without any, of which it may be made."""
        dense = self.dense()
        if isinstance(place, nn.Linear):  # inside of something narrow it has other sizes than a stock model's
            place.out_features, place.in_features = dense.shape
        place.weight = nn.Parameter((dense.mT if isinstance(place, Conv1D) else dense).contiguous())
        if getattr(place, "bias", None) is not None:
            bias = dense.new_zeros(place.bias.shape) if self.bias is None else self.bias.detach().clone()
            place.bias = nn.Parameter(bias)
        return place.train(self.training)

    def stock_place(self) -> nn.Module:
        """A stock layer of its form on the meta device: a place for `restored` where no model says what stood there."""
        raise UsageError(f"what a layer of kind {self.kind} stands for is known in a transformers model only")

    def linears(self) -> tuple[nn.Module, ...]:
        """Stock layers that do one after the other what it does, of the kinds that are a product of dense factors."""
        return ()

    def derive(self) -> None:
        """Compute what is not stored, the buffers that are not persistent, after the rest was loaded."""

    def extra_repr(self) -> str:
        own = [f"{name}={value}" for name, value in self.options().items()]
        return ", ".join(filter(None, [super().extra_repr(), *own]))


# torchao takes every nn.Linear by its weight except this one, and so comes to the factors inside
class StructuredLinear(Structured, NonDynamicallyQuantizableLinear):
    """y = x·Wᵀ + b with W (out × in) stored in some other form than a matrix."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def geometry(cls, stock: nn.Module) -> dict[str, Any]:
        if not isinstance(stock, nn.Linear):
            raise UsageError(f"a {cls.kind} layer stands for a Linear, but it is a {type(stock).__name__}")
        return {"in_features": stock.in_features, "out_features": stock.out_features}

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """b (out), wherever the kind keeps it."""
        raise NotImplementedError(f"{type(self).__name__} must define bias")

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "bias": self.bias is not None}

    def stock_place(self) -> nn.Linear:
        return bare_linear(self.in_features, self.out_features, self.bias is not None, "meta")


def kinds() -> dict[str, type[Structured]]:
    """All kinds by name."""
    return {name: _kind(name) for name in _names()}


def _names() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(weft.linear.__path__) if not info.name.startswith("_"))


def _kind(name: str) -> type[Structured]:
    return getattr(importlib.import_module(f"weft.linear.{name}"), class_name(name, ""))


def empty(spec: dict[str, Any], stock: nn.Module, leader: Structured | None = None) -> Structured:
    """The layer that a spec describes, without values, for the place of a stock one; on its device, in its dtype.

    `leader` is the layer that the spec names as such.

    Raises UsageError where this weft does not know such a layer, or it cannot stand there.
    """
    options = dict(spec)
    name, version = options.pop("kind", None), options.pop("version", 1)
    if name not in _names():
        raise UsageError(f"unknown kind of layer {name!r}: {nearest(str(name), _names())}")
    kind = _kind(name)
    if version > kind.version:
        raise UsageError(f"{name} has version {version} here, and this weft reads up to {kind.version}: upgrade weft")
    make = kind.for_place(stock)
    if "leader" in options:
        options["leader"] = leader
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise UsageError(f"{name}: {error}") from error
    return make(**options)


def check_rank(rank: int, out: int, in_: int, least: int = 0) -> int:
    """rank, or UsageError where a matrix of out × in has no such rank."""
    if not least <= rank <= min(out, in_):
        raise UsageError(f"rank={rank}: a matrix of {out} × {in_} has {least} to {min(out, in_)}")
    return rank


def bare_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """An nn.Linear without values. Draws no random numbers."""
    return bare(nn.Linear, in_features, out_features, bias=bias, device=device, dtype=dtype)


def bare(stock: type[M], *sizes: Any, device: torch.device | str | None = None, **options: Any) -> M:
    """A layer without values. Draws no random numbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a factor of rank 0
        return skip_init(stock, *sizes, device=device or "cpu", **options)


class Factor(nn.Linear):
    """A dense factor of some kind: a linear layer, by the faster of a processor's two libraries."""

    def forward(self, input: Tensor) -> Tensor:
        return times(input, self.weight, self.bias)


DENSE = (nn.Linear, Factor)


def plain(*factors: nn.Module) -> bool:
    """Whether these are linear layers that multiply by their weights: one that is quantised, or has an adapter of its
    own, alone knows how to multiply."""
    return all(type(each) in DENSE and type(each.weight) is nn.Parameter for each in factors)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply x: autocast's, where that is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # meta knows of none
        return torch.get_autocast_dtype(device)
    return x.dtype


def stored_bits(layer: nn.Module, *, bias: bool = False) -> int:
    """Bits of a layer's tensors in a checkpoint, dense or structured: values, indices, masks and scales as stored.

    The bias counts only if asked for: it is there before and after, and no part of the matrix.
    """
    own = getattr(layer, "bias", None)
    return sum(_bits(t) for t in layer.state_dict(keep_vars=True).values() if bias or t is not own)


def _bits(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):  # a quantised factor: its codes and scales
        return sum(_bits(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return 8 * tensor.numel() * tensor.element_size()
